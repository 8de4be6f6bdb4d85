// Elements of a row of logits: bf16, fp16 and fp32 to fp32 and back, one at a time or 16 bytes at a time, and where the
// 16 byte vectors of an arbitrarily placed row lie. It knows nothing of what the elements mean.
#pragma once
#include "../element.h"
#include "launch.h"

namespace semion {

#ifndef SEMION_SIMT  // the simulator has its own
__device__ __forceinline__ uint16_t narrow_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ uint16_t narrow_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ float widen_float16(uint16_t half) { return __half2float(__ushort_as_half(half)); }
__device__ __forceinline__ uint32_t narrow_pair_bfloat16(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t narrow_pair_float16(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
// One instruction (relative error 2^-22, results under 2^-126 become 0); exp2f adds four to keep subnormal results.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// For each element: Storage, the number of elements in 16 bytes, and conversions of one element and of 4 bytes.
template <Element E>
struct Elements;

template <>
struct Elements<Element::bfloat16> {
  using Storage = uint16_t;
  static constexpr int PER_VECTOR = 8;
  static __device__ __forceinline__ float widen(Storage s) { return __uint_as_float(uint32_t(s) << 16); }
  static __device__ __forceinline__ Storage narrow(float x) { return narrow_bfloat16(x); }
  static __device__ __forceinline__ void widen_word(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t narrow_word(const float* x) { return narrow_pair_bfloat16(x[0], x[1]); }
};

template <>
struct Elements<Element::float16> {
  using Storage = uint16_t;
  static constexpr int PER_VECTOR = 8;
  static __device__ __forceinline__ float widen(Storage s) { return widen_float16(s); }
  static __device__ __forceinline__ Storage narrow(float x) { return narrow_float16(x); }
  static __device__ __forceinline__ void widen_word(uint32_t word, float* x) {
    x[0] = widen_float16(uint16_t(word));
    x[1] = widen_float16(uint16_t(word >> 16));
  }
  static __device__ __forceinline__ uint32_t narrow_word(const float* x) { return narrow_pair_float16(x[0], x[1]); }
};

template <>
struct Elements<Element::float32> {
  using Storage = float;
  static constexpr int PER_VECTOR = 4;
  static __device__ __forceinline__ float widen(Storage s) { return s; }
  static __device__ __forceinline__ Storage narrow(float x) { return x; }
  static __device__ __forceinline__ void widen_word(uint32_t word, float* x) { x[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t narrow_word(const float* x) { return float_bits(x[0]); }
};

template <Element E>
__device__ __forceinline__ void widen_vector(const uint4& v, float (&x)[Elements<E>::PER_VECTOR]) {
  constexpr int PER_WORD = Elements<E>::PER_VECTOR / 4;
  Elements<E>::widen_word(v.x, x);
  Elements<E>::widen_word(v.y, x + PER_WORD);
  Elements<E>::widen_word(v.z, x + 2 * PER_WORD);
  Elements<E>::widen_word(v.w, x + 3 * PER_WORD);
}

template <Element E>
__device__ __forceinline__ uint4 narrow_vector(const float (&x)[Elements<E>::PER_VECTOR]) {
  constexpr int PER_WORD = Elements<E>::PER_VECTOR / 4;
  return make_uint4(Elements<E>::narrow_word(x), Elements<E>::narrow_word(x + PER_WORD),
                    Elements<E>::narrow_word(x + 2 * PER_WORD), Elements<E>::narrow_word(x + 3 * PER_WORD));
}

// The columns [0, n) of a row as `head` single elements, `num_vectors` aligned pieces of 16 bytes, and single elements
// from `tail` on. A row may begin at any multiple of its element's size; at most 2 * PER_VECTOR - 2 elements are single.
template <Element E>
struct RowPieces {
  int head, num_vectors, tail, num_single;

  __device__ __forceinline__ RowPieces(const typename Elements<E>::Storage* row, int n) {
    constexpr int WIDTH = Elements<E>::PER_VECTOR;
    const int misplaced = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(*row));
    head = misplaced == 0 ? 0 : WIDTH - misplaced;
    if (head > n) head = n;
    num_vectors = (n - head) / WIDTH;
    tail = head + num_vectors * WIDTH;
    num_single = head + n - tail;
  }
  // The column of single element i in [0, num_single), and the first column of vector i.
  __device__ __forceinline__ int single_column(int i) const { return i < head ? i : tail + i - head; }
  __device__ __forceinline__ int vector_column(int i) const { return head + i * Elements<E>::PER_VECTOR; }
};

}  // namespace semion
