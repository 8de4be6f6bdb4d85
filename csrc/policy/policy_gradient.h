// GRPO's loss of a packed row and its gradient in one pass, on the CPU. Plain pointers; no torch, no threads, no checks.
// T tokens, B sequences. Of every token whose target is not ignored: ratio = e^(log-prob - old log-prob),
// loss = -min(ratio A, clip(ratio, 1 - clip_ratio, 1 + clip_ratio) A) + kl_weight (e^d - d - 1), d = reference - log-prob.
#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace semion {
struct PolicyGradientInput {
  const float* log_probs;            // [T]
  const float* old_log_probs;        // [T]
  const float* reference_log_probs;  // [T] or null: no KL
  const float* advantages;           // [B]
  const int32_t* cu_seqlens;         // [B + 1], from 0 to T
  const int64_t* targets;            // [T]
  float clip_ratio;
  float kl_weight;
};

constexpr int num_policy_sums = 5;  // loss, KL, tokens that the clip holds, ratio, |log-prob - old|
}  // namespace semion

// sums [B, 5] and gradient [T] of the loss, for sequences begin to end.
SEMION_DECLARE(void, policy_gradient, const PolicyGradientInput& in, double* sums, float* gradient, int64_t begin,
               int64_t end)
