// Rows of logits and their gradient in plain types, for the kernels of both devices; pointers are the device's own.
// T rows. A rank's part of a row is four floats: a reference m no less than 2^-8 of the largest logit times the
// temperature, sum of e^d, sum of d e^d, and the target's logit where this rank holds it; d = (x - m) / temperature.
#pragma once

#include "../element.h"

namespace semion {
constexpr int64_t ignored = -100;
constexpr float lowest = -0x1.fffffep127f;  // the reference of a row without any logit: -inf would make differences NaN

struct LogProbRows {
  const void* logits;      // [T, num_columns], unit column stride
  int64_t row_stride;      // in elements
  const int64_t* targets;  // [T], `ignored` or an index of the whole vocabulary
  int64_t num_rows;
  int64_t vocab_start;     // index of this rank's first column
  int64_t lowest_id, end_id;  // the indices that a target may have
  double temperature;
  Element element;
  int32_t num_columns;     // of this rank, padding included
  int32_t num_valid;       // of this rank: the columns beyond are padding
  int32_t every_row;       // also those whose target is ignored: their entropy is asked for
};

struct LogProbGradient {
  const float* totals;         // [3, T]: reference, sum of e^d, mean of d, of all ranks together
  const float* grad_log_prob;  // [T]
  const float* grad_entropy;   // [T] or null
  void* out;                   // [T, num_columns], may be the logits
  int64_t row_stride;          // of out
};
}  // namespace semion
