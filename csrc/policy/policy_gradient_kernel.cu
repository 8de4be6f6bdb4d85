// GRPO's loss of a packed row and its gradient in one pass on a GPU: one block a sequence, then one block adds the
// sequences' sums in their order; double sums, no atomics. Its speed is the two launches'. Unverified on a GPU.
#include "policy_gradient_kernel.h"

#include "../cuda/sums.h"

namespace semion {
namespace {

constexpr int64_t ignored = -100;
constexpr int block = 256, num_sums = num_policy_sums;
using Row = PolicyGradientRow;

// The gradient of one token's loss; adds what it contributes to the sums.
__device__ __forceinline__ float add_token(const Row& row, int token, float advantage, double (&sums)[num_sums]) {
  const float log_prob = row.log_probs[token], gap = log_prob - row.old_log_probs[token];
  bool beyond = gap > log_limit;
  const float ratio = expf(beyond ? log_limit : gap);  // fminf would lose a NaN
  const float low = 1.0f - row.clip_low, high = 1.0f + row.clip_high;
  const float bound = advantage >= 0.0f ? high : ratio < low ? low : row.dual_clip;
  const bool held = advantage >= 0.0f ? ratio > high : ratio < low || ratio > row.dual_clip;  // false of a NaN, which so shows
  sums[0] -= (held ? bound : ratio) * advantage;
  sums[2] += held && advantage != 0.0f;
  sums[3] += ratio;
  sums[4] += fabsf(gap);
  float gradient = held || beyond ? 0.0f : -ratio * advantage;
  if (row.reference_log_probs != nullptr) {
    const float whole = row.reference_log_probs[token] - log_prob;
    const bool far = whole > log_limit;
    const float d = far ? log_limit : whole, less_one = expm1f(d), kl = less_one - d;
    sums[0] += row.kl_weight * kl;
    sums[1] += kl;
    if (!far) gradient -= row.kl_weight * less_one;
    beyond = beyond || far;
  }
  sums[5] += beyond;
  return gradient;
}

__global__ void __launch_bounds__(block) tokens_kernel(Row row, double* sequence_sums, float* gradient) {
  const int sequence = blockIdx.x;
  const Span span(row.cu_seqlens, sequence, row.num_tokens);
  const float advantage = row.advantages[sequence];
  double sums[num_sums] = {};
  for (int i = span.begin + int(threadIdx.x); i < span.end; i += block)
    gradient[i] = row.targets[i] == ignored ? 0.0f : add_token(row, i, advantage, sums);
  block_sums<block>(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k < num_sums; ++k) sequence_sums[sequence * num_sums + k] = sums[k];
}

__global__ void __launch_bounds__(block) sequences_kernel(const double* sequence_sums, int num_sequences, float* out) {
  double sums[num_sums] = {};
  for (int sequence = threadIdx.x; sequence < num_sequences; sequence += block)
    for (int k = 0; k < num_sums; ++k) sums[k] += sequence_sums[sequence * num_sums + k];
  block_sums<block>(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k < num_sums; ++k) out[k] = float(sums[k]);
}

}  // namespace
}  // namespace semion

cudaError_t semion_policy_gradient(const semion::PolicyGradientRow* row, double* workspace, float* sums,
                                   float* gradient, cudaStream_t stream) {
  if (row->num_sequences > 0)
    SEMION_LAUNCH(semion::tokens_kernel, row->num_sequences, semion::block, stream, *row, workspace, gradient);
  SEMION_LAUNCH(semion::sequences_kernel, 1, semion::block, stream, workspace, row->num_sequences, sums);
  return cudaGetLastError();
}
