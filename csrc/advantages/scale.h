// The scale of a group's rewards, for both devices: a power of two near the largest |reward|. To multiply by it is exact, and
// keeps the sums and squares of huge and tiny rewards in range.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define SEMION_BOTH __host__ __device__
#else
#define SEMION_BOTH
#endif

namespace semion {
// What mean_std takes for equal: a deviation of at most this share of the group's largest |reward| is rounding, not signal.
constexpr double least_deviation = 1e-6;

struct Scale {
  double down = 1, up = 1;  // the scale's inverse, and the scale
  double largest;           // |reward|, scaled

  // Of rewards from low to high. 1 where there are none, or one is not finite.
  SEMION_BOTH Scale(double low, double high) : largest(fmax(-low, high)) {
    constexpr int most = 1000;  // 2^most and its inverse are doubles of full precision
    if (!(largest >= 0 && largest <= 0x1.fffffffffffffp1023)) return;
    int exponent = 0;
    frexp(largest, &exponent);
    exponent = exponent > most ? most : exponent < -most ? -most : exponent;
    down = ldexp(1.0, -exponent), up = ldexp(1.0, exponent);
    largest *= down;
  }
};
}  // namespace semion
