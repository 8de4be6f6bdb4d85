// Launcher of the digests of matrices of bits on a GPU (digest.h says what they are), in plain types: no torch, no
// allocation, no check of arguments. Unverified on a GPU so far.
#pragma once
#include <cstdint>

#include "../cuda/launch.h"

extern "C" {

struct SemionDigestBlock {
  const void* block;        // [R, C], unit column stride
  int64_t row_stride;       // in elements
  const uint64_t* columns;  // [C]: the weights of the block's own columns
  int64_t num_rows, num_columns;
  int64_t row;              // the place of the block's first row
  uint64_t seed;
};

// digests [count] of blocks of one element size (1, 2, 4 or 8 bytes), each of all its rows. `blocks` is the host's. One
// launch for every semion_digests_a_launch() blocks that lie on 16 byte boundaries, and as many for those that do not.
cudaError_t semion_block_digests(const SemionDigestBlock* blocks, int64_t count, int32_t element_size, uint64_t* digests,
                                 cudaStream_t stream);
int32_t semion_digests_a_launch();
}
