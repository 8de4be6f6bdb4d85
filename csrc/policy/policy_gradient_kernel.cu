// GRPO's loss of a packed row and its gradient in one pass on a GPU: a thread a token, whatever the lengths of sequences,
// then one block adds the blocks' sums in their order; double sums, no atomics. Its speed is the two launches'. Unverified
// on a GPU.
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

// The sequence that holds a token, by a search in cu_seqlens; -1 where none does.
__device__ __forceinline__ int sequence_of(const Row& row, int token) {
  int low = 0, high = row.num_sequences;  // the last boundary that is at most `token` lies in [low, high]
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    row.cu_seqlens[middle] <= token ? low = middle : high = middle - 1;
  }
  return low < row.num_sequences && row.cu_seqlens[low] <= token ? low : -1;
}

__global__ void __launch_bounds__(block) tokens_kernel(Row row, double* block_sums_of, float* gradient) {
  const int token = int(blockIdx.x) * block + int(threadIdx.x);
  double sums[num_sums] = {};
  if (token < row.num_tokens) {
    const int sequence = row.targets[token] == ignored ? -1 : sequence_of(row, token);
    gradient[token] = sequence < 0 ? 0.0f : add_token(row, token, row.advantages[sequence], sums);
  }
  block_sums<block>(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k < num_sums; ++k) block_sums_of[int64_t(blockIdx.x) * num_sums + k] = sums[k];
}

__global__ void __launch_bounds__(block) join_blocks_kernel(const double* block_sums_of, int num_blocks, float* out) {
  double sums[num_sums] = {};
  for (int i = threadIdx.x; i < num_blocks; i += block)
    for (int k = 0; k < num_sums; ++k) sums[k] += block_sums_of[int64_t(i) * num_sums + k];
  block_sums<block>(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k < num_sums; ++k) out[k] = float(sums[k]);
}

}  // namespace
}  // namespace semion

int64_t semion_policy_gradient_workspace(int32_t num_tokens) {
  return int64_t(semion::num_sums) * ((int64_t(num_tokens) + semion::block - 1) / semion::block);
}

cudaError_t semion_policy_gradient(const semion::PolicyGradientRow* row, double* workspace, float* sums,
                                   float* gradient, cudaStream_t stream) {
  const auto num_blocks = int(semion_policy_gradient_workspace(row->num_tokens) / semion::num_sums);
  if (num_blocks > 0) SEMION_LAUNCH(semion::tokens_kernel, num_blocks, semion::block, stream, *row, workspace, gradient);
  SEMION_LAUNCH(semion::join_blocks_kernel, 1, semion::block, stream, workspace, num_blocks, sums);
  return cudaGetLastError();
}
