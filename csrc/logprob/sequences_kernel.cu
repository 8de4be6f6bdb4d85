// Sums of token values per sequence and their backward on a GPU: one block a sequence, double sums in a fixed order, no
// atomics. Four bytes a token: its speed is the launch's, and for a long sequence that of its 1024 threads, which load four
// tokens each before they add one (16,384 tokens are four such rounds). Unverified on a GPU.
#include "sequences_kernel.h"

#include "../cuda/sums.h"

namespace semion {
namespace {

constexpr int block = 1024, unroll = 4;

__global__ void __launch_bounds__(block) sums_kernel(const float* values, const int32_t* cu_seqlens,
                                                     const uint8_t* mask, int num_tokens, float* sums) {
  const Span span(cu_seqlens, blockIdx.x, num_tokens);
  double sum[1] = {0.0};
  for (int first = span.begin + int(threadIdx.x); first < span.end; first += unroll * block) {
    float value[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int i = first + u * block;
      value[u] = i < span.end && (mask == nullptr || mask[i]) ? values[i] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) sum[0] += value[u];
  }
  block_sums<block>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = float(sum[0]);
}

__global__ void __launch_bounds__(block) sums_backward_kernel(const float* grad_sums, const int32_t* cu_seqlens,
                                                              const uint8_t* mask, int num_tokens,
                                                              float* grad_values) {
  const Span span(cu_seqlens, blockIdx.x, num_tokens);
  const float gradient = grad_sums[blockIdx.x];
  for (int i = span.begin + int(threadIdx.x); i < span.end; i += block)
    grad_values[i] = mask == nullptr || mask[i] ? gradient : 0.0f;
}

}  // namespace
}  // namespace semion

cudaError_t semion_sequence_sums(const float* values, const int32_t* cu_seqlens, const uint8_t* mask,
                                 int32_t num_tokens, int32_t num_sequences, float* sums, cudaStream_t stream) {
  if (num_sequences == 0) return cudaSuccess;
  SEMION_LAUNCH(semion::sums_kernel, num_sequences, semion::block, stream, values, cu_seqlens, mask, num_tokens, sums);
  return cudaGetLastError();
}

cudaError_t semion_sequence_sums_backward(const float* grad_sums, const int32_t* cu_seqlens, const uint8_t* mask,
                                          int32_t num_tokens, int32_t num_sequences, float* grad_values,
                                          cudaStream_t stream) {
  if (num_sequences == 0) return cudaSuccess;
  SEMION_LAUNCH(semion::sums_backward_kernel, num_sequences, semion::block, stream, grad_sums, cu_seqlens, mask,
                num_tokens, grad_values);
  return cudaGetLastError();
}
