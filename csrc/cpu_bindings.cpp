// The operators of registration.cpp on the CPU: checks, memory, rows split over torch's threads, then the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "activation/swiglu.h"
#include "advantages/advantages.h"
#include "attention/cached_attention.h"
#include "attention/packed_attention.h"
#include "check.h"
#include "linear/few_rows.h"
#include "logprob/logprob.h"
#include "logprob/sequences.h"
#include "memory.h"
#include "norm/rms_norm.h"
#include "policy/policy_gradient.h"
#include "reshard/digest.h"
#include "sampling/sample_tokens.h"

namespace semion::cpu {
namespace {
constexpr int64_t work_per_thread = 1 << 17;  // elements below which another thread costs more than it brings

int64_t rows_per_thread(int64_t row_size) {
  return std::max<int64_t>(1, work_per_thread / std::max<int64_t>(1, row_size));
}

const float* floats(const Tensor& tensor) {
  return data<float>(tensor);
}

Tensor log_prob_parts(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_valid,
                      int64_t lowest_id, int64_t end_id, double temperature, bool every_row) {
  check_rows(logits, targets, num_valid, temperature);
  LogProbRows in = rows_of(logits, targets, vocab_start, num_valid, temperature);
  in.every_row = every_row;
  for (int64_t row = 0; row < in.num_rows; ++row) {
    const int64_t target = in.targets[row];
    if (target != ignored && (target < lowest_id || target >= end_id))
      refuse("targets[", row, "] must be ", ignored, " or in [", lowest_id, ", ", end_id, "); found ", target);
  }
  Tensor parts = new_tensor(logits, ScalarType::Float, 4, in.num_rows);
  float* out = writable<float>(parts);
  const auto kernel = SEMION_PICK(log_prob_parts);
  torch::stable::parallel_for(0, in.num_rows, rows_per_thread(num_valid),
                              [&](int64_t begin, int64_t end) { kernel(in, out, begin, end); });
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> log_prob_join(const Tensor& parts, const Tensor& targets, double temperature) {
  check_parts(parts, targets);
  const int64_t num_rows = targets.numel();
  Tensor log_probs = new_tensor(parts, ScalarType::Float, num_rows);
  Tensor entropy = new_tensor(parts, ScalarType::Float, num_rows);
  Tensor totals = new_tensor(parts, ScalarType::Float, 3, num_rows);
  SEMION_PICK(log_prob_join)(floats(parts), parts.size(0), data<int64_t>(targets), num_rows, temperature,
                             writable<float>(log_probs), writable<float>(entropy), writable<float>(totals), 0, num_rows);
  return {log_probs, entropy, totals};
}

void log_prob_backward(const Tensor& logits, const Tensor& targets, const Tensor& totals, const Tensor& grad_log_prob,
                       const std::optional<Tensor>& grad_entropy, int64_t vocab_start, int64_t num_valid,
                       double temperature, Tensor out) {
  check_rows(logits, targets, num_valid, temperature);
  check_gradient(logits, totals, grad_log_prob, grad_entropy, out);
  const LogProbRows in = rows_of(logits, targets, vocab_start, num_valid, temperature);
  const LogProbGradient gradient{floats(totals), floats(grad_log_prob), grad_entropy ? floats(*grad_entropy) : nullptr,
                                 out.mutable_data_ptr(), out.stride(0)};
  const auto kernel = SEMION_PICK(log_prob_backward);
  torch::stable::parallel_for(0, in.num_rows, rows_per_thread(in.num_columns),
                              [&](int64_t begin, int64_t end) { kernel(in, gradient, begin, end); });
}

const int32_t* bounds_of(const Tensor& tensor) {
  return data<int32_t>(tensor);
}

// The boundaries begin at 0, never fall, and end at the number of elements; their number less one.
int64_t check_rising(const char* name, const Tensor& bounds, const char* of, const Tensor& other, int64_t num_elements) {
  const int64_t num_parts = check_bounds(name, bounds, of, other);
  const int32_t* at = bounds_of(bounds);
  if (at[0] != 0) refuse(name, "[0] must be 0; found ", at[0]);
  for (int64_t i = 0; i < num_parts; ++i)
    if (at[i + 1] < at[i]) refuse(name, "[", i + 1, "] must be at least ", name, "[", i, "] = ", at[i], "; found ", at[i + 1]);
  if (at[num_parts] != num_elements)
    refuse(name, "[", num_parts, "] must be the length of ", of, " = ", num_elements, "; found ", at[num_parts]);
  return num_parts;
}

const bool* mask_of(const std::optional<Tensor>& mask) {
  return mask ? data<bool>(*mask) : nullptr;
}

Tensor sequence_sums(const Tensor& values, const Tensor& cu_seqlens, const std::optional<Tensor>& mask) {
  const int64_t num_tokens = values.numel();
  check_vector("token_log_probs", values, {ScalarType::Float}, "[T]");
  const int64_t num_sequences = check_rising("cu_seqlens", cu_seqlens, "token_log_probs", values, num_tokens);
  check_mask(mask, num_tokens, "token_log_probs", values);
  Tensor sums = new_tensor(values, ScalarType::Float, num_sequences);
  const int64_t grain = rows_per_thread(num_tokens / std::max<int64_t>(1, num_sequences));
  torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t begin, int64_t end) {
    semion::sequence_sums(floats(values), bounds_of(cu_seqlens), mask_of(mask), writable<float>(sums), begin, end);
  });
  return sums;
}

Tensor sequence_sums_backward(const Tensor& grad_sums, const Tensor& cu_seqlens, const std::optional<Tensor>& mask,
                              int64_t num_tokens) {
  check_vector("grad_sums", grad_sums, {ScalarType::Float}, "[B]");
  const int64_t num_sequences = check_rising("cu_seqlens", cu_seqlens, "token_log_probs", grad_sums, num_tokens);
  check_shape("grad_sums", grad_sums, {num_sequences}, "[B]");
  check_mask(mask, num_tokens, "grad_sums", grad_sums);
  Tensor grad_values = new_tensor(grad_sums, ScalarType::Float, num_tokens);
  semion::sequence_sums_backward(floats(grad_sums), bounds_of(cu_seqlens), mask_of(mask), writable<float>(grad_values), 0,
                                 num_sequences);
  return grad_values;
}

template <class Real>
int64_t run_groups(const Tensor& rewards, const Tensor& cu_groups, int64_t normalize, Tensor& advantages, Tensor& no_signal) {
  return semion::grouped_advantages(data<Real>(rewards), bounds_of(cu_groups), cu_groups.size(0) - 1,
                                    static_cast<Normalize>(normalize), writable<Real>(advantages), writable<bool>(no_signal));
}

std::tuple<Tensor, Tensor, Tensor> grouped_advantages(const Tensor& rewards, const Tensor& cu_groups, int64_t normalize) {
  const int64_t num_rewards = rewards.numel();
  check_vector("rewards", rewards, {ScalarType::Float, ScalarType::Double}, "[B]");
  const int64_t num_groups = check_rising("cu_groups", cu_groups, "rewards", rewards, num_rewards);
  check_normalize(normalize);
  Tensor advantages = new_tensor(rewards, rewards.scalar_type(), num_rewards);
  Tensor no_signal = new_tensor(rewards, ScalarType::Bool, num_groups), broken = new_tensor(rewards, ScalarType::Long, 1);
  const auto work = rewards.scalar_type() == ScalarType::Float ? run_groups<float> : run_groups<double>;
  *writable<int64_t>(broken) = work(rewards, cu_groups, normalize, advantages, no_signal);
  return {advantages, no_signal, broken};
}

std::tuple<Tensor, Tensor> policy_gradient(const Tensor& log_probs, const Tensor& old_log_probs,
                                           const std::optional<Tensor>& reference_log_probs, const Tensor& advantages,
                                           const Tensor& cu_seqlens, const Tensor& targets, double clip_low,
                                           double clip_high, double dual_clip, double kl_weight) {
  const int64_t num_tokens = log_probs.numel();
  const int64_t num_sequences = check_rising("cu_seqlens", cu_seqlens, "log_probs", log_probs, num_tokens);
  check_policy(log_probs, old_log_probs, reference_log_probs, advantages, targets, num_sequences, clip_low, clip_high,
               dual_clip);
  const PolicyGradientRow in = row_of(log_probs, old_log_probs, reference_log_probs, advantages, cu_seqlens, targets,
                                      clip_low, clip_high, dual_clip, kl_weight);
  Tensor sums = new_tensor(log_probs, ScalarType::Float, num_policy_sums);
  Tensor gradient = new_tensor(log_probs, ScalarType::Float, num_tokens);
  std::vector<double> by_sequence(static_cast<size_t>(num_sequences * num_policy_sums));
  const auto kernel = SEMION_PICK(policy_gradient);
  const int64_t grain = rows_per_thread(4 * num_tokens / std::max<int64_t>(1, num_sequences));
  torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t begin, int64_t end) {
    kernel(in, by_sequence.data(), writable<float>(gradient), begin, end);
  });
  for (int k = 0; k < num_policy_sums; ++k) {
    double total = 0;  // in the order of the sequences, whatever the threads
    for (int64_t i = 0; i < num_sequences; ++i) total += by_sequence[static_cast<size_t>(i * num_policy_sums + k)];
    writable<float>(sums)[k] = static_cast<float>(total);
  }
  return {sums, gradient};
}

Tensor block_digests(const std::vector<Tensor>& blocks, const Tensor& columns, const std::vector<int64_t>& rows,
                     const std::vector<int64_t>& cols, const std::vector<int64_t>& seeds) {
  check_blocks(blocks, columns, rows, cols, seeds);
  Tensor digests = new_tensor(columns, ScalarType::Long, blocks.size());
  const auto kernel = SEMION_PICK(block_digest);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Tensor& block = blocks[i];
    const DigestInput in{block.const_data_ptr(),
                         block.stride(0),
                         static_cast<int>(block.element_size()),
                         block.size(0),
                         block.size(1),
                         data<uint64_t>(columns) + cols[i],
                         rows[i],
                         static_cast<uint64_t>(seeds[i])};
    std::atomic<uint64_t> total = 0;  // the order of additions modulo 2^64 does not matter
    torch::stable::parallel_for(0, in.num_rows, rows_per_thread(in.num_columns),
                                [&](int64_t begin, int64_t end) { total += kernel(in, begin, end); });
    writable<uint64_t>(digests)[i] = total;
  }
  return digests;
}
// The segments that go on from none, each with those that go on from it, which must follow one another.
std::vector<Family> families_of(const int64_t* parents, int64_t num_segments) {
  std::vector<Family> families;
  std::vector<size_t> family_of(static_cast<size_t>(num_segments));
  for (int64_t i = 0; i < num_segments; ++i) {
    const int64_t parent = parents[i];
    if (parent == -1) {
      family_of[static_cast<size_t>(i)] = families.size();
      families.push_back({i, 0, 0});
      continue;
    }
    if (parent < 0 || parent >= i || parents[parent] >= 0)
      refuse("parents[", i, "] must be -1 or a segment before it that goes on from none; found ", parent);
    Family& family = families[family_of[static_cast<size_t>(parent)]];
    if (family.end_sample == 0) family.first_sample = family.end_sample = i;
    if (family.end_sample != i) refuse("segments of one parent must follow one another; found others before parents[", i, "]");
    family.end_sample = i + 1;
  }
  return families;
}

HeadRows heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

struct AttentionInput {
  std::vector<Family> families;
  PackedAttention in;

  AttentionInput(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cosines,
                 const std::optional<Tensor>& sines, const Tensor& bounds, const Tensor& parents, double scale) {
    check_attention(q, k, v, cosines, sines, bounds, parents, scale);
    const int64_t num_segments = check_rising("cu_seqlens", bounds, "q", q, q.size(0));
    families = families_of(data<int64_t>(parents), num_segments);
    in = {heads_of(q), heads_of(k), heads_of(v), cosines ? cosines->const_data_ptr() : nullptr,
          sines ? sines->const_data_ptr() : nullptr, bounds_of(bounds), families.data(), q.size(0),
          static_cast<int32_t>(q.size(1)), static_cast<int32_t>(k.size(1)), static_cast<int32_t>(q.size(2)),
          static_cast<float>(scale), element_of(q)};
  }

  int64_t units() const {
    return static_cast<int64_t>(families.size()) * in.kv_heads;
  }
};

std::tuple<Tensor, Tensor> packed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const std::optional<Tensor>& cosines, const std::optional<Tensor>& sines,
                                            const Tensor& cu_seqlens, const Tensor& parents, double scale) {
  const AttentionInput input(q, k, v, cosines, sines, cu_seqlens, parents, scale);
  Tensor output = new_tensor(q, q.scalar_type(), q.size(0), q.size(1), q.size(2));
  Tensor sums = new_tensor(q, ScalarType::Float, q.size(1), q.size(0));
  const AttentionOutput out{output.mutable_data_ptr(), writable<float>(sums)};
  const auto kernel = SEMION_PICK(packed_attention);
  torch::stable::parallel_for(0, input.units(), 1, [&](int64_t begin, int64_t end) { kernel(input.in, out, begin, end); });
  return {output, sums};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cosines,
    const std::optional<Tensor>& sines, const Tensor& cu_seqlens, const Tensor& parents, const Tensor& output,
    const Tensor& sums, double scale) {
  const AttentionInput input(q, k, v, cosines, sines, cu_seqlens, parents, scale);
  const int64_t num_tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  check_heads("gradient", gradient, q, heads);
  check("output", output, q.scalar_type(), {num_tokens, heads, dim}, "[T, N, D]", "q", q);
  check("sums", sums, ScalarType::Float, {heads, num_tokens}, "[N, T]", "q", q);
  Tensor dq = new_tensor(q, q.scalar_type(), num_tokens, heads, dim);
  Tensor dk = new_tensor(q, q.scalar_type(), num_tokens, k.size(1), dim);
  Tensor dv = new_tensor(q, q.scalar_type(), num_tokens, k.size(1), dim);
  const AttentionGradient back{heads_of(gradient),    output.const_data_ptr(), floats(sums), dq.mutable_data_ptr(),
                               dk.mutable_data_ptr(), dv.mutable_data_ptr()};
  const auto kernel = SEMION_PICK(packed_attention_backward);
  torch::stable::parallel_for(0, input.units(), 1, [&](int64_t begin, int64_t end) { kernel(input.in, back, begin, end); });
  return {dq, dk, dv};
}

// Of each token its request; positions, slots and blocks are where there is something.
std::vector<int32_t> requests_of(const CachedAttention& in, const Tensor& qkv, const Tensor& starts, const Tensor& table,
                                 int64_t num_positions, int64_t num_blocks) {
  const int64_t num_requests = check_rising("starts", starts, "qkv", qkv, in.num_tokens);
  if (table.size(0) < num_requests)
    refuse("table must have a row for each of ", num_requests, " requests; found ", table.size(0));
  std::vector<int32_t> requests(static_cast<size_t>(in.num_tokens));
  for (int64_t request = 0; request < num_requests; ++request) {
    for (int64_t token = bounds_of(starts)[request]; token < bounds_of(starts)[request + 1]; ++token) {
      requests[static_cast<size_t>(token)] = static_cast<int32_t>(request);
      const int64_t position = in.positions[token], slot = in.slots[token];
      if (position < 0 || position >= num_positions)
        refuse("positions[", token, "] must be in [0, ", num_positions, "); found ", position);
      if (slot < 0 || slot >= num_blocks * in.block_size)
        refuse("slots[", token, "] must be in [0, ", num_blocks * in.block_size, "); found ", slot);
      const int64_t last = position / in.block_size;
      if (last >= table.size(1))
        refuse("table must have the block of position ", position, ", the ", last, "th; found ", table.size(1), " columns");
      for (int64_t block = 0; block <= last; ++block)
        if (const int32_t at = in.table[request * in.table_stride + block]; at < 0 || at >= num_blocks)
          refuse("table[", request, ", ", block, "] must be in [0, ", num_blocks, "); found ", at);
    }
  }
  return requests;
}

Tensor cached_attention(const Tensor& qkv, const Tensor& positions, const Tensor& slots, const Tensor& starts,
                        const Tensor& table, const Tensor& angles, Tensor cache, double scale) {
  const int64_t heads = check_cached_attention(qkv, positions, slots, table, angles, cache, scale, cache_multiple);
  const int64_t num_tokens = qkv.size(0), kv_heads = cache.size(1), dim = cache.size(3) / 2;
  CachedAttention in{floats(qkv),      data<int64_t>(positions), data<int64_t>(slots), nullptr,         data<int32_t>(table),
                     floats(angles),   writable<float>(cache),   table.stride(0),      cache.stride(0), cache.stride(1),
                     num_tokens,       heads,                    kv_heads,             dim,             cache.size(2),
                     static_cast<float>(scale)};
  const std::vector<int32_t> requests = requests_of(in, qkv, starts, table, angles.size(0), cache.size(0));
  in.requests = requests.data();
  Tensor out = new_tensor(qkv, ScalarType::Float, num_tokens, heads * dim);
  const auto write = SEMION_PICK(cache_tokens);
  const auto attend = SEMION_PICK(cached_attention);
  int64_t read = 0;  // numbers of the cache, of one head
  for (int64_t token = 0; token < num_tokens; ++token) read += 2 * dim * (in.positions[token] + 1);
  torch::stable::parallel_for(0, num_tokens, rows_per_thread(2 * kv_heads * dim),
                              [&](int64_t begin, int64_t end) { write(in, begin, end); });
  float* to = writable<float>(out);
  torch::stable::parallel_for(0, num_tokens * kv_heads, rows_per_thread(read / std::max<int64_t>(1, num_tokens)),
                              [&](int64_t begin, int64_t end) { attend(in, to, begin, end); });
  return out;
}

Tensor swiglu(const Tensor& x) {
  check_swiglu(x);
  Tensor out = new_tensor(x, x.scalar_type(), x.size(0), x.size(1) / 2);
  const SwigluRows rows{x.const_data_ptr(), nullptr, out.mutable_data_ptr(), x.size(1) / 2, element_of(x)};
  const auto kernel = SEMION_PICK(swiglu);
  torch::stable::parallel_for(0, x.size(0), rows_per_thread(x.size(1)),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  return out;
}

Tensor swiglu_backward(const Tensor& gradient, const Tensor& x) {
  check_swiglu(x);
  check("gradient", gradient, x.scalar_type(), {x.size(0), x.size(1) / 2}, "[T, F]", "x", x);
  Tensor out = new_tensor(x, x.scalar_type(), x.size(0), x.size(1));
  const SwigluRows rows{x.const_data_ptr(), gradient.const_data_ptr(), out.mutable_data_ptr(), x.size(1) / 2, element_of(x)};
  const auto kernel = SEMION_PICK(swiglu_backward);
  torch::stable::parallel_for(0, x.size(0), rows_per_thread(x.size(1)),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_norm(x, weight, epsilon);
  Tensor out = new_tensor(x, x.scalar_type(), x.size(0), x.size(1));
  Tensor scales = new_tensor(x, ScalarType::Float, x.size(0));
  const NormRows rows{x.const_data_ptr(), weight.const_data_ptr(), x.size(0), x.size(1), epsilon, element_of(x)};
  void* to = out.mutable_data_ptr();
  float* kept = writable<float>(scales);
  const auto kernel = SEMION_PICK(rms_norm);
  torch::stable::parallel_for(0, x.size(0), rows_per_thread(x.size(1)),
                              [&](int64_t begin, int64_t end) { kernel(rows, to, kept, begin, end); });
  return {out, scales};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                             const Tensor& scales) {
  check_norm(x, weight, 0);
  check("gradient", gradient, x.scalar_type(), {x.size(0), x.size(1)}, "[T, H]", "x", x);
  check("scales", scales, ScalarType::Float, {x.size(0)}, "[T]", "x", x);
  const int64_t num_blocks = (x.size(0) + norm_block - 1) / norm_block;
  Tensor of_x = new_tensor(x, x.scalar_type(), x.size(0), x.size(1));
  Tensor parts = new_tensor(x, ScalarType::Float, num_blocks, x.size(1));
  Tensor of_weight = new_tensor(x, x.scalar_type(), x.size(1));
  const NormRows rows{x.const_data_ptr(), weight.const_data_ptr(), x.size(0), x.size(1), 0, element_of(x)};
  const NormGradient back{gradient.const_data_ptr(), floats(scales), of_x.mutable_data_ptr(), writable<float>(parts)};
  const auto kernel = SEMION_PICK(rms_norm_backward);
  torch::stable::parallel_for(0, num_blocks, std::max<int64_t>(1, rows_per_thread(x.size(1)) / norm_block),
                              [&](int64_t begin, int64_t end) { kernel(rows, back, begin, end); });
  SEMION_PICK(rms_norm_weight)(floats(parts), num_blocks, x.size(1), rows.element, of_weight.mutable_data_ptr());
  return {of_x, of_weight};
}

Tensor few_rows_product(const Tensor& x, const Tensor& weight) {
  check_type("x", x, {ScalarType::Float});
  if (x.dim() != 2) refuse("x must have shape [T, H]; found ", shape_of(x));
  if (weight.dim() != 2) refuse("weight must have shape [N, H]; found ", shape_of(weight));
  check("x", x, ScalarType::Float, {x.size(0), x.size(1)}, "[T, H]", "weight", weight);
  check("weight", weight, ScalarType::Float, {weight.size(0), x.size(1)}, "[N, H]", "x", x);
  Tensor out = new_tensor(x, ScalarType::Float, x.size(0), weight.size(0));
  const FewRows rows{floats(x), floats(weight), writable<float>(out), x.size(0), weight.size(0), x.size(1)};
  const int64_t num_blocks = (rows.width + linear_block - 1) / linear_block;
  const auto kernel = SEMION_PICK(few_rows_product);
  torch::stable::parallel_for(0, num_blocks, rows_per_thread(linear_block * x.numel() / 8),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sample_tokens(const Tensor& logits, const Tensor& temperatures, const Tensor& seeds,
                                                 bool raw) {
  check_sampling(logits, temperatures, seeds);
  const int64_t num_rows = logits.size(0), width = logits.size(1);
  for (int64_t row = 0; row < num_rows; ++row)
    if (const float value = floats(temperatures)[row]; !(value > 0 && std::isfinite(value)))
      refuse("temperatures[", row, "] must be greater than 0 and finite; found ", value);
  Tensor tokens = new_tensor(logits, ScalarType::Long, num_rows);
  Tensor log_probs = new_tensor(logits, ScalarType::Float, num_rows);
  Tensor ranks = new_tensor(logits, ScalarType::Long, num_rows);
  const SampleRows rows{logits.const_data_ptr(), logits.stride(0), floats(temperatures), data<int64_t>(seeds), width,
                        element_of(logits), raw};
  const Samples out{writable<int64_t>(tokens), writable<float>(log_probs), writable<int64_t>(ranks)};
  const auto kernel = SEMION_PICK(sample_tokens);
  torch::stable::parallel_for(0, num_rows, rows_per_thread(width),
                              [&](int64_t begin, int64_t end) { kernel(rows, out, begin, end); });
  return {tokens, log_probs, ranks};
}
}  // namespace
}  // namespace semion::cpu

STABLE_TORCH_LIBRARY_IMPL(semion, CPU, library) {
  library.impl("log_prob_parts", TORCH_BOX(&semion::cpu::log_prob_parts));
  library.impl("log_prob_join", TORCH_BOX(&semion::cpu::log_prob_join));
  library.impl("log_prob_backward", TORCH_BOX(&semion::cpu::log_prob_backward));
  library.impl("sequence_sums", TORCH_BOX(&semion::cpu::sequence_sums));
  library.impl("sequence_sums_backward", TORCH_BOX(&semion::cpu::sequence_sums_backward));
  library.impl("grouped_advantages", TORCH_BOX(&semion::cpu::grouped_advantages));
  library.impl("policy_gradient", TORCH_BOX(&semion::cpu::policy_gradient));
  library.impl("packed_attention", TORCH_BOX(&semion::cpu::packed_attention));
  library.impl("packed_attention_backward", TORCH_BOX(&semion::cpu::packed_attention_backward));
  library.impl("cached_attention", TORCH_BOX(&semion::cpu::cached_attention));
  library.impl("swiglu", TORCH_BOX(&semion::cpu::swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&semion::cpu::swiglu_backward));
  library.impl("rms_norm", TORCH_BOX(&semion::cpu::rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&semion::cpu::rms_norm_backward));
  library.impl("few_rows_product", TORCH_BOX(&semion::cpu::few_rows_product));
  library.impl("sample_tokens", TORCH_BOX(&semion::cpu::sample_tokens));
  library.impl("block_digests", TORCH_BOX(&semion::cpu::block_digests));
}
