// The digests of many matrices of bits in one launch on a GPU. All blocks' rows, cut into strips of columns, are one list of
// units that the thread blocks share evenly, whatever the sizes: as many thread blocks as the device runs at once, each with
// a run of units. A thread keeps the weights of its few columns and goes down the rows of a strip; a warp computes the
// weights of 32 rows together. Sums modulo 2^64 may be added in any order, so an atomic addition for every block that a
// thread block had a part of joins them. Bound by memory on paper (16 byte loads wherever block and rows lie on 16 byte
// boundaries, four in flight a thread and 40 KB a multiprocessor, 6.4 instructions an element of 2 bytes); unverified on a
// GPU.
#include "digest_kernel.h"

#include "../cuda/grid.h"
#include "../cuda/sums.h"
#include "digest.h"

namespace semion {
namespace {

constexpr int block = 128, blocks_per_multiprocessor = 5, rows_of_unit = 4, most_blocks = 48;
constexpr int rows_of_narrow_unit = block, narrow = 16;  // a vector is a matrix of one column: there a thread takes a row
constexpr int64_t most_units = (int64_t(1) << 31) / rows_of_narrow_unit - 1;  // a launch: rows of a run fit an int
using Block = SemionDigestBlock;

struct Table {  // an argument of the kernel, within the 4 KB that every driver takes
  Block blocks[most_blocks];
  int32_t places[most_blocks];          // in the launcher's list
  int32_t first_units[most_blocks + 1];  // of each block; at the end their number
  int32_t count;
};
static_assert(sizeof(Table) <= 4000, "the arguments of a kernel");

// Element i of 16 bytes, as an unsigned integer.
template <class Element>
__device__ __forceinline__ Element element_of(const uint4& loaded, int i) {
  const uint32_t word[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  if (sizeof(Element) == 8) return Element(word[2 * i % 4] | uint64_t(word[(2 * i + 1) % 4]) << 32);
  constexpr int per_word = sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;
  return Element(word[i / per_word] >> (i % per_word) * 8 * (sizeof(Element) % 4));
}

// What a thread loads of a row: 16 bytes, or one element.
template <class Element, int WIDTH>
struct Piece {
  uint4 loaded;

  __device__ __forceinline__ void load(const Element* from) { loaded = __ldcs(reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ Element at(int i) const { return element_of<Element>(loaded, i); }
};
template <class Element>
struct Piece<Element, 1> {
  Element loaded;

  __device__ __forceinline__ void load(const Element* from) { loaded = *from; }
  __device__ __forceinline__ Element at(int) const { return loaded; }
};

// The sum of weight * element over a piece, modulo 2^64, from products of 32 bits where the elements have no more.
template <class Element, int WIDTH>
__device__ __forceinline__ uint64_t weighted(const Piece<Element, WIDTH>& piece, const uint64_t (&weights)[WIDTH]) {
  uint64_t low = 0;
  uint32_t high = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    if (sizeof(Element) == 8) {
      low += weights[i] * piece.at(i);
    } else {
      const auto v = uint32_t(piece.at(i));
      low += uint64_t(uint32_t(weights[i])) * v;
      high += uint32_t(weights[i] >> 32) * v;
    }
  }
  return low + (uint64_t(high) << 32);
}

template <int WIDTH>
SEMION_EVERYWHERE inline bool is_narrow(const Block& in) {
  return WIDTH == 1 && in.num_columns <= narrow;
}
template <int WIDTH>
SEMION_EVERYWHERE inline int64_t units_down_of(const Block& in) {
  const int rows = is_narrow<WIDTH>(in) ? rows_of_narrow_unit : rows_of_unit;
  return (in.num_rows + rows - 1) / rows;
}

// A thread's part of rows [begin, begin + num_rows) of a narrow block.
template <class Element>
__device__ __forceinline__ uint64_t sum_narrow(const Block& in, int64_t begin, int num_rows) {
  uint64_t total = 0;
#pragma unroll 1
  for (int r = threadIdx.x; r < num_rows; r += block) {
    const Element* const row = static_cast<const Element*>(in.block) + (begin + r) * in.row_stride;
    uint64_t sum = 0;
#pragma unroll 1
    for (int c = 0; c < int(in.num_columns); ++c) sum += in.columns[c] * row[c];
    total += row_weight(in.seed, in.row + begin + r) * sum;
  }
  return total;
}

// A thread's part of rows [begin, begin + num_rows) of the strip whose first column is `strip`.
template <class Element, int WIDTH>
__device__ __forceinline__ uint64_t sum_strip(const Block& in, int64_t strip, int64_t begin, int num_rows) {
  constexpr int ROUND = rows_of_unit;
  const int64_t first = strip + int64_t(threadIdx.x) * WIDTH, num_mine = in.num_columns - first;  // below 1 beyond the last
  const int64_t stride = in.row_stride, place = in.row + begin;
  const uint64_t seed = in.seed;
  const bool whole = num_mine >= WIDTH;
  const Element* const rows = static_cast<const Element*>(in.block) + begin * stride;
  const Element* next = rows + (whole ? first : 0);  // who has no whole piece reads another's, with weights of 0
  uint64_t weights[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) weights[i] = whole ? in.columns[first + i] : 0;
  Piece<Element, WIDTH> ahead[ROUND] = {};
#pragma unroll
  for (int u = 0; u < ROUND; ++u, next += stride)
    if (u < num_rows) ahead[u].load(next);
  uint64_t total = 0;
  for (int base = 0; base < num_rows; base += 32) {
    const int own = base + int(threadIdx.x) % 32, stop = base + 32 < num_rows ? base + 32 : num_rows;
    const uint64_t mine = own < num_rows ? row_weight(seed, place + own) : 0;  // so rows beyond the end count for nothing
    for (int r = base; r < stop; r += ROUND) {
#pragma unroll
      for (int u = 0; u < ROUND; ++u, next += stride) {
        total += __shfl_sync(0xffffffffu, mine, r - base + u) * weighted<Element, WIDTH>(ahead[u], weights);
        if (r + u + ROUND < num_rows) ahead[u].load(next);  // as soon as its room is free
      }
    }
  }
  if (!whole && num_mine > 0)  // the last columns of rows that no piece fills: one thread's
#pragma unroll 1
    for (int row = 0; row < num_rows; ++row) {
      uint64_t sum = 0;
#pragma unroll 1
      for (int i = 0; i < int(num_mine); ++i) sum += in.columns[first + i] * rows[row * stride + first + i];
      total += row_weight(seed, place + row) * sum;
    }
  return total;
}

// Adds what the threads of a block have to one sum. The whole block must call it.
__device__ __forceinline__ void add_block(uint64_t total, uint64_t* digest) {
  __shared__ uint64_t of_warps[block / 32];
  const int thread = threadIdx.x;
  total = warp_sum(total);
  __syncthreads();  // what came before has been read
  if (thread % 32 == 0) of_warps[thread / 32] = total;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < block / 32; ++warp) total += of_warps[warp];
  atomicAdd(reinterpret_cast<unsigned long long*>(digest), static_cast<unsigned long long>(total));
}

template <class Element, int WIDTH>
__global__ void __launch_bounds__(block, blocks_per_multiprocessor) digest_kernel(const Table table, uint64_t* digests) {
  const int64_t num_units = table.first_units[table.count];
  int unit = int(num_units * blockIdx.x / gridDim.x);
  const int end = int(num_units * (blockIdx.x + 1) / gridDim.x);
  int index = 0;
  while (unit >= table.first_units[index + 1]) ++index;
  for (; unit < end; ++index) {
    const Block& in = table.blocks[index];
    const int units_down = int(units_down_of<WIDTH>(in)), first_unit = table.first_units[index];
    const int unit_rows = is_narrow<WIDTH>(in) ? rows_of_narrow_unit : rows_of_unit;
    const int last = end < table.first_units[index + 1] ? end : table.first_units[index + 1];
    uint64_t total = 0;
    while (unit < last) {  // a strip after another
      const int strip = (unit - first_unit) / units_down, strip_unit = first_unit + strip * units_down;
      const int stop = last < strip_unit + units_down ? last : strip_unit + units_down;
      const int64_t begin = int64_t(unit - strip_unit) * unit_rows, below = int64_t(stop - strip_unit) * unit_rows;
      const int num_rows = int((below < in.num_rows ? below : in.num_rows) - begin);
      total += is_narrow<WIDTH>(in) ? sum_narrow<Element>(in, begin, num_rows)
                                    : sum_strip<Element, WIDTH>(in, int64_t(strip) * block * WIDTH, begin, num_rows);
      unit = stop;
    }
    add_block(total, digests + table.places[index]);
  }
}

// Whether 16 bytes at a time are aligned, and a row has them.
template <class Element>
bool on_boundaries(const Block& in) {
  return in.num_columns >= int64_t(16 / sizeof(Element)) && reinterpret_cast<uintptr_t>(in.block) % 16 == 0 &&
         (in.num_rows == 1 || in.row_stride * sizeof(Element) % 16 == 0);
}

template <class Element, int WIDTH>
void launch(const Table& table, uint64_t* digests, cudaStream_t stream) {
  const int64_t num_units = table.first_units[table.count], at_once = blocks_at_once(blocks_per_multiprocessor);
  if (num_units == 0) return;
  const auto num_blocks = static_cast<unsigned>(num_units < at_once ? num_units : at_once);
  SEMION_LAUNCH((digest_kernel<Element, WIDTH>), num_blocks, block, stream, table, digests);
}

// Launches all blocks that lie on 16 byte boundaries, or all that do not.
template <class Element, int WIDTH>
void launch_all(const Block* blocks, int64_t count, uint64_t* digests, cudaStream_t stream) {
  Table table;
  table.count = 0, table.first_units[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Block& in = blocks[i];
    if (in.num_rows == 0 || in.num_columns == 0 || on_boundaries<Element>(in) != (WIDTH > 1)) continue;
    const int64_t units = units_down_of<WIDTH>(in) * ((in.num_columns + block * WIDTH - 1) / (block * WIDTH));
    if (table.count == most_blocks || table.first_units[table.count] > most_units - units) {
      launch<Element, WIDTH>(table, digests, stream);
      table.count = 0;
    }
    table.blocks[table.count] = in, table.places[table.count] = static_cast<int32_t>(i);
    table.first_units[table.count + 1] = table.first_units[table.count] + static_cast<int32_t>(units);
    ++table.count;
  }
  launch<Element, WIDTH>(table, digests, stream);
}

template <class Element>
void choose(const Block* blocks, int64_t count, uint64_t* digests, cudaStream_t stream) {
  launch_all<Element, 16 / sizeof(Element)>(blocks, count, digests, stream);
  launch_all<Element, 1>(blocks, count, digests, stream);
}

}  // namespace
}  // namespace semion

int32_t semion_digests_a_launch() { return semion::most_blocks; }

cudaError_t semion_block_digests(const SemionDigestBlock* blocks, int64_t count, int32_t element_size, uint64_t* digests,
                                 cudaStream_t stream) {
  const cudaError_t cleared = cudaMemsetAsync(digests, 0, count * sizeof *digests, stream);
  if (cleared != cudaSuccess || count == 0) return cleared;
  switch (element_size) {
    case 1: semion::choose<uint8_t>(blocks, count, digests, stream); break;
    case 2: semion::choose<uint16_t>(blocks, count, digests, stream); break;
    case 4: semion::choose<uint32_t>(blocks, count, digests, stream); break;
    case 8: semion::choose<uint64_t>(blocks, count, digests, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
