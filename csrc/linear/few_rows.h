// The product x w^T of a few rows x [T, H] and a weight w [N, H], float32, as an engine decodes: what costs is to read w, once.
#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace semion {
// Columns of the result that one block of w makes; a thread's part is whole blocks.
constexpr int64_t linear_block = 8;

struct FewRows {
  const float* x;    // [T, H], contiguous
  const float* w;    // [N, H], contiguous
  float* out;        // [T, N], contiguous
  int64_t num_rows;  // T
  int64_t width;     // N
  int64_t depth;     // H
};
}  // namespace semion

// Blocks [begin, end) of the result's columns. An element is summed in one order, whatever T, N and the blocks are.
SEMION_DECLARE(void, few_rows_product, const FewRows& rows, int64_t begin, int64_t end)
