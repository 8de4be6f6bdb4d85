// Token log-probs from vocab-parallel logits on the CPU: what one rank computes of its own columns, how the ranks' parts
// join, and the gradient. Plain pointers; no torch, no threads (a caller splits the rows), no checks.
//
// T rows, R ranks. A rank's part of a row is four floats: a reference m no less than 2^-8 of the largest logit times the
// temperature, sum of e^d, sum of d e^d, and the target's logit where this rank holds it; d = (x - m) / temperature.
#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace semion {
enum class Element { float32, bfloat16, float16 };
constexpr int64_t ignored = -100;
constexpr float lowest = -0x1.fffffep127f;  // the reference of a row without any logit: -inf would make differences NaN

struct LogProbInput {
  const void* logits;      // [T, at least num_valid], unit column stride
  int64_t row_stride;      // in elements
  Element element;
  const int64_t* targets;  // [T], `ignored` or an index of the whole vocabulary
  int64_t num_rows;
  int64_t vocab_start;     // index of this rank's first column
  int64_t num_columns;     // of this rank, padding included
  int64_t num_valid;       // of this rank: the columns beyond are padding
  double temperature;
  bool every_row;          // also those whose target is ignored: their entropy is asked for
};

struct LogProbGradient {
  const float* totals;         // [3, T]: reference, sum of e^d, mean of d, of all ranks together
  const float* grad_log_prob;  // [T]
  const float* grad_entropy;   // [T] or null
  void* out;                   // [T, num_columns], may be the logits
  int64_t row_stride;          // of out
};
}  // namespace semion

// parts [4, T] of this rank, for rows begin to end.
SEMION_DECLARE(void, log_prob_parts, const LogProbInput& in, float* parts, int64_t begin, int64_t end)
// Writes the gradient of the logits, padding zeroed, for rows begin to end.
SEMION_DECLARE(void, log_prob_backward, const LogProbInput& in, const LogProbGradient& gradient, int64_t begin, int64_t end)
// parts [R, 4, T] of all ranks -> log_probs [T], entropy [T], totals [3, T], for rows begin to end.
SEMION_DECLARE(void, log_prob_join, const float* parts, int64_t num_ranks, const int64_t* targets, int64_t num_rows,
               double temperature, float* log_probs, float* entropy, float* totals, int64_t begin, int64_t end)
