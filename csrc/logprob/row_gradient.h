// The gradient of one row of logits on a GPU: the arithmetic and the walk over the row. The caller gives each thread its
// number; there is no barrier and no reduction. What is rare is taken out of the loop over whole vectors: padding comes
// after it, and the target's element is written again by the thread that wrote its vector.
#pragma once
#include "row_sums.h"

namespace semion {

// The gradient of a logit x is 2^t (a + b t), plus `hit` at the target's column, with t = x rate - offset. The offset is
// reference * rate rounded; what the rounding lost is in a, so that one multiply-add a logit is as exact as the difference.
struct RowGradient {
  float rate, offset, a, b, hit;
  int column;  // -1 where another rank has the target

  // (slope, tilt): the gradient is 2^d (slope + tilt d), d = (x - reference) * rate.
  __device__ __forceinline__ RowGradient(float reference, float rate_, float slope, float tilt, float hit_, int column_)
      : rate(rate_), offset(reference * rate_), hit(hit_), column(column_) {
    const float lost = fmaf(reference, rate, -offset), scale = exp2_fast(-lost);  // d = t - lost
    a = scale * fmaf(-tilt, lost, slope);
    b = scale * tilt;
  }

  template <bool WITH_ENTROPY>
  __device__ __forceinline__ float beside_target(float logit) const {
    const float t = fmaf(logit, rate, -offset);
    return exp2_fast(t) * (WITH_ENTROPY ? fmaf(b, fmaxf(t, vanishing), a) : a);
  }
  template <bool WITH_ENTROPY>
  __device__ __forceinline__ float at(float logit, int c) const {
    return beside_target<WITH_ENTROPY>(logit) + (c == column ? hit : 0.0f);
  }
};

// Vectors [0, num_vectors) of a row that hold neither padding nor, as far as the loop knows, the target.
template <Element E, bool WITH_ENTROPY, int UNROLL>
__device__ __forceinline__ void write_vectors(const uint4* from, uint4* to, int num_vectors, const RowGradient& gradient,
                                              int worker, int num_workers) {
  const auto write = [&](int i, const uint4& loaded) {
    float x[Elements<E>::PER_VECTOR];
    widen_vector<E>(loaded, x);
#pragma unroll
    for (int k = 0; k < Elements<E>::PER_VECTOR; ++k) x[k] = gradient.template beside_target<WITH_ENTROPY>(x[k]);
    __stcs(to + i, narrow_vector<E>(x));
  };
  int i = worker;
  for (; i + (UNROLL - 1) * num_workers < num_vectors; i += UNROLL * num_workers) {
    uint4 loaded[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) loaded[u] = __ldcs(from + i + u * num_workers);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) write(i + u * num_workers, loaded[u]);
  }
  uint4 loaded[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
    if (i + u * num_workers < num_vectors) loaded[u] = __ldcs(from + i + u * num_workers);
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
    if (i + u * num_workers < num_vectors) write(i + u * num_workers, loaded[u]);
}

// Thread `worker` of `num_workers` writes its part of out[0, num_columns): the gradient of the valid columns of `row`, 0
// in the others. `out` may be `row`, and must lie at the same distance from a 16 byte boundary.
template <Element E, bool WITH_ENTROPY, int UNROLL>
__device__ __forceinline__ void write_row_gradient(const typename Elements<E>::Storage* row,
                                                   typename Elements<E>::Storage* out, int num_columns, int num_valid,
                                                   const RowGradient& gradient, int worker, int num_workers) {
  constexpr int WIDTH = Elements<E>::PER_VECTOR;
  const RowPieces<E> pieces(out, num_columns);
  const auto slope_at = [&](int c) {
    return c < num_valid ? gradient.template at<WITH_ENTROPY>(Elements<E>::widen(row[c]), c) : 0.0f;
  };
  if (worker < pieces.num_single) {
    const int c = pieces.single_column(worker);
    out[c] = Elements<E>::narrow(slope_at(c));
  }
  const int valid = (num_valid - pieces.head) / WIDTH;  // vectors without padding; what is below 0 becomes 0
  const int num_whole = valid < 0 ? 0 : valid < pieces.num_vectors ? valid : pieces.num_vectors;
  const int of_target = gradient.column < pieces.head ? -1 : (gradient.column - pieces.head) / WIDTH;
  const bool mine = of_target >= 0 && of_target < num_whole && of_target % num_workers == worker;
  const float at_target = mine ? slope_at(gradient.column) : 0.0f;  // before the vector is written over
  write_vectors<E, WITH_ENTROPY, UNROLL>(reinterpret_cast<const uint4*>(row + pieces.head),
                                         reinterpret_cast<uint4*>(out + pieces.head), num_whole, gradient, worker,
                                         num_workers);
  if (mine) out[gradient.column] = Elements<E>::narrow(at_target);
  for (int c = pieces.head + num_whole * WIDTH + worker; c < pieces.tail; c += num_workers)
    out[c] = Elements<E>::narrow(slope_at(c));
}

// The same for a row whose pieces of 16 bytes do not meet those of `out`: one element at a time.
template <Element E, bool WITH_ENTROPY>
__device__ __forceinline__ void write_shifted_row_gradient(const typename Elements<E>::Storage* row,
                                                           typename Elements<E>::Storage* out, int num_columns,
                                                           int num_valid, const RowGradient& gradient, int worker,
                                                           int num_workers) {
  for (int c = worker; c < num_columns; c += num_workers) {
    const float d = c < num_valid ? gradient.template at<WITH_ENTROPY>(Elements<E>::widen(row[c]), c) : 0.0f;
    out[c] = Elements<E>::narrow(d);
  }
}

// Thread `worker` of `num_workers` clears its part of row[0, num_columns).
template <Element E>
__device__ __forceinline__ void clear_row(typename Elements<E>::Storage* row, int num_columns, int worker,
                                          int num_workers) {
  const RowPieces<E> pieces(row, num_columns);
  if (worker < pieces.num_single) row[pieces.single_column(worker)] = Elements<E>::narrow(0.0f);
  uint4* const vectors = reinterpret_cast<uint4*>(row + pieces.head);
  for (int i = worker; i < pieces.num_vectors; i += num_workers) __stcs(vectors + i, make_uint4(0, 0, 0, 0));
}

}  // namespace semion
