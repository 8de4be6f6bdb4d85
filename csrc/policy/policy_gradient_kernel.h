// Launcher of GRPO's loss with its gradient on a GPU (row.h says what it is), in plain types: no torch, no
// allocation, no check of arguments. Unverified on a GPU so far.
#pragma once
#include <cstdint>

#include "../cuda/launch.h"
#include "row.h"

extern "C" {

// Doubles of workspace that a row of so many tokens takes.
int64_t semion_policy_gradient_workspace(int32_t num_tokens);

// sums [num_policy_sums] in the order of row.h. gradient [T] of the loss, 0 for tokens in no sequence.
cudaError_t semion_policy_gradient(const semion::PolicyGradientRow* row, double* workspace, float* sums,
                                   float* gradient, cudaStream_t stream);
}
