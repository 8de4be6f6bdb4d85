// The operators of registration.cpp on the CPU: checks, memory, rows split over torch's threads, then the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "advantages/advantages.h"
#include "check.h"
#include "logprob/logprob.h"
#include "logprob/sequences.h"
#include "policy/policy_gradient.h"
#include "reshard/digest.h"

namespace semion::cpu {
namespace {
constexpr int64_t work_per_thread = 1 << 17;  // elements below which another thread costs more than it brings

int64_t rows_per_thread(int64_t row_size) {
  return std::max<int64_t>(1, work_per_thread / std::max<int64_t>(1, row_size));
}

template <class... Sizes>
Tensor new_tensor(const Tensor& like, ScalarType type, Sizes... sizes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(sizes)...}, type);
}

Element element_of(const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  return type == ScalarType::Float ? Element::float32 : type == ScalarType::Half ? Element::float16 : Element::bfloat16;
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* writable(Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

LogProbInput input_of(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_valid,
                      double temperature) {
  check_logits("logits", logits);
  check_type("targets", targets, {ScalarType::Long});
  check_shape("targets", targets, {logits.size(0)}, "[T]");
  check_device("targets", targets, "logits", logits);
  if (num_valid < 0 || num_valid > logits.size(1))
    refuse("num_valid of this rank must be in [0, ", logits.size(1), "]; found ", num_valid);
  if (!(temperature > 0)) refuse("temperature must be greater than 0; found ", temperature);
  return {logits.const_data_ptr(),
          logits.stride(0),
          element_of(logits),
          static_cast<const int64_t*>(targets.const_data_ptr()),
          logits.size(0),
          vocab_start,
          logits.size(1),
          num_valid,
          temperature,
          true};
}

Tensor log_prob_parts(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_valid,
                      int64_t lowest_id, int64_t end_id, double temperature, bool every_row) {
  LogProbInput in = input_of(logits, targets, vocab_start, num_valid, temperature);
  in.every_row = every_row;
  for (int64_t row = 0; row < in.num_rows; ++row) {
    const int64_t target = in.targets[row];
    if (target != ignored && (target < lowest_id || target >= end_id))
      refuse("targets[", row, "] must be ", ignored, " or in [", lowest_id, ", ", end_id, "); found ", target);
  }
  Tensor parts = new_tensor(logits, ScalarType::Float, 4, in.num_rows);
  float* out = writable(parts);
  const auto kernel = SEMION_PICK(log_prob_parts);
  torch::stable::parallel_for(0, in.num_rows, rows_per_thread(num_valid),
                              [&](int64_t begin, int64_t end) { kernel(in, out, begin, end); });
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> log_prob_join(const Tensor& parts, const Tensor& targets, double temperature) {
  const int64_t num_rows = targets.numel();
  check_type("parts", parts, {ScalarType::Float});
  check_shape("parts", parts, {parts.size(0), 4, num_rows}, "[R, 4, T]");
  check_type("targets", targets, {ScalarType::Long});
  Tensor log_probs = new_tensor(parts, ScalarType::Float, num_rows);
  Tensor entropy = new_tensor(parts, ScalarType::Float, num_rows);
  Tensor totals = new_tensor(parts, ScalarType::Float, 3, num_rows);
  SEMION_PICK(log_prob_join)(floats(parts), parts.size(0), static_cast<const int64_t*>(targets.const_data_ptr()), num_rows,
                             temperature, writable(log_probs), writable(entropy), writable(totals), 0, num_rows);
  return {log_probs, entropy, totals};
}

void log_prob_backward(const Tensor& logits, const Tensor& targets, const Tensor& totals, const Tensor& grad_log_prob,
                       const std::optional<Tensor>& grad_entropy, int64_t vocab_start, int64_t num_valid,
                       double temperature, Tensor out) {
  const LogProbInput in = input_of(logits, targets, vocab_start, num_valid, temperature);
  check_type("totals", totals, {ScalarType::Float});
  check_shape("totals", totals, {3, in.num_rows}, "[3, T]");
  check_type("grad_log_prob", grad_log_prob, {ScalarType::Float});
  check_shape("grad_log_prob", grad_log_prob, {in.num_rows}, "[T]");
  if (grad_entropy) {
    check_type("grad_entropy", *grad_entropy, {ScalarType::Float});
    check_shape("grad_entropy", *grad_entropy, {in.num_rows}, "[T]");
  }
  check_logits("out", out);
  check_type("out", out, {logits.scalar_type()});
  if (out.size(0) != in.num_rows || out.size(1) != in.num_columns)
    refuse("out must have the shape of logits = ", shape_of(logits), "; found ", shape_of(out));
  const LogProbGradient gradient{floats(totals), floats(grad_log_prob), grad_entropy ? floats(*grad_entropy) : nullptr,
                                 out.mutable_data_ptr(), out.stride(0)};
  const auto kernel = SEMION_PICK(log_prob_backward);
  torch::stable::parallel_for(0, in.num_rows, rows_per_thread(in.num_columns),
                              [&](int64_t begin, int64_t end) { kernel(in, gradient, begin, end); });
}

// Boundaries that begin at 0, never fall, and end at the number of elements; their number less one.
int64_t check_bounds(const char* name, const Tensor& bounds, const char* of, int64_t num_elements) {
  check_type(name, bounds, {ScalarType::Int});
  if (bounds.dim() != 1 || bounds.size(0) < 1)
    refuse(name, " must have shape [parts + 1] with at least one element; found ", shape_of(bounds));
  check_shape(name, bounds, {bounds.size(0)}, "[parts + 1]");
  const int32_t* at = static_cast<const int32_t*>(bounds.const_data_ptr());
  const int64_t num_parts = bounds.size(0) - 1;
  if (at[0] != 0) refuse(name, "[0] must be 0; found ", at[0]);
  for (int64_t i = 0; i < num_parts; ++i)
    if (at[i + 1] < at[i]) refuse(name, "[", i + 1, "] must be at least ", name, "[", i, "] = ", at[i], "; found ", at[i + 1]);
  if (at[num_parts] != num_elements)
    refuse(name, "[", num_parts, "] must be the length of ", of, " = ", num_elements, "; found ", at[num_parts]);
  return num_parts;
}

const int32_t* bounds_of(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

void check_floats(const char* name, const Tensor& tensor, int64_t size, const char* legend) {
  check_type(name, tensor, {ScalarType::Float});
  check_shape(name, tensor, {size}, legend);
}

const bool* mask_of(const std::optional<Tensor>& mask, int64_t num_tokens) {
  if (!mask) return nullptr;
  check_type("mask", *mask, {ScalarType::Bool});
  check_shape("mask", *mask, {num_tokens}, "[T]");
  return static_cast<const bool*>(mask->const_data_ptr());
}

Tensor sequence_sums(const Tensor& values, const Tensor& cu_seqlens, const std::optional<Tensor>& mask) {
  const int64_t num_tokens = values.numel();
  check_floats("token_log_probs", values, num_tokens, "[T]");
  const int64_t num_sequences = check_bounds("cu_seqlens", cu_seqlens, "token_log_probs", num_tokens);
  const bool* counted = mask_of(mask, num_tokens);
  Tensor sums = new_tensor(values, ScalarType::Float, num_sequences);
  const int64_t grain = rows_per_thread(num_tokens / std::max<int64_t>(1, num_sequences));
  torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t begin, int64_t end) {
    semion::sequence_sums(floats(values), bounds_of(cu_seqlens), counted, writable(sums), begin, end);
  });
  return sums;
}

Tensor sequence_sums_backward(const Tensor& grad_sums, const Tensor& cu_seqlens, const std::optional<Tensor>& mask,
                              int64_t num_tokens) {
  const int64_t num_sequences = check_bounds("cu_seqlens", cu_seqlens, "token_log_probs", num_tokens);
  check_floats("grad_sums", grad_sums, num_sequences, "[B]");
  const bool* counted = mask_of(mask, num_tokens);
  Tensor grad_values = new_tensor(grad_sums, ScalarType::Float, num_tokens);
  semion::sequence_sums_backward(floats(grad_sums), bounds_of(cu_seqlens), counted, writable(grad_values), 0, num_sequences);
  return grad_values;
}

template <class Real>
int64_t run_groups(const Tensor& rewards, const Tensor& cu_groups, int64_t normalize, Tensor& advantages, Tensor& no_signal) {
  return semion::grouped_advantages(static_cast<const Real*>(rewards.const_data_ptr()), bounds_of(cu_groups),
                                    cu_groups.size(0) - 1, static_cast<Normalize>(normalize),
                                    static_cast<Real*>(advantages.mutable_data_ptr()),
                                    static_cast<bool*>(no_signal.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor> grouped_advantages(const Tensor& rewards, const Tensor& cu_groups, int64_t normalize) {
  const int64_t num_rewards = rewards.numel();
  check_type("rewards", rewards, {ScalarType::Float, ScalarType::Double});
  check_shape("rewards", rewards, {num_rewards}, "[B]");
  const int64_t num_groups = check_bounds("cu_groups", cu_groups, "rewards", num_rewards);
  if (normalize < 0 || normalize > 2) refuse("normalize must be 0, 1 or 2; found ", normalize);
  Tensor advantages = new_tensor(rewards, rewards.scalar_type(), num_rewards);
  Tensor no_signal = new_tensor(rewards, ScalarType::Bool, num_groups), broken = new_tensor(rewards, ScalarType::Long, 1);
  const auto work = rewards.scalar_type() == ScalarType::Float ? run_groups<float> : run_groups<double>;
  *static_cast<int64_t*>(broken.mutable_data_ptr()) = work(rewards, cu_groups, normalize, advantages, no_signal);
  return {advantages, no_signal, broken};
}

std::tuple<Tensor, Tensor> policy_gradient(const Tensor& log_probs, const Tensor& old_log_probs,
                                           const std::optional<Tensor>& reference_log_probs, const Tensor& advantages,
                                           const Tensor& cu_seqlens, const Tensor& targets, double clip_ratio,
                                           double kl_weight) {
  const int64_t num_tokens = log_probs.numel();
  check_floats("log_probs", log_probs, num_tokens, "[T]");
  check_floats("old_log_probs", old_log_probs, num_tokens, "[T]");
  if (reference_log_probs) check_floats("reference_log_probs", *reference_log_probs, num_tokens, "[T]");
  const int64_t num_sequences = check_bounds("cu_seqlens", cu_seqlens, "log_probs", num_tokens);
  check_floats("advantages", advantages, num_sequences, "[B]");
  check_type("targets", targets, {ScalarType::Long});
  check_shape("targets", targets, {num_tokens}, "[T]");
  if (!(clip_ratio >= 0)) refuse("clip_ratio must be at least 0; found ", clip_ratio);
  const PolicyGradientInput in{floats(log_probs),
                               floats(old_log_probs),
                               reference_log_probs ? floats(*reference_log_probs) : nullptr,
                               floats(advantages),
                               bounds_of(cu_seqlens),
                               static_cast<const int64_t*>(targets.const_data_ptr()),
                               static_cast<float>(clip_ratio),
                               static_cast<float>(kl_weight)};
  Tensor sums = new_tensor(log_probs, ScalarType::Float, num_policy_sums);
  Tensor gradient = new_tensor(log_probs, ScalarType::Float, num_tokens);
  std::vector<double> by_sequence(static_cast<size_t>(num_sequences * num_policy_sums));
  const auto kernel = SEMION_PICK(policy_gradient);
  const int64_t grain = rows_per_thread(4 * num_tokens / std::max<int64_t>(1, num_sequences));
  torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t begin, int64_t end) {
    kernel(in, by_sequence.data(), writable(gradient), begin, end);
  });
  for (int k = 0; k < num_policy_sums; ++k) {
    double total = 0;  // in the order of the sequences, whatever the threads
    for (int64_t i = 0; i < num_sequences; ++i) total += by_sequence[static_cast<size_t>(i * num_policy_sums + k)];
    writable(sums)[k] = static_cast<float>(total);
  }
  return {sums, gradient};
}

Tensor block_digest(const Tensor& block, const Tensor& columns, int64_t row, int64_t col, int64_t seed) {
  check_block(block, columns, row, col);
  const DigestInput in{block.const_data_ptr(),
                       block.stride(0),
                       static_cast<int>(block.element_size()),
                       block.size(0),
                       block.size(1),
                       static_cast<const uint64_t*>(columns.const_data_ptr()) + col,
                       row,
                       static_cast<uint64_t>(seed)};
  std::atomic<uint64_t> total = 0;  // the order of additions modulo 2^64 does not matter
  const auto kernel = SEMION_PICK(block_digest);
  torch::stable::parallel_for(0, in.num_rows, rows_per_thread(in.num_columns),
                              [&](int64_t begin, int64_t end) { total += kernel(in, begin, end); });
  Tensor digest = new_tensor(block, ScalarType::Long, 1);
  *static_cast<uint64_t*>(digest.mutable_data_ptr()) = total;
  return digest;
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
  library.impl("block_digest", TORCH_BOX(&semion::cpu::block_digest));
}
