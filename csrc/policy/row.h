// A packed row and its log-probs in plain types, for the kernels of both devices; pointers are the device's own.
// T tokens, B sequences. Of every token whose target is not ignored: ratio = e^(log-prob - old log-prob),
// loss = -min(ratio A, clip(ratio, 1 - clip_ratio, 1 + clip_ratio) A) + kl_weight (e^d - d - 1), d = reference - log-prob.
#pragma once

#include <cstdint>

namespace semion {
struct PolicyGradientRow {
  const float* log_probs;            // [T]
  const float* old_log_probs;        // [T]
  const float* reference_log_probs;  // [T] or null: no KL
  const float* advantages;           // [B]
  const int32_t* cu_seqlens;         // [B + 1], from 0 to T
  const int64_t* targets;            // [T]
  int32_t num_tokens, num_sequences;
  float clip_ratio;
  float kl_weight;
};

constexpr int num_policy_sums = 5;  // loss, KL, tokens that the clip holds, ratio, |log-prob - old|
}  // namespace semion
