// swiglu.h on the CPU, compiled once per instruction set: every element is read and written once.
#include "swiglu.h"

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
Floats sigmoid(Floats x) {
  return 1.0f / (1.0f + exp(-x));
}

// `work` on whole vectors at (offset), and on the rest of the row through room for one.
template <class E, int inputs, int outputs, class Work>
void each_vector(const E* const (&from)[inputs], E* const (&to)[outputs], int64_t width, Work work) {
  Floats values[inputs], found[outputs];
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    for (int n = 0; n < inputs; ++n) values[n] = load(from[n] + i);
    work(values, found);
    for (int n = 0; n < outputs; ++n) store(to[n] + i, found[n]);
  }
  if (i == width) return;
  for (int n = 0; n < inputs; ++n) values[n] = load_part(from[n] + i, width - i, from[n][i]);
  work(values, found);
  for (int n = 0; n < outputs; ++n) store_part(to[n] + i, width - i, found[n]);
}

template <class E>
void forward_of(const SwigluRows& rows, int64_t begin, int64_t end) {
  const int64_t width = rows.width;
  for (int64_t row = begin; row < end; ++row) {
    const E* x = static_cast<const E*>(rows.x) + row * 2 * width;
    E* const to[1] = {static_cast<E*>(rows.out) + row * width};
    const E* const from[2] = {x, x + width};
    each_vector(from, to, width, [](const Floats(&in)[2], Floats(&out)[1]) { out[0] = in[0] * sigmoid(in[0]) * in[1]; });
  }
}

template <class E>
void backward_of(const SwigluRows& rows, int64_t begin, int64_t end) {
  const int64_t width = rows.width;
  for (int64_t row = begin; row < end; ++row) {
    const E* x = static_cast<const E*>(rows.x) + row * 2 * width;
    E* out = static_cast<E*>(rows.out) + row * 2 * width;
    const E* const from[3] = {x, x + width, static_cast<const E*>(rows.gradient) + row * width};
    E* const to[2] = {out, out + width};
    each_vector(from, to, width, [](const Floats(&in)[3], Floats(&out)[2]) {
      const Floats s = sigmoid(in[0]), silu = in[0] * s;
      out[0] = in[2] * in[1] * (s + silu * (1.0f - s));
      out[1] = in[2] * silu;
    });
  }
}
}  // namespace

void swiglu(const SwigluRows& rows, int64_t begin, int64_t end) {
  switch (rows.element) {
    case Element::float32: return forward_of<float>(rows, begin, end);
    case Element::bfloat16: return forward_of<Bf16>(rows, begin, end);
    case Element::float16: return forward_of<Half>(rows, begin, end);
  }
}

void swiglu_backward(const SwigluRows& rows, int64_t begin, int64_t end) {
  switch (rows.element) {
    case Element::float32: return backward_of<float>(rows, begin, end);
    case Element::bfloat16: return backward_of<Bf16>(rows, begin, end);
    case Element::float16: return backward_of<Half>(rows, begin, end);
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
