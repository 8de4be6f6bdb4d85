// Sums of token values over the sequences of a packed row, on the CPU. Plain pointers; no torch, no checks.
// T tokens, B sequences; cu_seqlens [B + 1] from 0 to T; mask [T] or null: only its tokens count.
#pragma once

#include <cstdint>

namespace semion {
// sums [B] of values [T], each added in order in double, for sequences begin to end.
void sequence_sums(const float* values, const int32_t* cu_seqlens, const bool* mask, float* sums, int64_t begin,
                   int64_t end);

// Every token gets its sequence's gradient, or 0 where the mask is false.
void sequence_sums_backward(const float* grad_sums, const int32_t* cu_seqlens, const bool* mask, float* grad_values,
                            int64_t begin, int64_t end);
}  // namespace semion
