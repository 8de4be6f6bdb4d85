// The digest of a matrix of bits on a GPU. A thread keeps the weights of its few columns and goes down the rows of a
// tile; the tile's row weights are computed once, in shared memory. Sums modulo 2^64 may be added in any order, so one
// atomic addition a block joins them. Bound by memory on paper (16 byte loads wherever block and rows lie on 16 byte
// boundaries, some 4 instructions an element); unverified on a GPU.
#include "digest_kernel.h"

#include "../cuda/sums.h"
#include "digest.h"

namespace semion {
namespace {

constexpr int block = 256, rows_of_tile = 64;
using Block = SemionDigestBlock;

// Element i of 16 bytes, as an unsigned integer.
template <class Element>
__device__ __forceinline__ uint64_t element_of(const uint4& loaded, int i) {
  const uint32_t word[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  if (sizeof(Element) == 8) return word[2 * i % 4] | uint64_t(word[(2 * i + 1) % 4]) << 32;
  constexpr int per_word = sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;
  return Element(word[i / per_word] >> (i % per_word) * 8 * (sizeof(Element) % 4));
}

// Of a thread's WIDTH columns in every row of its tile: the weighted sum.
template <class Element, int WIDTH>
__device__ __forceinline__ uint64_t sum_columns(const Block& in, int64_t first_row, int num_rows, int64_t first,
                                                const uint64_t* row_weights) {
  const int64_t num_mine = in.num_columns - first;  // below 0 beyond the last column
  const Element* column = static_cast<const Element*>(in.block) + first_row * in.row_stride + first;
  uint64_t total = 0;
  if (num_mine < WIDTH) {
    for (int64_t i = 0; i < num_mine; ++i)
      for (int r = 0; r < num_rows; ++r) total += row_weights[r] * in.columns[first + i] * column[r * in.row_stride + i];
    return total;
  }
  uint64_t weights[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) weights[i] = in.columns[first + i];
#pragma unroll 4
  for (int r = 0; r < num_rows; ++r, column += in.row_stride) {
    uint64_t sum = 0;
    if (WIDTH == 1) {
      sum = weights[0] * *column;
    } else {
      const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(column));
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) sum += weights[i] * element_of<Element>(loaded, i);
    }
    total += row_weights[r] * sum;
  }
  return total;
}

template <class Element, int WIDTH>
__global__ void __launch_bounds__(block) digest_kernel(Block in, int64_t num_across, unsigned long long* digest) {
  __shared__ uint64_t row_weights[rows_of_tile], of_warps[block / 32];
  const int thread = threadIdx.x;
  const int64_t first_row = blockIdx.x / num_across * rows_of_tile, rest = in.num_rows - first_row;
  const int64_t first = (blockIdx.x % num_across * block + thread) * WIDTH;
  const int num_rows = rest < rows_of_tile ? int(rest) : rows_of_tile;
  if (thread < num_rows) row_weights[thread] = row_weight(in.seed, in.row + first_row + thread);
  __syncthreads();
  uint64_t total = warp_sum(sum_columns<Element, WIDTH>(in, first_row, num_rows, first, row_weights));
  if (thread % 32 == 0) of_warps[thread / 32] = total;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < block / 32; ++warp) total += of_warps[warp];
  atomicAdd(digest, static_cast<unsigned long long>(total));
}

template <class Element, int WIDTH>
void launch(const Block& in, uint64_t* digest, cudaStream_t stream) {
  const int64_t num_across = (in.num_columns + block * WIDTH - 1) / (block * WIDTH);
  const auto num_blocks = static_cast<unsigned>((in.num_rows + rows_of_tile - 1) / rows_of_tile * num_across);
  SEMION_LAUNCH((digest_kernel<Element, WIDTH>), num_blocks, block, stream, in, num_across,
                reinterpret_cast<unsigned long long*>(digest));
}

template <class Element>
void choose(const Block& in, uint64_t* digest, cudaStream_t stream) {
  const bool on_boundaries =
      reinterpret_cast<uintptr_t>(in.block) % 16 == 0 && (in.num_rows == 1 || in.row_stride * sizeof(Element) % 16 == 0);
  on_boundaries ? launch<Element, 16 / sizeof(Element)>(in, digest, stream) : launch<Element, 1>(in, digest, stream);
}

}  // namespace
}  // namespace semion

cudaError_t semion_block_digest(const SemionDigestBlock* block, uint64_t* digest, cudaStream_t stream) {
  const cudaError_t cleared = cudaMemsetAsync(digest, 0, sizeof *digest, stream);
  if (cleared != cudaSuccess || block->num_rows == 0 || block->num_columns == 0) return cleared;
  switch (block->element_size) {
    case 1: semion::choose<uint8_t>(*block, digest, stream); break;
    case 2: semion::choose<uint16_t>(*block, digest, stream); break;
    case 4: semion::choose<uint32_t>(*block, digest, stream); break;
    case 8: semion::choose<uint64_t>(*block, digest, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
