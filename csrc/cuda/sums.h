// Sums over the threads of a warp or a block in an order that never changes, in double (or in integers of 64 bits, modulo
// 2^64). The caller decides what is added.
#pragma once
#include "launch.h"

namespace semion {

// Every lane gets the warp's sum.
template <class Value>
__device__ __forceinline__ Value warp_sum(Value value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// Thread 0 gets the block's sums of N values. The whole block must call it, at most once.
template <int BLOCK, int N>
__device__ __forceinline__ void block_sums(double (&values)[N]) {
  __shared__ double shared[N][BLOCK / 32];
  const int thread = threadIdx.x;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    values[k] = warp_sum(values[k]);
    if (thread % 32 == 0) shared[k][thread / 32] = values[k];
  }
  __syncthreads();
  if (thread != 0) return;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    values[k] = 0.0;
    for (int warp = 0; warp < BLOCK / 32; ++warp) values[k] += shared[k][warp];
  }
}

// The tokens of a sequence by cu_seqlens [B + 1], held within [0, num_tokens) whatever cu_seqlens says: its contents are
// on the GPU, and looking at them before a launch would make the CPU wait.
struct Span {
  int begin, end;

  __device__ __forceinline__ Span(const int32_t* cu_seqlens, int sequence, int num_tokens)
      : begin(cu_seqlens[sequence]), end(cu_seqlens[sequence + 1]) {
    if (begin < 0) begin = 0;
    if (end > num_tokens) end = num_tokens;
  }
};

}  // namespace semion
