// Group-relative advantages on a GPU: one warp a group, double inside, sums in a fixed order. Its speed is the launch's.
// Unverified on a GPU.
#include "advantages_kernel.h"

#include "../cuda/sums.h"
#include "scale.h"

namespace semion {
namespace {

constexpr int block = 128, groups_per_block = block / 32;
enum Normalize { mean_only, mean_std, leave_one_out };

template <class Real>
__global__ void __launch_bounds__(block) advantages_kernel(const Real* rewards, const int32_t* cu_groups,
                                                           int num_rewards, int num_groups, int normalize,
                                                           Real* advantages, uint8_t* no_signal,
                                                           unsigned long long* broken) {
  const int group = int(blockIdx.x) * groups_per_block + int(threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (group >= num_groups) return;  // a whole warp at once: no barrier of the block follows
  const Span span(cu_groups, group, num_rewards);
  double low = INFINITY, high = -INFINITY;
  for (int i = span.begin + lane; i < span.end; i += 32) {
    const double reward = rewards[i];
    if (!isfinite(reward)) atomicMin(broken, static_cast<unsigned long long>(i));  // the order does not matter to it
    low = fmin(low, reward);
    high = fmax(high, reward);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    low = fmin(low, __shfl_xor_sync(0xffffffffu, low, mask));
    high = fmax(high, __shfl_xor_sync(0xffffffffu, high, mask));
  }
  const Scale scale(low, high);
  double sum = 0.0;
  for (int i = span.begin + lane; i < span.end; i += 32) sum += rewards[i] * scale.down;
  sum = warp_sum(sum);
  const double count = span.end - span.begin;
  const double mean = fmin(fmax(sum / count, low * scale.down), high * scale.down);  // between them, however it rounds
  bool signal = low < high;
  double factor = 1.0, up = scale.up;
  if (normalize == leave_one_out && signal) factor = count / (count - 1.0);
  if (normalize == mean_std) {
    double squares = 0.0;
    for (int i = span.begin + lane; i < span.end; i += 32) {
      const double centred = rewards[i] * scale.down - mean;
      squares += centred * centred;
    }
    const double deviation = sqrt(warp_sum(squares) / count);
    signal = signal && !(deviation <= least_deviation * scale.largest);
    factor = 1.0 / deviation;
    up = 1.0;  // what is divided by a deviation has no scale
  }
  if (lane == 0) no_signal[group] = !signal;
  for (int i = span.begin + lane; i < span.end; i += 32) {
    const Real advantage = static_cast<Real>(factor * (rewards[i] * scale.down - mean) * up);
    advantages[i] = signal ? advantage : Real(0);
    if (signal && isfinite(sum) && !isfinite(advantage)) atomicMin(broken, static_cast<unsigned long long>(i));
  }
}

template <class Real>
void launch_advantages(const void* rewards, const int32_t* cu_groups, int num_rewards, int num_groups, int normalize,
                       void* advantages, uint8_t* no_signal, int64_t* broken, cudaStream_t stream) {
  const int num_blocks = (num_groups + groups_per_block - 1) / groups_per_block;
  SEMION_LAUNCH(advantages_kernel<Real>, num_blocks, block, stream, static_cast<const Real*>(rewards), cu_groups,
                num_rewards, num_groups, normalize, static_cast<Real*>(advantages), no_signal,
                reinterpret_cast<unsigned long long*>(broken));
}

}  // namespace
}  // namespace semion

cudaError_t semion_grouped_advantages(const void* rewards, int is_double, const int32_t* cu_groups, int32_t num_rewards,
                                      int32_t num_groups, int normalize, void* advantages, uint8_t* no_signal,
                                      int64_t* broken, cudaStream_t stream) {
  // All bits: -1 to the reader, and the largest number to atomicMin.
  const cudaError_t cleared = cudaMemsetAsync(broken, 0xff, sizeof *broken, stream);
  if (cleared != cudaSuccess || num_groups == 0) return cleared;
  const auto launch = is_double ? semion::launch_advantages<double> : semion::launch_advantages<float>;
  launch(rewards, cu_groups, num_rewards, num_groups, normalize, advantages, no_signal, broken, stream);
  return cudaGetLastError();
}
