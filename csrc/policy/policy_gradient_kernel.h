// Launcher of GRPO's loss with its gradient on a GPU (policy_gradient.h says what it is), in plain types: no torch, no
// allocation, no check of arguments. Unverified on a GPU so far.
#pragma once
#include <cstdint>

#include "../simt/launch.h"

extern "C" {

struct SemionPolicyGradientRow {
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

// sums [5]: loss, KL, tokens that the clip holds, ratio, |log-prob - old|. gradient [T] of the loss, for
// the tokens in a sequence; the others the caller has cleared. workspace: 5 * B doubles.
cudaError_t semion_policy_gradient(const SemionPolicyGradientRow* row, double* workspace, float* sums, float* gradient,
                                   cudaStream_t stream);
}
