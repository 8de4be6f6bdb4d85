// A bijection of 64-bit words that scatters neighbours (Steele, Lea and Flood 2014, algorithm SplitMix): the digest's weights and
// the sampler's uniform numbers, on both devices.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SEMION_EVERYWHERE __host__ __device__
#else
#define SEMION_EVERYWHERE
#endif

namespace semion {
SEMION_EVERYWHERE inline uint64_t splitmix64(uint64_t state) {
  uint64_t z = state + 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}
}  // namespace semion
