// Joins the ranks' parts of every row (logprob.h), compiled once per instruction set: a dozen numbers a row in double, and
// the logarithm, which is most of the work, of several rows at a time.
#include "logprob.h"

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int rows_together = lanes / 2;

// What the ranks' parts of some rows come to; rows beyond the last hold the logarithm's easiest argument.
struct Joined {
  double reference[rows_together], weighted[rows_together], target[rows_together];
  Doubles total;
};

void join_row(const float* parts, int64_t num_ranks, int64_t num_rows, double inverse, int at, Joined& joined) {
  double reference = parts[0];
  for (int64_t rank = 1; rank < num_ranks; ++rank)
    reference = std::fmax(reference, static_cast<double>(parts[rank * 4 * num_rows]));
  double total = 0, weighted = 0, target = 0;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    const float* part = parts + rank * 4 * num_rows;
    const double sum = part[num_rows], shift = (part[0] - reference) * inverse, shrink = shift == 0 ? 1 : std::exp(shift);
    total += shrink * sum;
    weighted += shrink * (part[2 * num_rows] + sum * shift);
    target += part[3 * num_rows];
  }
  joined.reference[at] = reference, joined.weighted[at] = weighted, joined.target[at] = target, joined.total[at] = total;
}
}  // namespace

void log_prob_join(const float* parts, int64_t num_ranks, const int64_t* targets, int64_t num_rows, double temperature,
                   float* log_probs, float* entropy, float* totals, int64_t begin, int64_t end) {
  const double inverse = 1 / temperature;
  for (int64_t first = begin; first < end; first += rows_together) {
    const int count = end - first < rows_together ? static_cast<int>(end - first) : rows_together;
    Joined joined;
    joined.total = Doubles{} + 1.0;
    for (int i = 0; i < count; ++i) join_row(parts + first + i, num_ranks, num_rows, inverse, i, joined);
    const Doubles log_totals = log(joined.total), per_total = 1.0 / joined.total;
    for (int i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const double log_total = log_totals[i], mean = joined.weighted[i] * per_total[i];
      const double log_prob = (joined.target[i] - joined.reference[i]) * inverse - log_total;
      log_probs[row] = targets[row] == ignored ? 0.0f : static_cast<float>(log_prob);
      entropy[row] = static_cast<float>(log_total - mean);
      totals[row] = static_cast<float>(joined.reference[i]);
      totals[num_rows + row] = static_cast<float>(joined.total[i]);
      totals[2 * num_rows + row] = static_cast<float>(mean);
    }
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
