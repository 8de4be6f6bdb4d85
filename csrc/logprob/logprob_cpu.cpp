// The vector half of logprob.h, compiled once per instruction set. A row is read once: blocks that fit the first-level
// cache, each reduced to a sum in float lanes, the blocks' sums in double. No row-length memory is taken.
#include "logprob.h"

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int64_t block_size = 2048;
constexpr int64_t prefetch_distance = 1024;  // elements; the processor's own prefetcher stops at every page
constexpr float slack = 8;  // log2 of how far the reference may lie below the largest logit before it moves
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

struct Sums {
  double total, weighted;  // of 2^t and t 2^t
  float largest;           // of x
};

template <class E>
float largest_of(const E* x, int64_t n) {
  Pair found{all(-INFINITY), all(-INFINITY)};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    const Pair pair = load_pair(x + i);
    found = {larger(found.a, pair.a), larger(found.b, pair.b)};
  }
  for (; i + lanes <= n; i += lanes) found.a = larger(found.a, load(x + i));
  if (i < n) found.b = larger(found.b, load_part(x + i, n - i, minus_infinity(x)));
  return largest_lane(larger(found.a, found.b));
}

// One block with t = (x - reference) * scale. Two sums each, for as many more the registers do not suffice.
template <class E, bool with_entropy>
Sums sum_block(const E* x, int64_t n, float reference, float scale) {
  Floats total_a = {}, total_b = {}, weighted_a = {}, weighted_b = {}, largest = all(-INFINITY);
  const auto add = [&](Floats value, Floats& total, Floats& weighted) {
    largest = larger(largest, value);
    const Floats t = larger(all(-127.0f), (value - reference) * scale);
    const Floats e = exp2(t);
    total += e;
    if (with_entropy) weighted += e * t;
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    __builtin_prefetch(x + i + prefetch_distance);
    const Pair pair = load_pair(x + i);
    add(pair.a, total_a, weighted_a);
    add(pair.b, total_b, weighted_b);
  }
  for (; i + lanes <= n; i += lanes) add(load(x + i), total_a, weighted_a);
  if (i < n) add(load_part(x + i, n - i, minus_infinity(x)), total_b, weighted_b);
  return {sum_lanes(total_a + total_b), with_entropy ? sum_lanes(weighted_a + weighted_b) : 0.0, largest_lane(largest)};
}

template <class E, bool with_entropy>
void row_part(const E* x, int64_t n, float scale, float* reference_out, float* total_out, float* weighted_out) {
  float reference = largest_of(x, n < block_size ? n : block_size);
  if (reference < lowest) reference = lowest;
  double total = 0, weighted = 0;
  for (int64_t begin = 0; begin < n; begin += block_size) {
    const int64_t size = n - begin < block_size ? n - begin : block_size;
    Sums sums = sum_block<E, with_entropy>(x + begin, size, reference, scale);
    if ((sums.largest - reference) * scale > slack) {
      const double shift = (static_cast<double>(reference) - sums.largest) * scale, shrink = std::exp2(shift);
      weighted = shrink == 0 ? 0 : shrink * (weighted + total * shift);
      total *= shrink;
      reference = sums.largest;
      sums = sum_block<E, with_entropy>(x + begin, size, reference, scale);
    }
    total += sums.total;
    weighted += sums.weighted;
  }
  *reference_out = reference;
  *total_out = static_cast<float>(total);
  *weighted_out = static_cast<float>(weighted * ln_2);
}

template <class E>
void parts_of(const LogProbInput& in, float* parts, int64_t begin, int64_t end) {
  const float scale = static_cast<float>(log2_e / in.temperature);
  const int64_t num_rows = in.num_rows;
  for (int64_t row = begin; row < end; ++row) {
    float* out = parts + row;
    const int64_t target = in.targets[row];
    if (target == ignored && !in.every_row) {
      out[0] = 0, out[num_rows] = 1, out[2 * num_rows] = 0, out[3 * num_rows] = 0;
      continue;
    }
    const E* x = static_cast<const E*>(in.logits) + row * in.row_stride;
    const auto work = in.every_row ? row_part<E, true> : row_part<E, false>;
    work(x, in.num_valid, scale, out, out + num_rows, out + 2 * num_rows);
    const int64_t column = target - in.vocab_start;
    out[3 * num_rows] = column >= 0 && column < in.num_valid ? widen(x + column) : 0.0f;
  }
}

// out = 2^t (a + b t), which is the gradient but for the target's column.
template <class E, bool with_entropy>
void gradient_row(const E* x, E* out, int64_t n, float reference, float scale, float a, float b) {
  const auto gradient = [&](Floats value) {
    const Floats t = larger(all(-127.0f), (value - reference) * scale);
    return exp2(t) * (with_entropy ? b * t + a : all(a));
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    __builtin_prefetch(x + i + prefetch_distance, 1);
    const Pair pair = load_pair(x + i);
    store_pair(out + i, {gradient(pair.a), gradient(pair.b)});
  }
  for (; i + lanes <= n; i += lanes) store(out + i, gradient(load(x + i)));
  if (i < n) store_part(out + i, n - i, gradient(load_part(x + i, n - i, minus_infinity(x))));
}

template <class E>
void backward_of(const LogProbInput& in, const LogProbGradient& gradient, int64_t begin, int64_t end) {
  const float scale = static_cast<float>(log2_e / in.temperature);
  for (int64_t row = begin; row < end; ++row) {
    const E* x = static_cast<const E*>(in.logits) + row * in.row_stride;
    E* out = static_cast<E*>(gradient.out) + row * gradient.row_stride;
    const int64_t target = in.targets[row], column = target - in.vocab_start;
    const double g = target == ignored ? 0.0 : gradient.grad_log_prob[row] / in.temperature;
    const double h = gradient.grad_entropy == nullptr ? 0.0 : gradient.grad_entropy[row] / in.temperature;
    if (g == 0 && h == 0) {
      std::memset(out, 0, static_cast<size_t>(in.num_columns) * sizeof(E));
      continue;
    }
    const float reference = gradient.totals[row];
    const double total = gradient.totals[in.num_rows + row], mean = gradient.totals[2 * in.num_rows + row];
    const double a = (h == 0 ? -g : h * mean - g) / total, b = -h * ln_2 / total;
    const bool mine = column >= 0 && column < in.num_valid;
    const double t = mine ? (static_cast<double>(widen(x + column)) - reference) * scale : 0.0;  // before the row is overwritten
    const auto work = h == 0 ? gradient_row<E, false> : gradient_row<E, true>;
    work(x, out, in.num_valid, reference, scale, static_cast<float>(a), static_cast<float>(b));
    if (mine) {
      const double e = std::exp2(t);
      store_part(out + column, 1, all(static_cast<float>(g + (e > 0 ? e * (a + b * t) : 0))));
    }
    std::memset(out + in.num_valid, 0, static_cast<size_t>(in.num_columns - in.num_valid) * sizeof(E));
  }
}
}  // namespace

void log_prob_parts(const LogProbInput& in, float* parts, int64_t begin, int64_t end) {
  switch (in.element) {
    case Element::float32: return parts_of<float>(in, parts, begin, end);
    case Element::bfloat16: return parts_of<Bf16>(in, parts, begin, end);
    case Element::float16: return parts_of<Half>(in, parts, begin, end);
  }
}

void log_prob_backward(const LogProbInput& in, const LogProbGradient& gradient, int64_t begin, int64_t end) {
  switch (in.element) {
    case Element::float32: return backward_of<float>(in, gradient, begin, end);
    case Element::bfloat16: return backward_of<Bf16>(in, gradient, begin, end);
    case Element::float16: return backward_of<Half>(in, gradient, begin, end);
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
