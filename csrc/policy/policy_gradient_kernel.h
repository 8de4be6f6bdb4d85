// Launcher of GRPO's loss with its gradient on a GPU (row.h says what it is), in plain types: no torch, no
// allocation, no check of arguments. Unverified on a GPU so far.
#pragma once
#include <cstdint>

#include "../cuda/launch.h"
#include "row.h"

extern "C" {

// sums [num_policy_sums] in the order of row.h. gradient [T] of the loss, for the tokens in a sequence; the others the
// caller has cleared. workspace: num_policy_sums * B doubles.
cudaError_t semion_policy_gradient(const semion::PolicyGradientRow* row, double* workspace, float* sums,
                                   float* gradient, cudaStream_t stream);
}
