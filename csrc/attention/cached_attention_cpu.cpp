// cached_attention.h on the CPU, compiled once per instruction set. Keys lie token beside token, so that a vector has the
// scores of as many tokens and no lanes are summed; a score is a sum along D and an output one along positions, each in one order.
#include "cached_attention.h"

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int tile_queries = SEMION_LANES == 16 ? 4 : 2;             // heads that share keys, of which each key is read once
constexpr int tile_vectors = SEMION_LANES == 16 ? 2 : 4;             // with the queries' sums, half of all registers
constexpr int64_t tile_tokens = int64_t{tile_vectors} * SEMION_LANES;  // at most cache_multiple
constexpr double log2_e = 1.4426950408889634;
static_assert(cache_multiple % tile_tokens == 0);

int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Floats that only their owner uses; no template of the standard library's, for the linker would choose among instruction sets.
struct Room {
  explicit Room(int64_t count) : data(new float[static_cast<size_t>(count)]) {}
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { delete[] data; }
  float* data;
};

// out = the head x [D], its halves turned by the angles, times `factor`.
void rotate(const float* x, const float* angles, int64_t dim, float factor, float* out) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += lanes) {
    const Floats first = load(x + i), second = load(x + half + i);
    const Floats cosines = load(angles + i) * factor, sines = load(angles + half + i) * factor;
    store(out + i, first * cosines - second * sines);
    store(out + half + i, second * cosines + first * sines);
  }
}

// scores of vectors * lanes tokens, `row` apart by query, of queries [queries, D] and keys [D, block].
template <int queries, int vectors>
void score(const float* q, const float* keys, int64_t dim, int64_t block, float* scores, int64_t row) {
  Floats sums[queries][vectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Floats key = load(keys + d * block + v * lanes);
#pragma GCC unroll 4
      for (int n = 0; n < queries; ++n) sums[n][v] += q[n * dim + d] * key;
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < queries; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(scores + n * row + v * lanes, sums[n][v]);
}

// Scores [count] become 2^(score - the largest), with zeros up to a whole tile; their sum.
float weigh(float* scores, int64_t count, int64_t padded) {
  for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;  // whatever lies in slots that hold no token yet
  Floats most = load(scores);
  for (int64_t i = lanes; i < padded; i += lanes) most = larger(most, load(scores + i));
  const float largest = largest_lane(most);
  Floats sum{};
  for (int64_t i = 0; i < padded; i += lanes) {
    const Floats weight = exp2(load(scores + i) - largest);
    store(scores + i, weight);
    sum += weight;
  }
  for (int64_t i = count; i < padded; ++i) scores[i] = 0;
  return static_cast<float>(sum_lanes(sum));
}

// The keys and values that a request has at one head.
struct Context {
  const int32_t* blocks;
  const float* head;  // of block 0
  int64_t block_stride, block_size, dim, count;

  const float* keys(int64_t block) const { return head + blocks[block] * block_stride; }
  const float* values(int64_t block) const { return keys(block) + block_size * dim; }
};

template <int queries>
void weighted_values(const Context& context, const float* weights, int64_t row, const float* shares, float* out) {
  const int64_t dim = context.dim, block_size = context.block_size;
  for (int64_t d = 0; d < dim; d += tile_tokens) {
    Floats sums[queries][tile_vectors] = {};
    for (int64_t first = 0, block = 0; first < context.count; first += block_size, ++block) {
      const float* values = context.values(block) + d;
      const int64_t last = least(block_size, context.count - first);
      for (int64_t i = 0; i < last; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v) {
          const Floats value = load(values + i * dim + v * lanes);
#pragma GCC unroll 4
          for (int n = 0; n < queries; ++n) sums[n][v] += weights[n * row + first + i] * value;
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < queries; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) store(out + n * dim + d + v * lanes, sums[n][v] * shares[n]);
  }
}

// `queries` heads of one token that share keys: q [queries, D], rotated and scaled, to out [queries, D].
template <int queries>
void attend(const Context& context, const float* q, float* scores, int64_t row, float* out) {
  const int64_t block_size = context.block_size, dim = context.dim;
  int64_t padded = 0;
  for (int64_t first = 0, block = 0; first < context.count; first += block_size, ++block) {
    const float* keys = context.keys(block);
    const int64_t last = least(block_size, context.count - first);
    for (int64_t i = 0; i < last;) {
      if (last - i <= tile_tokens / 2) {
        score<queries, tile_vectors / 2>(q, keys + i, dim, block_size, scores + first + i, row);
        i += tile_tokens / 2;
      } else {
        score<queries, tile_vectors>(q, keys + i, dim, block_size, scores + first + i, row);
        i += tile_tokens;
      }
      padded = first + i;
    }
  }
  float shares[queries];
  for (int n = 0; n < queries; ++n) shares[n] = 1.0f / weigh(scores + n * row, context.count, padded);
  weighted_values<queries>(context, scores, row, shares, out);
}

template <int queries = tile_queries>
void attend_some(int64_t count, const Context& context, const float* q, float* scores, int64_t row, float* out) {
  if (count == queries) return attend<queries>(context, q, scores, row, out);
  if constexpr (queries > 1) attend_some<queries - 1>(count, context, q, scores, row, out);
}
}  // namespace

void cache_tokens(const CachedAttention& in, int64_t begin, int64_t end) {
  const int64_t dim = in.head_dim, width = (in.heads + 2 * in.kv_heads) * dim;
  Room turned(dim);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t block = in.slots[token] / in.block_size, place = in.slots[token] % in.block_size;
    const float* key = in.qkv + token * width + in.heads * dim;
    const float* value = key + in.kv_heads * dim;
    for (int64_t head = 0; head < in.kv_heads; ++head, key += dim, value += dim) {
      float* keys = in.cache + block * in.block_stride + head * in.head_stride;
      rotate(key, in.angles + in.positions[token] * dim, dim, 1.0f, turned.data);
      for (int64_t d = 0; d < dim; ++d) keys[d * in.block_size + place] = turned.data[d];
      std::memcpy(keys + (in.block_size + place) * dim, value, static_cast<size_t>(dim) * sizeof(float));
    }
  }
}

void cached_attention(const CachedAttention& in, float* out, int64_t begin, int64_t end) {
  const int64_t dim = in.head_dim, width = (in.heads + 2 * in.kv_heads) * dim, group = in.heads / in.kv_heads;
  int64_t longest = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t count = in.positions[unit / in.kv_heads] + 1;
    longest = count > longest ? count : longest;
  }
  const int64_t row = (longest + cache_multiple - 1) / cache_multiple * cache_multiple;
  Room queries(tile_queries * dim), scores(tile_queries * row);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t token = unit / in.kv_heads, kv_head = unit % in.kv_heads, first = kv_head * group;
    const Context context{in.table + in.requests[token] * in.table_stride, in.cache + kv_head * in.head_stride,
                          in.block_stride, in.block_size, dim, in.positions[token] + 1};
    for (int64_t head = first; head < first + group; head += tile_queries) {
      const int64_t count = least(tile_queries, first + group - head);
      for (int64_t n = 0; n < count; ++n)
        rotate(in.qkv + token * width + (head + n) * dim, in.angles + in.positions[token] * dim, dim,
               static_cast<float>(in.scale * log2_e), queries.data + n * dim);
      attend_some(count, context, queries.data, scores.data, row, out + (token * in.heads + head) * dim);
    }
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
