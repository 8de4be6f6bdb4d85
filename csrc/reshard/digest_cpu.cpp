// The vector kernel of digest.h, compiled once per instruction set. A 64 bit product is put together of 32 bit ones, for
// which every instruction set has a multiplication: v * w = v * low(w) + 2^32 (v * high(w)), and the powers of 2^32 are
// summed apart. A few rows go together, so that a column's weight is loaded once for them all.
#include "digest.h"

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int words = lanes / 2;  // 64 bit words of a vector
constexpr int together = 4;       // rows
constexpr int64_t tile = 4096;    // columns whose weights stay in the caches while the rows go by
typedef uint64_t Longs __attribute__((vector_size(8 * (SEMION_LANES / 2))));

// Products of the low halves of each word.
Longs product_of_low(Longs a, Longs b) {
#if SEMION_LANES == 16
  return (Longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif SEMION_LANES == 8
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

// Adjacent elements, one a word.
template <class Element>
Longs load_words(const Element* from) {
  typedef Element Narrow __attribute__((vector_size(sizeof(Element) * (SEMION_LANES / 2))));
  Narrow bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, Longs);
}

// GCC 12 widens these in detours, the narrow ones one element at a time, unless it is told the instruction.
#if SEMION_LANES == 16
Longs load_words(const uint32_t* from) {
  return (Longs)_mm512_maskz_cvtepu32_epi64(0xff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
Longs load_words(const uint16_t* from) {
  return (Longs)_mm512_maskz_cvtepu16_epi64(0xff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
Longs load_words(const uint8_t* from) {
  return (Longs)_mm512_maskz_cvtepu8_epi64(0xff, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
#elif SEMION_LANES == 8
Longs load_words(const uint32_t* from) {
  return (Longs)_mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
Longs load_words(const uint16_t* from) {
  return (Longs)_mm256_cvtepu16_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
Longs load_words(const uint8_t* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Longs)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bits));
}
#endif

uint64_t sum_words(Longs a) {
  uint64_t sum = 0;
  for (int i = 0; i < words; ++i) sum += a[i];
  return sum;
}

// sums[k] += the weighted sum of row k, for `num_rows` rows of n elements.
template <class Element, int num_rows>
void add_rows(const Element* block, int64_t stride, const uint64_t* columns, int64_t n, uint64_t* sums) {
  Longs low[num_rows] = {}, high[num_rows] = {};
  int64_t c = 0;
  for (; c + words <= n; c += words) {
    const Longs weight = load_words(columns + c), upper = weight >> 32;
    for (int k = 0; k < num_rows; ++k) {
      const Longs v = load_words(block + k * stride + c);
      low[k] += product_of_low(v, weight);
      high[k] += product_of_low(v, upper);
      if (sizeof(Element) == 8) high[k] += product_of_low(v >> 32, weight);
    }
  }
  for (int k = 0; k < num_rows; ++k) {
    sums[k] += sum_words(low[k]) + (sum_words(high[k]) << 32);
    for (int64_t i = c; i < n; ++i) sums[k] += columns[i] * block[k * stride + i];
  }
}

template <class Element>
uint64_t digest_of(const DigestInput& in, int64_t begin, int64_t end) {
  uint64_t total = 0;
  for (int64_t first = 0; first < in.num_columns; first += tile) {
    const int64_t n = in.num_columns - first < tile ? in.num_columns - first : tile;
    for (int64_t row = begin; row < end;) {
      const Element* block = static_cast<const Element*>(in.block) + row * in.row_stride + first;
      uint64_t sums[together] = {};
      const int num_rows = end - row < together ? 1 : together;
      const auto add = num_rows == 1 ? add_rows<Element, 1> : add_rows<Element, together>;
      add(block, in.row_stride, in.columns + first, n, sums);
      for (int k = 0; k < num_rows; ++k) total += row_weight(in.seed, in.row + row++) * sums[k];
    }
  }
  return total;
}
}  // namespace

uint64_t block_digest(const DigestInput& in, int64_t begin, int64_t end) {
  switch (in.element_size) {
    case 1: return digest_of<uint8_t>(in, begin, end);
    case 2: return digest_of<uint16_t>(in, begin, end);
    case 4: return digest_of<uint32_t>(in, begin, end);
    default: return digest_of<uint64_t>(in, begin, end);
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
