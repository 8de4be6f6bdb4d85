// The gradient of one row of logits on a GPU: the arithmetic and the walk over the row. The caller gives each thread its
// number; there is no barrier and no reduction.
#pragma once
#include "row_sums.h"

namespace semion {

// The gradient at column c is 2^t (a + b t), plus `hit` at the target's column; t as in row_sums.h.
struct RowGradient {
  float reference, rate, a, b, hit;
  int column;  // -1 where another rank has the target

  template <bool WITH_ENTROPY>
  __device__ __forceinline__ float at(float logit, int c) const {
    const float t = (logit - reference) * rate;
    const float slope = WITH_ENTROPY ? fmaf(b, fmaxf(t, vanishing), a) : a;
    return fmaf(exp2_fast(t), slope, c == column ? hit : 0.0f);
  }
};

// Thread `worker` of `num_workers` writes its part of out[0, num_columns): the gradient of the valid columns of `row`, 0
// in the others. `out` may be `row`, and must lie at the same distance from a 16 byte boundary.
template <Element E, bool WITH_ENTROPY, int UNROLL>
__device__ __forceinline__ void write_row_gradient(const typename Elements<E>::Storage* row,
                                                   typename Elements<E>::Storage* out, int num_columns, int num_valid,
                                                   const RowGradient& gradient, int worker, int num_workers) {
  constexpr int WIDTH = Elements<E>::PER_VECTOR;
  const RowPieces<E> pieces(out, num_columns);
  if (worker < pieces.num_single) {
    const int c = pieces.single_column(worker);
    const float d = c < num_valid ? gradient.template at<WITH_ENTROPY>(Elements<E>::widen(row[c]), c) : 0.0f;
    out[c] = Elements<E>::narrow(d);
  }
  const uint4* const from = reinterpret_cast<const uint4*>(row + pieces.head);
  uint4* const to = reinterpret_cast<uint4*>(out + pieces.head);
  for (int first = worker; first < pieces.num_vectors; first += UNROLL * num_workers) {
    uint4 loaded[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int i = first + u * num_workers;
      if (i < pieces.num_vectors) loaded[u] = __ldcs(from + i);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int i = first + u * num_workers;
      if (i >= pieces.num_vectors) break;
      const int c = pieces.vector_column(i);
      float x[WIDTH];
      widen_vector<E>(loaded[u], x);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k)
        x[k] = c + k < num_valid ? gradient.template at<WITH_ENTROPY>(x[k], c + k) : 0.0f;
      __stcs(to + i, narrow_vector<E>(x));
    }
  }
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
