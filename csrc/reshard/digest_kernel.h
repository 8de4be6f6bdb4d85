// Launcher of the digest of a matrix of bits on a GPU (digest.h says what it is), in plain types: no torch, no
// allocation, no check of arguments. Unverified on a GPU so far.
#pragma once
#include <cstdint>

#include "../cuda/launch.h"

extern "C" {

struct SemionDigestBlock {
  const void* block;       // [R, C], unit column stride
  int64_t row_stride;      // in elements
  const uint64_t* columns;  // [C]: the weights of the block's own columns
  int64_t num_rows, num_columns;
  int64_t row;             // the place of the block's first row
  uint64_t seed;
  int32_t element_size;    // 1, 2, 4 or 8 bytes
};

// digest [1], of all rows.
cudaError_t semion_block_digest(const SemionDigestBlock* block, uint64_t* digest, cudaStream_t stream);
}
