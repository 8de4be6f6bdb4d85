// Attention of the tokens of an iteration of an engine to the keys and values of its cache, float32: queries and keys are
// rotated, the new keys and values written to their slots, then every token attends to its request's positions up to its own.
// Nothing is shared between tokens, so that a token's output depends on its own request alone, and not on what is beside it.
#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace semion {
// A block of the cache has, for each head, B tokens' keys as [D, B] and then their values as [B, D]: the form of vLLM's
// attention on CPUs. Vectors go along B, so B is a multiple of the longest, and so is D.
constexpr int64_t cache_multiple = 32;

struct CachedAttention {
  const float* qkv;          // [T, (N + 2 M) D], contiguous: queries, keys and values; N is a multiple of M
  const int64_t* positions;  // [T] in [0, P)
  const int64_t* slots;      // [T]: block * B + place, where the token's key and value go
  const int32_t* requests;   // [T]: row of the table
  const int32_t* table;      // [R, at least those of the longest request]: its blocks, in the order of positions
  const float* angles;       // [P, D]: of a position D / 2 cosines, then the sines
  float* cache;
  int64_t table_stride, block_stride, head_stride;
  int64_t num_tokens, heads, kv_heads, head_dim, block_size;
  float scale;
};
}  // namespace semion

// Writes the keys and values of tokens [begin, end).
SEMION_DECLARE(void, cache_tokens, const CachedAttention& in, int64_t begin, int64_t end)
// Units [begin, end) of T x M into out [T, N D], once all tokens are written; unit u is head u % M of token u / M.
SEMION_DECLARE(void, cached_attention, const CachedAttention& in, float* out, int64_t begin, int64_t end)
