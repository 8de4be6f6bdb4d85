// The vector kernel of policy_gradient.h, compiled once per instruction set. Float lanes are summed into double every
// few hundred tokens.
#include "policy_gradient.h"

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int64_t tokens_per_flush = 32 * lanes;

// All bits set in the lanes of counted tokens.
Ints counted_of(const int64_t* targets, int64_t count) {
  typedef int64_t Longs __attribute__((vector_size(8 * SEMION_LANES)));
  constexpr int64_t ignored = -100;
  Longs ids = Longs{} + ignored;
  std::memcpy(&ids, targets, count == lanes ? sizeof ids : static_cast<size_t>(count) * 8);
  return __builtin_convertvector(ids != ignored, Ints);
}

Floats where(Ints condition, Floats value) {
  return (Floats)((Ints)value & condition);
}

// Adds up to `lanes` tokens to the sums and returns the gradient of their loss.
Floats add_tokens(const PolicyGradientRow& in, int64_t first, int64_t count, float advantage, Floats* sums) {
  const auto at = [&](const float* values) {
    return count == lanes ? load(values + first) : load_part(values + first, count, 0.0f);
  };
  const Ints counted = counted_of(in.targets + first, count);
  const Floats log_probs = at(in.log_probs), gap = where(counted, log_probs - at(in.old_log_probs));
  const Floats limit = all(log_limit), ratio = exp(smaller(limit, gap));  // a NaN stays one
  const Floats low = all(1 - in.clip_low), high = all(1 + in.clip_high), dual = all(in.dual_clip);
  const Floats clipped = smaller(high, larger(low, ratio));
  const float least = advantage < 0 ? in.dual_clip * advantage : -INFINITY;  // of the objective
  sums[0] -= where(counted, larger(all(least), smaller(ratio * advantage, clipped * advantage)));
  sums[3] += where(counted, ratio);
  sums[4] += larger(gap, -gap);
  const Ints open = advantage >= 0 ? ratio <= high : (ratio >= low) & (ratio <= dual);  // no clip holds
  if (advantage != 0) sums[2] -= __builtin_convertvector(counted & ~open, Floats);
  Ints beyond = gap > limit;
  Floats gradient = where(open & ~beyond, -ratio * advantage);
  if (in.reference_log_probs != nullptr) {
    const Floats whole = where(counted, at(in.reference_log_probs) - log_probs), d = smaller(limit, whole), e = exp(d);
    const Floats kl = e - d - 1.0f;
    const Ints far = whole > limit;
    sums[0] += in.kl_weight * kl;
    sums[1] += kl;
    gradient += where(~far, in.kl_weight * (1.0f - e));
    beyond |= far;
  }
  sums[5] -= __builtin_convertvector(counted & beyond, Floats);
  return where(counted, gradient);
}
}  // namespace

void policy_gradient(const PolicyGradientRow& in, double* sums, float* gradient, int64_t begin, int64_t end) {
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    double* out = sums + sequence * num_policy_sums;
    for (int k = 0; k < num_policy_sums; ++k) out[k] = 0;
    const int64_t last = in.cu_seqlens[sequence + 1];
    for (int64_t first = in.cu_seqlens[sequence]; first < last; first += tokens_per_flush) {
      const int64_t stop = last - first < tokens_per_flush ? last : first + tokens_per_flush;
      Floats partial[num_policy_sums] = {};
      for (int64_t i = first; i < stop; i += lanes) {
        const int64_t count = stop - i < lanes ? stop - i : lanes;
        const Floats slope = add_tokens(in, i, count, in.advantages[sequence], partial);
        count == lanes ? store(gradient + i, slope) : store_part(gradient + i, count, slope);
      }
      for (int k = 0; k < num_policy_sums; ++k) out[k] += sum_lanes(partial[k]);
    }
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
