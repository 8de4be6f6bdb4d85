// Causal attention inside the segments of a packed row, where a segment may go on from another one, its prompt: it then attends
// to the whole of that and, causally, to itself. Queries and keys are rotated on the way in, their gradients on the way out.
// A family, which is a prompt with its samples or a segment alone, is the unit of work for each key-value head: nothing is
// shared between units, so that sums have one order whatever the number of threads.
#pragma once

#include <cstdint>

#include "../dispatch.h"
#include "../element.h"

namespace semion {
// [T, heads, D] of any strides over tokens and heads; the elements of a head are adjacent.
struct HeadRows {
  const void* data;
  int64_t token_stride, head_stride;
};

// A segment that goes on from none, and the segments from `first_sample` to `end_sample` that go on from it.
struct Family {
  int64_t prompt, first_sample, end_sample;
};

struct PackedAttention {
  HeadRows q, k, v;      // N, M and M heads; N is a multiple of M
  const void* cosines;   // [T, D / 2] of the elements' type, or null: nothing is rotated
  const void* sines;
  const int32_t* bounds;  // [segments + 1]
  const Family* families;
  int64_t num_tokens;
  int32_t heads, kv_heads, head_dim;
  float scale;
  Element element;
};

struct AttentionOutput {
  void* output;  // [T, N, D]
  float* sums;   // [N, T]: log-sum-exps of the scaled scores
};

struct AttentionGradient {
  HeadRows gradient;   // of the output
  const void* output;  // [T, N, D]
  const float* sums;   // [N, T]
  void *q, *k, *v;     // [T, N, D], [T, M, D], [T, M, D]
};
}  // namespace semion

// Units begin to end of families x M; unit u is head u % M of family u / M.
SEMION_DECLARE(void, packed_attention, const PackedAttention& in, const AttentionOutput& out, int64_t begin, int64_t end)
SEMION_DECLARE(void, packed_attention_backward, const PackedAttention& in, const AttentionGradient& gradient, int64_t begin,
               int64_t end)
