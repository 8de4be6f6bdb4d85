// Token log-probs from vocab-parallel logits on the CPU: what one rank computes of its own columns, how the ranks' parts
// join, and the gradient. No torch, no threads (a caller splits the rows), no checks; rows.h says what a part is.
#pragma once

#include "../dispatch.h"
#include "rows.h"

// parts [4, T] of this rank, for rows begin to end.
SEMION_DECLARE(void, log_prob_parts, const LogProbRows& in, float* parts, int64_t begin, int64_t end)
// Writes the gradient of the logits, padding zeroed, for rows begin to end.
SEMION_DECLARE(void, log_prob_backward, const LogProbRows& in, const LogProbGradient& gradient, int64_t begin, int64_t end)
// parts [R, 4, T] of all ranks -> log_probs [T], entropy [T], totals [3, T], for rows begin to end.
SEMION_DECLARE(void, log_prob_join, const float* parts, int64_t num_ranks, const int64_t* targets, int64_t num_rows,
               double temperature, float* log_probs, float* entropy, float* totals, int64_t begin, int64_t end)
