// Joins the ranks' parts of every row (logprob.h): a dozen numbers a row, in double, with nothing to vectorise.
#include <cmath>

#include "logprob.h"

namespace semion {
void log_prob_join(const float* parts, int64_t num_ranks, const int64_t* targets, int64_t num_rows, double temperature,
                   float* log_probs, float* entropy, float* totals, int64_t begin, int64_t end) {
  const double inverse = 1 / temperature;
  for (int64_t row = begin; row < end; ++row) {
    const auto part = [&](int64_t rank, int which) {
      return static_cast<double>(parts[(rank * 4 + which) * num_rows + row]);
    };
    double reference = part(0, 0);
    for (int64_t rank = 1; rank < num_ranks; ++rank) reference = std::fmax(reference, part(rank, 0));
    double total = 0, weighted = 0, target = 0;
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
      const double shift = (part(rank, 0) - reference) * inverse, shrink = shift == 0 ? 1 : std::exp(shift);
      total += shrink * part(rank, 1);
      weighted += shrink * (part(rank, 2) + part(rank, 1) * shift);
      target += part(rank, 3);
    }
    const double log_total = std::log(total), mean = weighted / total;
    log_probs[row] = targets[row] == ignored ? 0.0f : static_cast<float>((target - reference) * inverse - log_total);
    entropy[row] = static_cast<float>(log_total - mean);
    totals[row] = static_cast<float>(reference);
    totals[num_rows + row] = static_cast<float>(total);
    totals[2 * num_rows + row] = static_cast<float>(mean);
  }
}
}  // namespace semion
