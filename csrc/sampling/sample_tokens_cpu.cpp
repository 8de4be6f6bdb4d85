// sample_tokens.h on the CPU, compiled once per instruction set. A row is read three times, the last two from the cache: its
// largest logit, its exponentials, its rank. Exponentials are summed by blocks, each in float lanes, and the blocks in double;
// then the block is sought in which the uniform number falls, and in it, computed once more, the token.
#include "sample_tokens.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../splitmix64.h"
#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int64_t block_size = 512;
constexpr float log2_e = 1.442695041f;
constexpr float lowest = -0x1.fffffep127f;  // the largest logit of a row without any: -inf would make differences NaN

// 53 bits in [0, 1). Its product with any sum of doubles is rounded to less than the sum.
double uniform(int64_t seed) {
  return static_cast<double>(splitmix64(static_cast<uint64_t>(seed)) >> 11) * 0x1p-53;
}

template <class E>
Floats at(const E* x, int64_t i, int64_t end) {
  return i + lanes <= end ? load(x + i) : load_part(x + i, end - i, minus_infinity(x));
}

// A row's logits divided by its temperature, rounded as by a division before: vLLM's order, so that it makes no difference
// which of the two divides.
template <class E>
struct Scaled {
  const E* x;
  float temperature, largest;  // largest of the quotients

  Floats quotients(int64_t i, int64_t end) const {
    const Floats value = at(x, i, end);
    return temperature == 1.0f ? value : value / temperature;
  }
  Floats weights(int64_t i, int64_t end) const {
    return exp2((quotients(i, end) - largest) * log2_e);
  }
  // Of the weights; sums[block] is that of all blocks up to it.
  double total(int64_t width, double* sums) const {
    double total = 0;
    for (int64_t begin = 0; begin < width; begin += block_size) {
      const int64_t end = std::min(width, begin + block_size);
      Floats a{}, b{};
      int64_t i = begin;
      for (; i + lanes < end; i += 2 * lanes) {
        a += weights(i, end);
        b += weights(i + lanes, end);
      }
      if (i < end) a += weights(i, end);
      sums[begin / block_size] = total += sum_lanes(a + b);
    }
    return total;
  }
  double quotient_of(int64_t token) const {
    return static_cast<double>(widen(x + token) / temperature);
  }
};

template <class E>
float largest_of(const E* x, int64_t n) {
  Floats a = all(-INFINITY), b = a;
  int64_t i = 0;
  for (; i + lanes < n; i += 2 * lanes) {
    a = larger(a, at(x, i, n));
    b = larger(b, at(x, i + lanes, n));
  }
  if (i < n) a = larger(a, at(x, i, n));
  return std::max(lowest, largest_lane(larger(a, b)));
}

template <class E>
int64_t rank_of(const E* x, int64_t n, float value) {
  Ints count{};
  for (int64_t i = 0; i < n; i += lanes) count -= at(x, i, n) >= value;
  int64_t rank = 0;
  for (int lane = 0; lane < lanes; ++lane) rank += count[lane];
  return rank;
}

// The first token whose cumulative sum exceeds the target, where `before` is the sum before the block. Rounding may leave that
// sum below the target: then the last token with a weight. A weight of 0 raises no sum, so it is never found.
template <class E>
int64_t token_in(const Scaled<E>& row, int64_t begin, int64_t end, double before, double target) {
  float weights[block_size + lanes];
  for (int64_t i = begin; i < end; i += lanes) store(weights + (i - begin), row.weights(i, end));
  int64_t last = begin;
  for (int64_t i = begin; i < end; ++i) {
    const float weight = weights[i - begin];
    before += static_cast<double>(weight);
    if (before > target) return i;
    if (weight > 0) last = i;
  }
  return last;
}

template <class E>
void samples_of(const SampleRows& rows, const Samples& out, int64_t begin, int64_t end) {
  const int64_t width = rows.width, num_blocks = (width + block_size - 1) / block_size;
  std::vector<double> room(static_cast<size_t>(num_blocks));
  double* sums = room.data();
  for (int64_t n = begin; n < end; ++n) {
    const E* x = static_cast<const E*>(rows.logits) + n * rows.row_stride;
    const float temperature = rows.temperatures[n], largest = largest_of(x, width);
    const Scaled<E> row{x, temperature, std::max(lowest, largest / temperature)};
    const double total = row.total(width, sums);
    if (!(total > 0)) {  // NaN too
      out.tokens[n] = 0, out.log_probs[n] = NAN, out.ranks[n] = 0;
      continue;
    }
    const double target = uniform(rows.seeds[n]) * total;
    int64_t block = 0;
    while (sums[block] <= target) ++block;  // it ends: the last of them is the total
    const int64_t first = block * block_size;
    const int64_t token = token_in(row, first, std::min(width, first + block_size), block == 0 ? 0 : sums[block - 1], target);
    double log_prob = row.quotient_of(token) - static_cast<double>(row.largest) - std::log(total);
    if (rows.raw && temperature != 1.0f) {
      const Scaled<E> plain{x, 1.0f, largest};
      log_prob = plain.quotient_of(token) - static_cast<double>(largest) - std::log(plain.total(width, sums));
    }
    out.tokens[n] = token;
    out.log_probs[n] = static_cast<float>(log_prob);
    out.ranks[n] = rank_of(x, width, widen(x + token));
  }
}
}  // namespace

void sample_tokens(const SampleRows& rows, const Samples& out, int64_t begin, int64_t end) {
  switch (rows.element) {
    case Element::float32: return samples_of<float>(rows, out, begin, end);
    case Element::bfloat16: return samples_of<Bf16>(rows, out, begin, end);
    case Element::float16: return samples_of<Half>(rows, out, begin, end);
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
