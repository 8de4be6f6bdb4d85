// Sums of token values per sequence and their backward on a GPU: one block a sequence, double sums in a fixed order, no
// atomics. Four bytes a token: its speed is the launch's. Unverified on a GPU.
#include "sequences_kernel.h"

#include "../cuda/sums.h"

namespace semion {
namespace {

constexpr int block = 256;

__global__ void __launch_bounds__(block) sums_kernel(const float* values, const int32_t* cu_seqlens,
                                                     const uint8_t* mask, int num_tokens, float* sums) {
  const Span span(cu_seqlens, blockIdx.x, num_tokens);
  double sum[1] = {0.0};
  for (int i = span.begin + int(threadIdx.x); i < span.end; i += block)
    if (mask == nullptr || mask[i]) sum[0] += values[i];
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
