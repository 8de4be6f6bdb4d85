// Vectors of 4, 8 or 16 floats for the CPU kernels, whichever the compiler's flags allow, and an exponential on them.
// A kernel's source is compiled once per instruction set, inside namespace semion::SEMION_ISA; dispatch.h picks one at
// run time. Arithmetic is GCC's vector extension; only conversions and maxima name instructions (the masked forms for
// 16 lanes: GCC 12 warns of its own header's others).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define SEMION_ISA avx512
#define SEMION_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SEMION_ISA avx2
#define SEMION_LANES 8
#else
#define SEMION_ISA baseline
#define SEMION_LANES 4
#endif

#include <immintrin.h>

namespace semion {
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace SEMION_ISA {
constexpr int lanes = SEMION_LANES;
typedef float Floats __attribute__((vector_size(4 * SEMION_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * SEMION_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * SEMION_LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * SEMION_LANES)));

inline Floats all(float value) {
  return Floats{} + value;
}

// The larger of each lane; b where either is NaN.
inline Floats larger(Floats a, Floats b) {
#if SEMION_LANES == 16
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif SEMION_LANES == 8
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#endif
}

// The smaller of each lane; b where either is NaN.
inline Floats smaller(Floats a, Floats b) {
#if SEMION_LANES == 16
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif SEMION_LANES == 8
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#endif
}

typedef double Doubles __attribute__((vector_size(4 * SEMION_LANES)));  // half as many
typedef int64_t Longs __attribute__((vector_size(4 * SEMION_LANES)));

// Lane i gets lane i ^ distance. The indices come as constants: GCC would otherwise put them together at run time.
template <int distance, int... i>
inline Floats partners(Floats a, std::integer_sequence<int, i...>) {
  return __builtin_shuffle(a, Ints{(i ^ distance)...});
}
template <int distance, int... i>
inline Doubles partners(Doubles a, std::integer_sequence<int, i...>) {
  return __builtin_shuffle(a, Longs{(i ^ distance)...});
}

template <int distance = lanes / 2>
inline float largest_lane(Floats a) {
  a = larger(a, partners<distance>(a, std::make_integer_sequence<int, lanes>()));
  if constexpr (distance > 1) return largest_lane<distance / 2>(a);
  return a[0];
}

template <int distance = lanes / 4>
inline double sum_lanes(Doubles a) {
  a += partners<distance>(a, std::make_integer_sequence<int, lanes / 2>());
  if constexpr (distance > 1) return sum_lanes<distance / 2>(a);
  return a[0];
}

// The lower half of the lanes in double.
inline Doubles widened_half(Floats a) {
#if SEMION_LANES == 16
  __m256 half;  // GCC 12 warns of its own header's cast
  std::memcpy(&half, &a, sizeof half);
  return (Doubles)_mm512_maskz_cvtps_pd(0xff, half);
#elif SEMION_LANES == 8
  return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)a));
#else
  return (Doubles)_mm_cvtps_pd((__m128)a);
#endif
}

inline double sum_lanes(Floats a) {
  const Floats b = partners<lanes / 2>(a, std::make_integer_sequence<int, lanes>());
  return sum_lanes(widened_half(a) + widened_half(b));
}

inline Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

inline Floats load(const Bf16* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline void store(float* to, Floats value) {
  std::memcpy(to, &value, sizeof value);
}

// Rounds to nearest, ties to even. A NaN stays one: those that arithmetic makes have their low bits clear.
inline void store(Bf16* to, Floats value) {
  const Words bits = (Words)value;
  const Shorts rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Shorts);
  std::memcpy(to, &rounded, sizeof rounded);
}

#if SEMION_LANES == 16
inline Floats load(const Half* from) {
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(Half* to, Floats value) {
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
#elif SEMION_LANES == 8
inline Floats load(const Half* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(Half* to, Floats value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without F16C: the exponent is moved by a multiplication, which also makes half's subnormals normal.
inline Floats load(const Half* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  const Words wide = __builtin_convertvector(bits, Words);
  const Words magnitude = (wide & 0x7fff) << 13;
  const Words scaled = (Words)((Floats)magnitude * 0x1p112f);
  const Words special = (Words)((Ints)magnitude >= 0x7c00 << 13) & 0x7f800000;  // infinity or NaN: all exponent bits
  return (Floats)(scaled | special | (wide & 0x8000) << 16);
}
inline void store(Half* to, Floats value) {
  for (int i = 0; i < lanes; ++i) {
    uint32_t bits = ((Words)value)[i];
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t out;
    if (bits > 0x7f800000) {
      out = 0x7e00;  // NaN
    } else if (bits >= 0x477ff000) {
      out = 0x7c00;  // at least 65520: infinity
    } else if (bits < 0x38800000) {  // subnormal: the addition rounds at half's last place
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      std::memcpy(&out, &magnitude, 4);
      out -= 0x3f000000;
    } else {
      out = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    to[i].bits = static_cast<uint16_t>(sign | out);
  }
}
#endif

// The first `count` < lanes elements; `rest` fills the others.
template <class Element>
inline Floats load_part(const Element* from, int64_t count, Element rest) {
  Element room[lanes];
  for (int i = 0; i < lanes; ++i) room[i] = i < count ? from[i] : rest;
  return load(room);
}

template <class Element>
inline void store_part(Element* to, int64_t count, Floats value) {
  Element room[lanes];
  store(room, value);
  std::memcpy(to, room, static_cast<size_t>(count) * sizeof(Element));
}

inline float widen(const float* from) {
  return *from;
}
inline float widen(const Bf16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(const Half* from) {
  return load_part(from, 1, *from)[0];
}

// 2 * lanes adjacent elements, in an order that is the type's own: store_pair undoes load_pair.
struct Pair {
  Floats a, b;
};

template <class Element>
inline Pair load_pair(const Element* from) {
  return {load(from), load(from + lanes)};
}

template <class Element>
inline void store_pair(Element* to, Pair pair) {
  store(to, pair.a);
  store(to + lanes, pair.b);
}

// A word holds an even and an odd element: no lanes have to be moved about.
inline Pair load_pair(const Bf16* from) {
  Words both;
  std::memcpy(&both, from, sizeof both);
  return {(Floats)(both << 16), (Floats)(both & 0xffff0000)};
}

inline void store_pair(Bf16* to, Pair pair) {
  const Words even = (Words)pair.a, odd = (Words)pair.b;
  const Words low = (even + 0x7fff + ((even >> 16) & 1)) >> 16, high = odd + 0x7fff + ((odd >> 16) & 1);
  const Words both = low | (high & 0xffff0000);
  std::memcpy(to, &both, sizeof both);
}

inline float minus_infinity(const float*) {
  return -INFINITY;
}
inline Bf16 minus_infinity(const Bf16*) {
  return {0xff80};
}
inline Half minus_infinity(const Half*) {
  return {0xfc00};
}

// t = n + r with n the nearest integer. The low bits of `shifted` hold n + 127, the exponent of the float 2^n.
struct Split {
  Floats shifted, n, r;
};
inline Split split(Floats t) {
  const float rounder = 0x1.8p23f + 127;
  const Floats shifted = t + rounder, n = shifted - rounder;
  return {shifted, n, t - n};
}
inline Floats power_of_two(Floats shifted) {
  return (Floats)((Words)shifted << 23);
}

// 2^r on [-1/2, 1/2] within 1.7e-7 of itself; 1 + r q(r) is the minimax polynomial that is exact at 0.
inline Floats small_exp2(Floats r) {
  Floats p = r * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  return p * r + 1.0f;
}

#if SEMION_LANES == 16
// 2^t of any t, NaN for NaN: two instructions do what the split above takes four for, with a remainder in [0, 1), on which
// the polynomial is within 1.5e-7.
inline Floats exp2(Floats t) {
  const Floats r = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats p = r * 0x1.e974fap-10f + 0x1.277856p-7f;
  p = p * r + 0x1.c91ce6p-5f;
  p = p * r + 0x1.ebdb56p-3f;
  p = p * r + 0x1.62e4bap-1f;
  return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)(p * r + 1.0f), (__m512)t);
}
#else
// 2^t for t up to 127: 0 below -126.5, NaN for NaN.
inline Floats exp2(Floats t) {
  const Split at = split(larger(all(-127.0f), t));
  return small_exp2(at.r) * power_of_two(at.shifted);
}
#endif

// e^x of any x: 0 below -87.6, infinity above 88.3, NaN for NaN. ln 2 comes in two parts, the first exact in a product.
inline Floats exp(Floats x) {
  x = smaller(all(89.0f), larger(all(-88.1f), x));
  const Split at = split(x * 0x1.715476p0f);
  const Floats r = (x - at.n * 0x1.62e4p-1f) - at.n * 0x1.7f7d1cp-20f;
  return small_exp2(r * 0x1.715476p0f) * power_of_two(at.shifted);
}

// The natural logarithm within 2e-11; NaN for 0, infinity and NaN. x = 2^k m with m within a factor of sqrt(2) of 1, and
// log m = 2 artanh s = 2 (s + s^3 / 3 + ...) with s = (m - 1) / (m + 1), at most 0.172.
inline Doubles log(Doubles x) {
  typedef uint64_t Bits __attribute__((vector_size(4 * SEMION_LANES)));
  constexpr uint64_t root_half = 0x3fe6a09e667f3bcd, bias = 1023, two_52 = 0x4330000000000000;
  const Bits bits = (Bits)x, biased = (bits - root_half + (bias << 52)) >> 52;
  const Doubles k = (Doubles)(biased | two_52) - (0x1p52 + bias);  // integers below 2^52 without a conversion
  const Doubles m = (Doubles)(bits - ((biased - bias) << 52)), s = (m - 1.0) / (m + 1.0), z = s * s;
  Doubles p = z * (1.0 / 11) + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  p = p * z + 1.0;
  return k * 0.69314718055994531 + 2.0 * s * p + (x - x) / x;
}
}  // namespace SEMION_ISA
}  // namespace semion
