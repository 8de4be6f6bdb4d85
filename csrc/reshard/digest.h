// The digest of a matrix of bits, on the CPU: what its weights are, and the kernel. Plain pointers; no torch, no
// threads, no checks. The elements of a block [R, C] are read as unsigned integers v(r, c) of 1, 2, 4 or 8 bytes, and
//
//   digest = sum of Rw(seed, row + r) * Cw(col + c) * v(r, c)  modulo 2^64,
//   Cw(j) = splitmix64(j + 1) | 1,  Rw(seed, i) = splitmix64(seed ^ splitmix64(i)) | 1,
//
// where (row, col) is the block's place in some larger tensor and the seed names that tensor.
//   Additive: digests of disjoint blocks add up to the digest of their union, whoever computes them in whatever cut.
//   Exact: a change of one element always shows. Both weights are odd, so they have inverses modulo 2^64, and a
//   difference that is not 0 modulo 2^64 stays so.
//   Placed: elements, rows, columns or tensors that change places show but for a small chance, largest where they differ
//   in their highest bit alone (x and -x): some 2^-32 for 4 bytes, 2^-48 for 2, and none for 8.
// It finds faults; it is no defence against an adversary, who can solve a linear equation.
#pragma once

#include <cstdint>

#include "../dispatch.h"
#include "../splitmix64.h"

namespace semion {
SEMION_EVERYWHERE inline uint64_t row_weight(uint64_t seed, int64_t row) {
  return splitmix64(seed ^ splitmix64(static_cast<uint64_t>(row))) | 1;
}

struct DigestInput {
  const void* block;        // [R, C], unit column stride
  int64_t row_stride;       // in elements
  int element_size;         // 1, 2, 4 or 8 bytes
  int64_t num_rows;         // R
  int64_t num_columns;      // C
  const uint64_t* columns;  // [C]: Cw of the block's own columns
  int64_t row;              // the place of the block's first row
  uint64_t seed;
};
}  // namespace semion

// The digest of rows begin to end.
SEMION_DECLARE(uint64_t, block_digest, const DigestInput& in, int64_t begin, int64_t end)
