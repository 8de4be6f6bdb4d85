// The join of the ranks' parts and the backward of token log-probs on a GPU. The backward reads every logit once and
// writes its gradient, over the logits or elsewhere; rows without a gradient are cleared unread. Bound by memory on
// paper (16 byte loads, four in flight, 5.2 instructions an element, 7.2 with the entropy); unverified on a GPU.
#include "../cuda/grid.h"
#include "log_prob_kernel.h"
#include "row_gradient.h"

namespace semion {
namespace {

constexpr int unroll = 4, block = 256, blocks_per_multiprocessor = 1024 / block;
using Rows = LogProbRows;
using Gradient = LogProbGradient;

__global__ void __launch_bounds__(block) join_kernel(const float* parts, int64_t num_ranks, const int64_t* targets,
                                                     int64_t num_rows, float temperature, float* log_probs,
                                                     float* entropy, float* totals) {
  const int64_t row = int64_t(blockIdx.x) * block + threadIdx.x;
  if (row >= num_rows) return;
  double reference = parts[row];
  for (int64_t rank = 1; rank < num_ranks; ++rank) reference = fmax(reference, double(parts[rank * 4 * num_rows + row]));
  double total = 0, weighted = 0, target = 0;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    const float* const part = parts + rank * 4 * num_rows + row;
    const double shift = (part[0] - reference) / temperature, shrink = exp(shift);
    total += shrink * part[num_rows];
    weighted += shrink * (part[2 * num_rows] + part[num_rows] * shift);
    target += part[3 * num_rows];
  }
  const double log_total = log(total), mean = weighted / total;
  log_probs[row] = targets[row] == ignored ? 0.0f : float((target - reference) / temperature - log_total);
  entropy[row] = float(log_total - mean);
  totals[row] = float(reference);
  totals[num_rows + row] = float(total);
  totals[2 * num_rows + row] = float(mean);
}

template <Element E, bool WITH_ENTROPY>
__global__ void __launch_bounds__(block, blocks_per_multiprocessor) backward_kernel(Rows rows, Gradient gradient) {
  using Storage = typename Elements<E>::Storage;
  const int64_t row = blockIdx.x, target = rows.targets[row], column = target - rows.vocab_start;
  const Storage* const logits = static_cast<const Storage*>(rows.logits) + row * rows.row_stride;
  Storage* const out = static_cast<Storage*>(gradient.out) + row * gradient.row_stride;
  const int worker = int(blockIdx.y * block + threadIdx.x), num_workers = int(gridDim.y * block);
  const float temperature = float(rows.temperature);
  const float g = target == ignored ? 0.0f : gradient.grad_log_prob[row] / temperature;
  const float h = WITH_ENTROPY ? gradient.grad_entropy[row] / temperature : 0.0f;
  if (g == 0.0f && h == 0.0f) {
    clear_row<E>(out, rows.num_columns, worker, num_workers);
    return;
  }
  const float per_total = 1.0f / gradient.totals[rows.num_rows + row];
  const float mean = WITH_ENTROPY ? gradient.totals[2 * rows.num_rows + row] : 0.0f;
  const bool mine = target >= 0 && column >= 0 && column < rows.num_valid;
  const RowGradient of_row(gradient.totals[row], log2_e / temperature, (h * mean - g) * per_total, -h * ln_2 * per_total,
                           g, mine ? int(column) : -1);
  if (reinterpret_cast<uintptr_t>(logits) % 16 == reinterpret_cast<uintptr_t>(out) % 16) {
    write_row_gradient<E, WITH_ENTROPY, unroll>(logits, out, rows.num_columns, rows.num_valid, of_row, worker,
                                                       num_workers);
  } else {
    write_shifted_row_gradient<E, WITH_ENTROPY>(logits, out, rows.num_columns, rows.num_valid, of_row, worker,
                                                num_workers);
  }
}

template <Element E>
void launch_backward(const Rows& rows, const Gradient& gradient, cudaStream_t stream) {
  const int64_t most = rows.num_columns / (Elements<E>::PER_VECTOR * block * unroll);
  const int num_splits = splits_of(rows.num_rows, most, blocks_at_once(blocks_per_multiprocessor));
  const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(num_splits));
  if (gradient.grad_entropy != nullptr) {
    SEMION_LAUNCH((backward_kernel<E, true>), grid, block, stream, rows, gradient);
  } else {
    SEMION_LAUNCH((backward_kernel<E, false>), grid, block, stream, rows, gradient);
  }
}

}  // namespace
}  // namespace semion

using semion::Element;

cudaError_t semion_log_prob_join(const float* parts, int64_t num_ranks, const int64_t* targets, int64_t num_rows,
                                 float temperature, float* log_probs, float* entropy, float* totals,
                                 cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  const auto num_blocks = static_cast<unsigned>((num_rows + semion::block - 1) / semion::block);
  SEMION_LAUNCH(semion::join_kernel, num_blocks, semion::block, stream, parts, num_ranks, targets, num_rows, temperature,
                log_probs, entropy, totals);
  return cudaGetLastError();
}

cudaError_t semion_log_prob_backward(const semion::LogProbRows* rows, const semion::LogProbGradient* gradient,
                                     cudaStream_t stream) {
  if (rows->num_rows == 0 || rows->num_columns == 0) return cudaSuccess;
  switch (rows->element) {
    case Element::float32: semion::launch_backward<Element::float32>(*rows, *gradient, stream); break;
    case Element::bfloat16: semion::launch_backward<Element::bfloat16>(*rows, *gradient, stream); break;
    case Element::float16: semion::launch_backward<Element::float16>(*rows, *gradient, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
