// Groups are small (a few dozen rewards) and few: plain loops in double, nothing to vectorise.
#include "advantages.h"

#include <cmath>

namespace semion {
template <class Real>
int64_t grouped_advantages(const Real* rewards, const int32_t* cu_groups, int64_t num_groups, Normalize normalize,
                           Real* advantages, bool* no_signal) {
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t begin = cu_groups[group], end = cu_groups[group + 1], size = end - begin;
    double sum = 0, low = INFINITY, high = -INFINITY;
    for (int64_t i = begin; i < end; ++i) {
      const double reward = rewards[i];
      if (!std::isfinite(reward)) return i;
      sum += reward;
      low = std::fmin(low, reward);
      high = std::fmax(high, reward);
    }
    no_signal[group] = !(low < high);
    const double count = static_cast<double>(size);
    double residue = 0;
    for (int64_t i = begin; i < end; ++i) residue += rewards[i] - sum / count;
    const double mean = std::fmin(std::fmax((sum + residue) / count, low), high);  // between them, however it rounds
    double factor = 1;
    if (normalize == Normalize::leave_one_out && size > 1) factor = count / (count - 1);
    if (normalize == Normalize::mean_std) {
      double squares = 0;
      for (int64_t i = begin; i < end; ++i) squares += (rewards[i] - mean) * (rewards[i] - mean);
      factor = 1 / std::sqrt(squares / count);
    }
    for (int64_t i = begin; i < end; ++i)
      advantages[i] = no_signal[group] ? Real{0} : static_cast<Real>(factor * (rewards[i] - mean));
  }
  return -1;
}

template int64_t grouped_advantages(const float*, const int32_t*, int64_t, Normalize, float*, bool*);
template int64_t grouped_advantages(const double*, const int32_t*, int64_t, Normalize, double*, bool*);
}  // namespace semion
