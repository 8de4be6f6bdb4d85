// The vector half of logprob.h, compiled once per instruction set. A row is read once: blocks that fit the first-level
// cache, each reduced to a sum in float lanes, the blocks' sums in double. No row-length memory is taken. What a short row
// costs beside its elements is the way across the lanes and back: several rows' references are sought together, so that
// the processor does not wait for each.
#include "logprob.h"

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int64_t block_size = 2048;
constexpr int64_t prefetch_distance = 1024;  // elements; the processor's own prefetcher stops at every page
constexpr int64_t group_size = 4096;         // elements of the short rows that go together, most_rows of them at most
constexpr int64_t most_rows = 8;
constexpr float slack = 8;  // log2 of how far the reference may lie below the largest logit before it moves
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

struct Sums {
  Floats total, weighted;  // of 2^t and t 2^t
  Floats largest;          // of x, where asked for
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

// An exponent whose product with 2^t = 0 is 0, where t may be -infinity; a NaN stays one.
Floats finite(Floats t) {
  return larger(all(-127.0f), t);
}

// The reference that a row begins with: the largest logit of its first block.
template <class E>
float first_reference(const E* x, int64_t n) {
  const float largest = largest_of(x, n < block_size ? n : block_size);
  return largest < lowest ? lowest : largest;
}

// Asks for what two vectors of elements at `from` cover, not to be waited for.
template <class E>
void ask_for(const E* from) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (size_t line = 0; line < 2 * lanes * sizeof(E); line += 64) __builtin_prefetch(bytes + line);
}

// One block with t = (x - reference) * scale; what lies `ahead` elements on is asked for meanwhile. Two sums each: for more
// the registers do not suffice.
template <class E, bool with_entropy, bool with_largest>
Sums sum_block(const E* x, int64_t n, float reference, float scale, int64_t ahead) {
  Floats total_a = {}, total_b = {}, weighted_a = {}, weighted_b = {}, largest = all(-INFINITY);
  const auto add = [&](Floats value, Floats& total, Floats& weighted) {
    if (with_largest) largest = larger(largest, value);
    const Floats t = (value - reference) * scale, e = exp2(t);
    total += e;
    if (with_entropy) weighted += e * finite(t);
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    ask_for(x + i + ahead);
    const Pair pair = load_pair(x + i);
    add(pair.a, total_a, weighted_a);
    add(pair.b, total_b, weighted_b);
  }
  for (; i + lanes <= n; i += lanes) add(load(x + i), total_a, weighted_a);
  if (i < n) add(load_part(x + i, n - i, minus_infinity(x)), total_b, weighted_b);
  return {total_a + total_b, weighted_a + weighted_b, largest};
}

template <class E, bool with_entropy>
void row_part(const E* x, int64_t n, float reference, float scale, int64_t ahead, float* out, int64_t num_rows) {
  const Sums first = sum_block<E, with_entropy, false>(x, n < block_size ? n : block_size, reference, scale, ahead);
  double total = sum_lanes(first.total), weighted = with_entropy ? sum_lanes(first.weighted) : 0;
  for (int64_t begin = block_size; begin < n; begin += block_size) {
    const int64_t size = n - begin < block_size ? n - begin : block_size;
    Sums sums = sum_block<E, with_entropy, true>(x + begin, size, reference, scale, ahead);
    const float largest = largest_lane(sums.largest);
    if ((largest - reference) * scale > slack) {
      const double shift = (static_cast<double>(reference) - largest) * scale, shrink = std::exp2(shift);
      weighted = shrink == 0 ? 0 : shrink * (weighted + total * shift);
      total *= shrink;
      reference = largest;
      sums = sum_block<E, with_entropy, false>(x + begin, size, reference, scale, ahead);
    }
    total += sum_lanes(sums.total);
    if (with_entropy) weighted += sum_lanes(sums.weighted);
  }
  out[0] = reference;
  out[num_rows] = static_cast<float>(total);
  out[2 * num_rows] = static_cast<float>(weighted * ln_2);
}

template <class E>
void parts_of(const LogProbRows& in, float* parts, int64_t begin, int64_t end) {
  const float scale = static_cast<float>(log2_e / in.temperature);
  const int64_t num_rows = in.num_rows;
  const auto work = in.every_row ? row_part<E, true> : row_part<E, false>;
  const auto skipped = [&](int64_t row) { return in.targets[row] == ignored && !in.every_row; };
  const auto row_of = [&](int64_t row) { return static_cast<const E*>(in.logits) + row * in.row_stride; };
  const bool is_short = in.num_valid <= block_size;
  const int64_t fitting = in.num_valid > 0 ? group_size / in.num_valid : most_rows;
  const int64_t together = !is_short ? 1 : fitting < most_rows ? fitting : most_rows;
  const int64_t ahead = is_short ? together * in.row_stride : prefetch_distance;  // the same place of the next group
  for (int64_t first = begin; first < end; first += together) {
    const int64_t stop = end - first < together ? end : first + together;
    float references[most_rows];
    for (int64_t row = first; row < stop; ++row)
      references[row - first] = skipped(row) ? 0 : first_reference(row_of(row), in.num_valid);
    for (int64_t row = first; row < stop; ++row) {
      float* out = parts + row;
      if (skipped(row)) {
        out[0] = 0, out[num_rows] = 1, out[2 * num_rows] = 0, out[3 * num_rows] = 0;
        continue;
      }
      work(row_of(row), in.num_valid, references[row - first], scale, ahead, out, num_rows);
      const int64_t column = in.targets[row] - in.vocab_start;
      out[3 * num_rows] = column >= 0 && column < in.num_valid ? widen(row_of(row) + column) : 0.0f;
    }
  }
}

// out = 2^t (a + b t), which is the gradient but for the target's column.
template <class E, bool with_entropy>
void gradient_row(const E* x, E* out, int64_t n, float reference, float scale, float a, float b) {
  const auto gradient = [&](Floats value) {
    const Floats t = (value - reference) * scale;
    return exp2(t) * (with_entropy ? b * finite(t) + a : all(a));
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    ask_for(x + i + prefetch_distance);
    const Pair pair = load_pair(x + i);
    store_pair(out + i, {gradient(pair.a), gradient(pair.b)});
  }
  for (; i + lanes <= n; i += lanes) store(out + i, gradient(load(x + i)));
  if (i < n) store_part(out + i, n - i, gradient(load_part(x + i, n - i, minus_infinity(x))));
}

template <class E>
void backward_of(const LogProbRows& in, const LogProbGradient& gradient, int64_t begin, int64_t end) {
  const double inverse = 1 / in.temperature;
  const float scale = static_cast<float>(log2_e / in.temperature);
  for (int64_t row = begin; row < end; ++row) {
    const E* x = static_cast<const E*>(in.logits) + row * in.row_stride;
    E* out = static_cast<E*>(gradient.out) + row * gradient.row_stride;
    const int64_t target = in.targets[row], column = target - in.vocab_start;
    const double g = target == ignored ? 0.0 : gradient.grad_log_prob[row] * inverse;
    const double h = gradient.grad_entropy == nullptr ? 0.0 : gradient.grad_entropy[row] * inverse;
    if (g == 0 && h == 0) {
      std::memset(out, 0, static_cast<size_t>(in.num_columns) * sizeof(E));
      continue;
    }
    const float reference = gradient.totals[row];
    const double total = gradient.totals[in.num_rows + row], mean = gradient.totals[2 * in.num_rows + row];
    const double per_total = 1 / total, a = (h == 0 ? -g : h * mean - g) * per_total, b = -h * ln_2 * per_total;
    const bool mine = column >= 0 && column < in.num_valid;
    const float logit = mine ? widen(x + column) : reference;  // before the row is overwritten
    const auto work = h == 0 ? gradient_row<E, false> : gradient_row<E, true>;
    work(x, out, in.num_valid, reference, scale, static_cast<float>(a), static_cast<float>(b));
    if (mine) {
      const Floats t = all((logit - reference) * scale);
      const Floats slope = finite(t) * static_cast<float>(b) + static_cast<float>(a);
      store_part(out + column, 1, exp2(t) * slope + static_cast<float>(g));
    }
    if (in.num_valid < in.num_columns)
      std::memset(out + in.num_valid, 0, static_cast<size_t>(in.num_columns - in.num_valid) * sizeof(E));
  }
}
}  // namespace

void log_prob_parts(const LogProbRows& in, float* parts, int64_t begin, int64_t end) {
  switch (in.element) {
    case Element::float32: return parts_of<float>(in, parts, begin, end);
    case Element::bfloat16: return parts_of<Bf16>(in, parts, begin, end);
    case Element::float16: return parts_of<Half>(in, parts, begin, end);
  }
}

void log_prob_backward(const LogProbRows& in, const LogProbGradient& gradient, int64_t begin, int64_t end) {
  switch (in.element) {
    case Element::float32: return backward_of<float>(in, gradient, begin, end);
    case Element::bfloat16: return backward_of<Bf16>(in, gradient, begin, end);
    case Element::float16: return backward_of<Half>(in, gradient, begin, end);
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
