// A token drawn from the softmax of each row of logits [T, V], by the inverse of its cumulative sum, with the token's log-prob
// and its rank. A row's token is a function of that row, its temperature and its seed alone.
#pragma once

#include <cstdint>

#include "../dispatch.h"
#include "../element.h"

namespace semion {
struct SampleRows {
  const void* logits;         // [T, V], unit column stride
  int64_t row_stride;         // in elements
  const float* temperatures;  // [T], greater than 0
  const int64_t* seeds;       // [T]
  int64_t width;              // V, at least 1
  Element element;
  bool raw;                   // log-probs of temperature 1, and not of the row's
};

struct Samples {
  int64_t* tokens;   // [T]
  float* log_probs;  // [T]
  int64_t* ranks;    // [T]: how many logits are at least the token's
};
}  // namespace semion

// Rows [begin, end). A row without a distribution (a NaN, +infinity, or nothing but -infinity) has token 0, log-prob NaN, rank 0.
SEMION_DECLARE(void, sample_tokens, const SampleRows& rows, const Samples& out, int64_t begin, int64_t end)
