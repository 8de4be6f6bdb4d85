// rms_norm.h on the CPU, compiled once per instruction set: a row is read twice, the second time from the cache.
#include "rms_norm.h"

#include <algorithm>
#include <cmath>

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
// Whole vectors of a row, and the rest of it as one whose other lanes are 0.
template <class E>
Floats at(const E* row, int64_t i, int64_t width) {
  return i + lanes <= width ? load(row + i) : load_part(row + i, width - i, E{});
}

template <class E>
void put(E* row, int64_t i, int64_t width, Floats value) {
  if (i + lanes <= width)
    store(row + i, value);
  else
    store_part(row + i, width - i, value);
}

template <class E>
void forward_of(const NormRows& rows, E* out, float* scales, int64_t begin, int64_t end) {
  const int64_t width = rows.width;
  const E* weight = static_cast<const E*>(rows.weight);
  for (int64_t row = begin; row < end; ++row) {
    const E* x = static_cast<const E*>(rows.x) + row * width;
    Floats squares{};
    for (int64_t i = 0; i < width; i += lanes) {
      const Floats part = at(x, i, width);
      squares += part * part;
    }
    const double mean = sum_lanes(squares) / static_cast<double>(width);
    const float scale = static_cast<float>(1.0 / std::sqrt(mean + rows.epsilon));
    scales[row] = scale;
    E* to = out + row * width;
    for (int64_t i = 0; i < width; i += lanes) put(to, i, width, at(x, i, width) * scale * at(weight, i, width));
  }
}

// With n = x * scale: of x it is scale * (g w - n mean(g w n)), of w the sum of g n over rows.
template <class E>
void backward_of(const NormRows& rows, const NormGradient& back, int64_t begin, int64_t end) {
  const int64_t width = rows.width;
  const E* weight = static_cast<const E*>(rows.weight);
  for (int64_t block = begin; block < end; ++block) {
    float* part = back.parts + block * width;
    std::fill(part, part + width, 0.0f);
    const int64_t last = std::min(rows.num_rows, (block + 1) * norm_block);
    for (int64_t row = block * norm_block; row < last; ++row) {
      const E* x = static_cast<const E*>(rows.x) + row * width;
      const E* gradient = static_cast<const E*>(back.gradient) + row * width;
      const float scale = back.scales[row];
      Floats products{};
      for (int64_t i = 0; i < width; i += lanes) {
        const Floats slope = at(gradient, i, width), normed = at(x, i, width) * scale;
        products += slope * at(weight, i, width) * normed;
        put(part, i, width, at(part, i, width) + slope * normed);
      }
      const float mean = static_cast<float>(sum_lanes(products) / static_cast<double>(width));
      E* to = static_cast<E*>(back.of_x) + row * width;
      for (int64_t i = 0; i < width; i += lanes) {
        const Floats normed = at(x, i, width) * scale;
        put(to, i, width, scale * (at(gradient, i, width) * at(weight, i, width) - normed * mean));
      }
    }
  }
}

template <class E>
void weight_of(const float* parts, int64_t count, int64_t width, E* out) {
  for (int64_t i = 0; i < width; i += lanes) {
    Floats sum{};
    for (int64_t block = 0; block < count; ++block) sum += at(parts + block * width, i, width);
    put(out, i, width, sum);
  }
}
}  // namespace

void rms_norm(const NormRows& rows, void* out, float* scales, int64_t begin, int64_t end) {
  switch (rows.element) {
    case Element::float32: return forward_of(rows, static_cast<float*>(out), scales, begin, end);
    case Element::bfloat16: return forward_of(rows, static_cast<Bf16*>(out), scales, begin, end);
    case Element::float16: return forward_of(rows, static_cast<Half*>(out), scales, begin, end);
  }
}

void rms_norm_backward(const NormRows& rows, const NormGradient& back, int64_t begin, int64_t end) {
  switch (rows.element) {
    case Element::float32: return backward_of<float>(rows, back, begin, end);
    case Element::bfloat16: return backward_of<Bf16>(rows, back, begin, end);
    case Element::float16: return backward_of<Half>(rows, back, begin, end);
  }
}

void rms_norm_weight(const float* parts, int64_t count, int64_t width, Element element, void* out) {
  switch (element) {
    case Element::float32: return weight_of(parts, count, width, static_cast<float*>(out));
    case Element::bfloat16: return weight_of(parts, count, width, static_cast<Bf16*>(out));
    case Element::float16: return weight_of(parts, count, width, static_cast<Half*>(out));
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
