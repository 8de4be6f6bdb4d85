// A packed row and its log-probs in plain types, for the kernels of both devices; pointers are the device's own.
// T tokens, B sequences. Of every token whose target is not ignored: ratio = e^g with g = log-prob - old log-prob, and
// loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_weight (e^d - d - 1), d = reference - log-prob;
// where A is negative the first term is at most -dual_clip A. Both exponents are held at log_limit, beyond which they
// pass no gradient: e^89 is no float, and one such token would be the whole step long before.
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
  float clip_low, clip_high;
  float dual_clip;  // infinity: none
  float kl_weight;
};

constexpr float log_limit = 20;     // the largest g and d that are exponentiated
constexpr int num_policy_sums = 6;  // loss, KL, tokens that a clip holds, ratio, |log-prob - old|, tokens beyond log_limit
}  // namespace semion
