// GRPO's loss of a packed row and its gradient in one pass, on the CPU. No torch, no threads, no checks.
#pragma once

#include "../dispatch.h"
#include "row.h"

// sums [B, num_policy_sums] and gradient [T] of the loss, for sequences begin to end.
SEMION_DECLARE(void, policy_gradient, const PolicyGradientRow& in, double* sums, float* gradient, int64_t begin, int64_t end)
