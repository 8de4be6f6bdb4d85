// Groups are small (a few dozen rewards) and few: plain loops in double, nothing to vectorise.
#include "advantages.h"

#include <cmath>

#include "scale.h"

namespace semion {
template <class Real>
int64_t grouped_advantages(const Real* rewards, const int32_t* cu_groups, int64_t num_groups, Normalize normalize,
                           Real* advantages, bool* no_signal) {
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t begin = cu_groups[group], end = cu_groups[group + 1], size = end - begin;
    double low = INFINITY, high = -INFINITY;
    for (int64_t i = begin; i < end; ++i) {
      const double reward = rewards[i];
      if (!std::isfinite(reward)) return i;
      low = std::fmin(low, reward);
      high = std::fmax(high, reward);
    }
    no_signal[group] = !(low < high);
    const Scale scale(low, high);
    const auto scaled = [&](int64_t i) { return rewards[i] * scale.down; };
    const double count = static_cast<double>(size);
    double sum = 0, residue = 0;
    for (int64_t i = begin; i < end; ++i) sum += scaled(i);
    for (int64_t i = begin; i < end; ++i) residue += scaled(i) - sum / count;
    // Between them, however it rounds.
    const double mean = std::fmin(std::fmax((sum + residue) / count, low * scale.down), high * scale.down);
    double factor = 1, up = scale.up;
    if (normalize == Normalize::leave_one_out && size > 1) factor = count / (count - 1);
    if (normalize == Normalize::mean_std) {
      double squares = 0;
      for (int64_t i = begin; i < end; ++i) squares += (scaled(i) - mean) * (scaled(i) - mean);
      const double deviation = std::sqrt(squares / count);
      no_signal[group] = no_signal[group] || deviation <= least_deviation * scale.largest;
      factor = 1 / deviation;
      up = 1;  // what is divided by a deviation has no scale
    }
    for (int64_t i = begin; i < end; ++i) {
      advantages[i] = no_signal[group] ? Real{0} : static_cast<Real>(factor * (scaled(i) - mean) * up);
      if (!std::isfinite(advantages[i])) return i;
    }
  }
  return -1;
}

template int64_t grouped_advantages(const float*, const int32_t*, int64_t, Normalize, float*, bool*);
template int64_t grouped_advantages(const double*, const int32_t*, int64_t, Normalize, double*, bool*);
}  // namespace semion
