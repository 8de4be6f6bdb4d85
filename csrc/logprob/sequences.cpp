// Four bytes a token are read once; a sum in order and in double is as fast as memory where it matters.
#include "sequences.h"

namespace semion {
void sequence_sums(const float* values, const int32_t* cu_seqlens, const bool* mask, float* sums, int64_t begin,
                   int64_t end) {
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    double sum = 0;
    for (int64_t i = cu_seqlens[sequence]; i < cu_seqlens[sequence + 1]; ++i)
      if (mask == nullptr || mask[i]) sum += values[i];
    sums[sequence] = static_cast<float>(sum);
  }
}

void sequence_sums_backward(const float* grad_sums, const int32_t* cu_seqlens, const bool* mask, float* grad_values,
                            int64_t begin, int64_t end) {
  for (int64_t sequence = begin; sequence < end; ++sequence)
    for (int64_t i = cu_seqlens[sequence]; i < cu_seqlens[sequence + 1]; ++i)
      grad_values[i] = mask == nullptr || mask[i] ? grad_sums[sequence] : 0.0f;
}
}  // namespace semion
