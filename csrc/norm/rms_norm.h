// RMSNorm: x * w / sqrt(mean(x^2) + epsilon) for rows x [T, H] and a weight w [H], and its gradients. Arithmetic is in float32,
// whatever the rows' type; a result is rounded once.
#pragma once

#include <cstdint>

#include "../dispatch.h"
#include "../element.h"

namespace semion {
// Rows whose part of the weight's gradient is summed by itself: the sums are the same by any number of threads.
constexpr int64_t norm_block = 64;

struct NormRows {
  const void* x;       // [T, H], contiguous
  const void* weight;  // [H]
  int64_t num_rows;    // T
  int64_t width;       // H
  double epsilon;
  Element element;
};

struct NormGradient {
  const void* gradient;  // [T, H] of the result
  const float* scales;   // [T]: what the forward divided by, inverted
  void* of_x;            // [T, H]
  float* parts;          // [ceil(T / norm_block), H]: of the weight, by blocks of rows
};
}  // namespace semion

// Rows [begin, end): the result, and each row's scale 1 / sqrt(mean(x^2) + epsilon).
SEMION_DECLARE(void, rms_norm, const NormRows& rows, void* out, float* scales, int64_t begin, int64_t end)
// Blocks [begin, end) of rows.
SEMION_DECLARE(void, rms_norm_backward, const NormRows& rows, const NormGradient& back, int64_t begin, int64_t end)
// out [H] of the rows' type: the sum of `count` parts, in their order.
SEMION_DECLARE(void, rms_norm_weight, const float* parts, int64_t count, int64_t width, Element element, void* out)
