// SwiGLU: silu(x[:, :F]) * x[:, F:] for rows x [T, 2 F], and its gradient.
#pragma once

#include <cstdint>

#include "../dispatch.h"
#include "../element.h"

namespace semion {
struct SwigluRows {
  const void* x;         // [T, 2 F], contiguous
  const void* gradient;  // [T, F] of the result, or null in a forward
  void* out;             // [T, F], or in a backward [T, 2 F]
  int64_t width;         // F
  Element element;
};
}  // namespace semion

SEMION_DECLARE(void, swiglu, const SwigluRows& rows, int64_t begin, int64_t end)
SEMION_DECLARE(void, swiglu_backward, const SwigluRows& rows, int64_t begin, int64_t end)
