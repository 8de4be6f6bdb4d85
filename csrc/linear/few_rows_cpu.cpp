// few_rows.h on the CPU, compiled once per instruction set. A library packs w before it multiplies, which pays for many rows; for
// a few it reads w twice and writes it once. Here both factors are read as they lie, along H: a tile of 4 rows of w by
// tile_rows of x has its sums in registers, a block of w is read from memory while the one before is used, and its part of the
// result is put together in a small room, for columns of [T, N] may lie on one cache set.
#include "few_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int64_t depth_block = 512;  // of H at once: 16 KiB of w, half of a first-level cache
constexpr int tile_columns = 4, tile_rows = lanes == 16 ? 6 : 3;  // with the factors' vectors, all registers there are
constexpr int64_t line = 64 / sizeof(float);
typedef float Four __attribute__((vector_size(16)));

Four folded(Floats a) {
  if constexpr (lanes == 16) a += partners<8>(a, std::make_integer_sequence<int, lanes>());
  if constexpr (lanes >= 8) a += partners<4>(a, std::make_integer_sequence<int, lanes>());
  Four out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}

float sum_of(Floats a) {
  const Four part = folded(a);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

// The four sums, each in the order of sum_of.
Four sums_of(const Floats* a) {
  const Four p = folded(a[0]), q = folded(a[1]), r = folded(a[2]), s = folded(a[3]);
  typedef int32_t At __attribute__((vector_size(16)));
  const Four pq = __builtin_shuffle(p, q, At{0, 4, 1, 5}) + __builtin_shuffle(p, q, At{2, 6, 3, 7});
  const Four rs = __builtin_shuffle(r, s, At{0, 4, 1, 5}) + __builtin_shuffle(r, s, At{2, 6, 3, 7});
  return __builtin_shuffle(pq, rs, At{0, 1, 4, 5}) + __builtin_shuffle(pq, rs, At{2, 3, 6, 7});
}

// room[m][n] += the products of `count` elements of each row, of rows `depth` apart; `linear_block` columns a row of the room.
template <int columns, int rows>
void add_tile(const float* x, const float* w, int64_t depth, int64_t count, float* room) {
  Floats sums[rows][columns] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Floats a[rows];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) a[m] = load(x + m * depth + i);
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) {
      const Floats b = load(w + n * depth + i);
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) sums[m][n] += a[m] * b;
    }
  }
  if (i < count) {
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) {
      const Floats b = load_part(w + n * depth + i, count - i, 0.0f);
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) sums[m][n] += load_part(x + m * depth + i, count - i, 0.0f) * b;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
    float* to = room + m * linear_block;
    if constexpr (columns == 4) {
      Four before;
      std::memcpy(&before, to, sizeof before);
      before += sums_of(sums[m]);
      std::memcpy(to, &before, sizeof before);
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < columns; ++n) to[n] += sum_of(sums[m][n]);
    }
  }
}

template <int columns, int rows = tile_rows>
void add_rows(int64_t num_rows, const float* x, const float* w, int64_t depth, int64_t count, float* room) {
  if (num_rows == rows) return add_tile<columns, rows>(x, w, depth, count, room);
  if constexpr (rows > 1) add_rows<columns, rows - 1>(num_rows, x, w, depth, count, room);
}

// The next block of w, asked for row by row while this one is used.
struct Ahead {
  const float* w;
  int64_t num_rows, depth, count, done = 0;

  void upto(int64_t row) {
    for (; done < std::min(row, num_rows); ++done)
      for (int64_t i = 0; i < count; i += line) __builtin_prefetch(w + done * depth + i, 0, 2);
  }
};

Ahead after(const FewRows& in, int64_t first, int64_t last, int64_t i) {
  const int64_t next = i + depth_block;
  if (next < in.depth) return {in.w + first * in.depth + next, last - first, in.depth, std::min(depth_block, in.depth - next)};
  const int64_t num_rows = std::min(linear_block, in.width - last);
  return {in.w + last * in.depth, num_rows, in.depth, std::min(depth_block, in.depth)};
}
}  // namespace

void few_rows_product(const FewRows& in, int64_t begin, int64_t end) {
  const int64_t depth = in.depth, num_tiles = (in.num_rows + tile_rows - 1) / tile_rows;
  std::vector<float> room(static_cast<size_t>(in.num_rows * linear_block));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * linear_block, last = std::min(in.width, first + linear_block);
    std::fill(room.begin(), room.end(), 0.0f);
    for (int64_t i = 0; i < depth; i += depth_block) {
      const int64_t count = std::min(depth_block, depth - i);
      Ahead ahead = after(in, first, last, i);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        ahead.upto((tile + 1) * linear_block / num_tiles);
        const int64_t m = tile * tile_rows, rows = std::min<int64_t>(tile_rows, in.num_rows - m);
        const float* x = in.x + m * depth + i;
        float* to = room.data() + m * linear_block;
        int64_t n = first;
        for (; n + tile_columns <= last; n += tile_columns)
          add_rows<tile_columns>(rows, x, in.w + n * depth + i, depth, count, to + (n - first));
        for (; n < last; ++n) add_rows<1>(rows, x, in.w + n * depth + i, depth, count, to + (n - first));
      }
    }
    for (int64_t m = 0; m < in.num_rows; ++m)
      std::memcpy(in.out + m * in.width + first, room.data() + m * linear_block, static_cast<size_t>(last - first) * sizeof(float));
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
