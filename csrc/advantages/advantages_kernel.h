// Launcher of the grouped advantages on a GPU (advantages.h says what they are), in plain types: no torch, no allocation,
// no check of arguments. Unverified on a GPU so far.
#pragma once
#include <cstdint>

#include "../cuda/launch.h"

extern "C" {

// rewards and advantages [B] are float32, or float64 where is_double; cu_groups [G + 1]; normalize: 0 mean, 1 mean_std,
// 2 leave_one_out; no_signal [G], one byte a group; broken [1]: the first reward that is not finite, or whose advantage is
// not, or -1. The advantages of a group with such a reward mean nothing, and those of rewards in no group are not written.
cudaError_t semion_grouped_advantages(const void* rewards, int is_double, const int32_t* cu_groups, int32_t num_rewards,
                                      int32_t num_groups, int normalize, void* advantages, uint8_t* no_signal,
                                      int64_t* broken, cudaStream_t stream);
}
