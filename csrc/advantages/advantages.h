// Advantages of groups of rewards on the CPU. Plain pointers; no torch, no checks. B rewards, G groups.
#pragma once

#include <cstdint>

namespace semion {
enum class Normalize { mean, mean_std, leave_one_out };

// rewards [B], cu_groups [G + 1] from 0 to B -> advantages [B], no_signal [G]: the rewards of the group are all equal (by
// mean_std: nearly) and its advantages exactly 0. Returns the index of the first reward that is not finite or whose
// advantage is none of Real, or -1.
template <class Real>
int64_t grouped_advantages(const Real* rewards, const int32_t* cu_groups, int64_t num_groups, Normalize normalize,
                           Real* advantages, bool* no_signal);
}  // namespace semion
