// How many blocks a kernel gets: what the current device has room for, and how finely rows are split so that the last wave
// of blocks does not leave most of it idle. Host code.
#pragma once
#include "launch.h"

namespace semion {

// Blocks that the current device runs at once, where a multiprocessor runs `per_multiprocessor` of them.
inline int64_t blocks_at_once(int per_multiprocessor) {
  int device = 0, num_multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    num_multiprocessors = 132;  // an H100's; the launch itself will say what is wrong
  return int64_t(num_multiprocessors) * per_multiprocessor;
}

// Parts that each of `num_rows` rows is split in, from 1 to `most`: the fewest with which the waves of blocks are nine tenths
// full, or those that fill them best.
inline int splits_of(int64_t num_rows, int64_t most, int64_t at_once) {
  int best = 1;
  double fullest = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t num_blocks = num_rows * splits, waves = (num_blocks + at_once - 1) / at_once;
    const double full = double(num_blocks) / double(waves * at_once);
    if (full > fullest) best = int(splits), fullest = full;
    if (full >= 0.9) break;
  }
  return best;
}

}  // namespace semion
