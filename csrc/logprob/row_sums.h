// What one read of a row of logits leaves behind on a GPU: a reference (the largest logit so far), the sum of 2^t and,
// for the entropy, of t 2^t, where t = (logit - reference) * rate and rate = log2(e) / temperature. Shares of a row join
// in an order that the shape alone fixes, so results repeat bit for bit. A NaN stays one. It reads no logits.
#pragma once
#include "../cuda/elements.h"
#include "rows.h"

namespace semion {

constexpr float vanishing = -150.0f;        // 2^vanishing is 0, and its product with 0 is no NaN as that of -inf is
constexpr float log2_e = 1.442695041f, ln_2 = 0.6931471806f;

struct RowSums {
  float reference = lowest;
  float total = 0.0f;
  float weighted = 0.0f;  // stays 0 without the entropy

  template <bool WITH_ENTROPY>
  __device__ __forceinline__ void raise(float new_reference, float rate) {
    const float t = (reference - new_reference) * rate, shrink = exp2_fast(t);
    if (WITH_ENTROPY) weighted = shrink * fmaf(total, fmaxf(t, vanishing), weighted);
    total *= shrink;
    reference = new_reference;
  }

  template <bool WITH_ENTROPY, int N>
  __device__ __forceinline__ void add(const float (&x)[N], float rate) {
    float largest[N];
#pragma unroll
    for (int i = 0; i < N; ++i) largest[i] = x[i];
#pragma unroll
    for (int width = N / 2; width > 0; width /= 2)
#pragma unroll
      for (int i = 0; i < width; ++i) largest[i] = fmaxf(largest[i], largest[i + width]);
    if (largest[0] > reference) raise<WITH_ENTROPY>(largest[0], rate);
    // The difference before the product: near the reference it is exact, and its rounding shrinks with the weight.
    float sum[2] = {0.0f, 0.0f}, moment[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float t = (x[i] - reference) * rate, weight = exp2_fast(t);
      sum[i % 2] += weight;
      if (WITH_ENTROPY) moment[i % 2] = fmaf(weight, fmaxf(t, vanishing), moment[i % 2]);
    }
    total += sum[0] + sum[1];
    if (WITH_ENTROPY) weighted += moment[0] + moment[1];
  }

  template <bool WITH_ENTROPY>
  __device__ __forceinline__ void join(RowSums other, float rate) {
    const float both = fmaxf(reference, other.reference);
    raise<WITH_ENTROPY>(both, rate);
    other.raise<WITH_ENTROPY>(both, rate);
    total += other.total;
    if (WITH_ENTROPY) weighted += other.weighted;
  }
};

template <bool WITH_ENTROPY>
__device__ __forceinline__ void join_warp(RowSums& mine, float rate) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    RowSums other;
    other.reference = __shfl_xor_sync(0xffffffffu, mine.reference, mask);
    other.total = __shfl_xor_sync(0xffffffffu, mine.total, mask);
    if (WITH_ENTROPY) other.weighted = __shfl_xor_sync(0xffffffffu, mine.weighted, mask);
    mine.join<WITH_ENTROPY>(other, rate);
  }
}

// Joins the sums of a block's threads; thread 0 has the result. The whole block must call it, at most once.
template <bool WITH_ENTROPY, int BLOCK>
__device__ __forceinline__ RowSums join_block(RowSums mine, float rate) {
  __shared__ float shared[3][BLOCK / 32];
  const int thread = threadIdx.x;
  join_warp<WITH_ENTROPY>(mine, rate);
  if (thread % 32 == 0) {
    shared[0][thread / 32] = mine.reference;
    shared[1][thread / 32] = mine.total;
    if (WITH_ENTROPY) shared[2][thread / 32] = mine.weighted;
  }
  __syncthreads();
  if (thread >= 32) return mine;
  mine = RowSums();
  if (thread < BLOCK / 32) {
    mine.reference = shared[0][thread];
    mine.total = shared[1][thread];
    if (WITH_ENTROPY) mine.weighted = shared[2][thread];
  }
  join_warp<WITH_ENTROPY>(mine, rate);
  return mine;
}

}  // namespace semion
