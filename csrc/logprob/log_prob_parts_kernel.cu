// The forward of token log-probs on a GPU: one block reads a row once, or several blocks read a share of it each and a
// second kernel joins the shares in their order. Bound by memory on paper (16 byte loads, two rounds of four in flight,
// some 7 instructions an element, 9 with the entropy); unverified on a GPU.
#include "../cuda/grid.h"
#include "log_prob_kernel.h"
#include "row_sums.h"

namespace semion {
namespace {

constexpr int unroll = 4, block = 256, blocks_per_multiprocessor = 1024 / block;
using Rows = LogProbRows;

// Adds this thread's share of vectors [begin, end) of a row. The next round is loaded before this one is summed.
template <Element E, bool WITH_ENTROPY>
__device__ __forceinline__ void add_vectors(const uint4* vectors, int begin, int end, float rate, RowSums& mine) {
  constexpr int ROUND = unroll * block;
  uint4 ahead[unroll];
  int first = begin + int(threadIdx.x);
#pragma unroll
  for (int u = 0; u < unroll; ++u)
    if (first + u * block < end) ahead[u] = __ldcs(vectors + first + u * block);
  for (; first < end; first += ROUND) {
    uint4 here[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) here[u] = ahead[u];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int next = first + ROUND + u * block;
      if (next < end) ahead[u] = __ldcs(vectors + next);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (first + u * block >= end) break;
      float x[Elements<E>::PER_VECTOR];
      widen_vector<E>(here[u], x);
      mine.add<WITH_ENTROPY>(x, rate);
    }
  }
}

// The sums of share `split` of a row's valid columns; thread 0 has the result.
template <Element E, bool WITH_ENTROPY>
__device__ __forceinline__ RowSums sum_row(const typename Elements<E>::Storage* row, int num_valid, int split,
                                           int num_splits, float rate) {
  const RowPieces<E> pieces(row, num_valid);
  RowSums mine;
  if (split == 0 && int(threadIdx.x) < pieces.num_single) {
    const float x[1] = {Elements<E>::widen(row[pieces.single_column(threadIdx.x)])};
    mine.add<WITH_ENTROPY>(x, rate);
  }
  const int share = (pieces.num_vectors + num_splits - 1) / num_splits;
  const int begin = split * share, end = begin + share < pieces.num_vectors ? begin + share : pieces.num_vectors;
  const uint4* const vectors = reinterpret_cast<const uint4*>(row + pieces.head);
  add_vectors<E, WITH_ENTROPY>(vectors, begin, end, rate, mine);
  return join_block<WITH_ENTROPY, block>(mine, rate);
}

// The target of a row as a column of this rank, or -1, and its logit: 0 on another rank, NaN of a target out of range.
struct Target {
  int column;
  float logit;

  template <Element E>
  static __device__ __forceinline__ Target of(const Rows& rows, int64_t row) {
    const int64_t target = rows.targets[row], column = target - rows.vocab_start;
    if (target == ignored) return {-1, 0.0f};
    if (target < rows.lowest_id || target >= rows.end_id) return {-1, __uint_as_float(0x7fc00000u)};
    if (column < 0 || column >= rows.num_valid) return {-1, 0.0f};
    const auto* const logits = static_cast<const typename Elements<E>::Storage*>(rows.logits);
    return {int(column), Elements<E>::widen(logits[row * rows.row_stride + column])};
  }
};

__device__ __forceinline__ void put(float* parts, int64_t num_rows, int64_t row, const RowSums& sums, float logit) {
  parts[row] = sums.reference;
  parts[num_rows + row] = sums.total;
  parts[2 * num_rows + row] = sums.weighted * ln_2;
  parts[3 * num_rows + row] = logit;
}

__device__ __forceinline__ void put_ignored(float* parts, int64_t num_rows, int64_t row) {
  RowSums sums;
  sums.reference = 0.0f;
  sums.total = 1.0f;
  put(parts, num_rows, row, sums, 0.0f);
}

template <Element E, bool EVERY_ROW>
__global__ void __launch_bounds__(block, blocks_per_multiprocessor) parts_kernel(Rows rows, float* parts, float* shares) {
  const int64_t row = blockIdx.x;
  const bool first = threadIdx.x == 0;
  if (!EVERY_ROW && rows.targets[row] == ignored) {
    if (first && blockIdx.y == 0) put_ignored(parts, rows.num_rows, row);
    return;
  }
  float logit = 0.0f;
  if (first && gridDim.y == 1) logit = Target::of<E>(rows, row).logit;  // asked for before the row, to hide its way
  const auto* const logits = static_cast<const typename Elements<E>::Storage*>(rows.logits) + row * rows.row_stride;
  const RowSums sums = sum_row<E, EVERY_ROW>(logits, rows.num_valid, blockIdx.y, gridDim.y,
                                             log2_e / float(rows.temperature));
  if (!first) return;
  if (gridDim.y == 1) {
    put(parts, rows.num_rows, row, sums, logit);
  } else {
    float* const share = shares + 3 * rows.num_rows * blockIdx.y + row;
    share[0] = sums.reference;
    share[rows.num_rows] = sums.total;
    share[2 * rows.num_rows] = sums.weighted;
  }
}

template <Element E, bool EVERY_ROW>
__global__ void __launch_bounds__(block) join_shares_kernel(Rows rows, int num_splits, const float* shares,
                                                                  float* parts) {
  const int64_t row = int64_t(blockIdx.x) * block + threadIdx.x;
  if (row >= rows.num_rows || (!EVERY_ROW && rows.targets[row] == ignored)) return;
  RowSums sums;
  for (int split = 0; split < num_splits; ++split) {
    const float* const share = shares + 3 * rows.num_rows * split + row;
    RowSums other;
    other.reference = share[0];
    other.total = share[rows.num_rows];
    other.weighted = share[2 * rows.num_rows];
    sums.join<EVERY_ROW>(other, log2_e / float(rows.temperature));
  }
  put(parts, rows.num_rows, row, sums, Target::of<E>(rows, row).logit);
}

template <Element E, bool EVERY_ROW>
void launch_parts(const Rows& rows, float* parts, float* shares, cudaStream_t stream) {
  const int num_splits = semion_log_prob_splits(&rows);
  const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(num_splits));
  SEMION_LAUNCH((parts_kernel<E, EVERY_ROW>), grid, block, stream, rows, parts, shares);
  if (num_splits > 1) {
    const auto num_blocks = static_cast<unsigned>((rows.num_rows + block - 1) / block);
    SEMION_LAUNCH((join_shares_kernel<E, EVERY_ROW>), num_blocks, block, stream, rows, num_splits, shares, parts);
  }
}

template <Element E>
void choose_parts(const Rows& rows, float* parts, float* shares, cudaStream_t stream) {
  rows.every_row ? launch_parts<E, true>(rows, parts, shares, stream) : launch_parts<E, false>(rows, parts, shares, stream);
}

}  // namespace
}  // namespace semion

using semion::Element;

int semion_log_prob_splits(const semion::LogProbRows* rows) {
  const int per_vector = rows->element == Element::float32 ? 4 : 8;
  const int64_t most = rows->num_valid / (per_vector * semion::block * semion::unroll);
  return semion::splits_of(rows->num_rows, most, semion::blocks_at_once(semion::blocks_per_multiprocessor));
}

cudaError_t semion_log_prob_parts(const semion::LogProbRows* rows, float* parts, float* workspace, cudaStream_t stream) {
  if (rows->num_rows == 0) return cudaSuccess;
  switch (rows->element) {
    case Element::float32: semion::choose_parts<Element::float32>(*rows, parts, workspace, stream); break;
    case Element::bfloat16: semion::choose_parts<Element::bfloat16>(*rows, parts, workspace, stream); break;
    case Element::float16: semion::choose_parts<Element::float16>(*rows, parts, workspace, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
