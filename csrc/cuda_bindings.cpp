// The operators of registration.cpp on a GPU: checks, memory and the current stream, then the launchers. It never waits for
// the GPU, so what a tensor on it holds is not checked here: a target out of range makes its log-prob NaN, and bounds
// beyond the tokens are held within them. Unverified on a GPU so far.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "advantages/advantages_kernel.h"
#include "check.h"
#include "logprob/log_prob_kernel.h"
#include "logprob/sequences_kernel.h"
#include "memory.h"
#include "policy/policy_gradient_kernel.h"
#include "reshard/digest_kernel.h"

namespace semion::cuda {
namespace {
// Makes a tensor's device the current one for as long as it lives, and knows torch's stream there.
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

void check_launch(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(name) + " failed on the GPU: " + cudaGetErrorString(error));
}

int32_t count(const char* name, int64_t size) {
  if (size > std::numeric_limits<int32_t>::max()) refuse(name, " must be less than 2^31 on a GPU; found ", size);
  return static_cast<int32_t>(size);
}

const uint8_t* mask_of(const std::optional<Tensor>& mask) {
  return mask ? data<uint8_t>(*mask) : nullptr;
}

Tensor log_prob_parts(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_valid,
                      int64_t lowest_id, int64_t end_id, double temperature, bool every_row) {
  check_rows(logits, targets, num_valid, temperature);
  LogProbRows rows = rows_of(logits, targets, vocab_start, num_valid, temperature);
  rows.lowest_id = lowest_id, rows.end_id = end_id, rows.every_row = every_row;
  count("T", rows.num_rows);
  const OnDeviceOf device(logits);
  const int splits = semion_log_prob_splits(&rows);
  Tensor parts = new_tensor(logits, ScalarType::Float, 4, rows.num_rows);
  Tensor workspace = new_tensor(logits, ScalarType::Float, splits > 1 ? 3 * splits * rows.num_rows : 0);
  check_launch("log_prob_parts",
               semion_log_prob_parts(&rows, writable<float>(parts), writable<float>(workspace), device.stream));
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> log_prob_join(const Tensor& parts, const Tensor& targets, double temperature) {
  check_parts(parts, targets);
  const int64_t num_rows = targets.numel();
  const OnDeviceOf device(parts);
  Tensor log_probs = new_tensor(parts, ScalarType::Float, num_rows);
  Tensor entropy = new_tensor(parts, ScalarType::Float, num_rows);
  Tensor totals = new_tensor(parts, ScalarType::Float, 3, num_rows);
  check_launch("log_prob_join",
               semion_log_prob_join(data<float>(parts), parts.size(0), data<int64_t>(targets), count("T", num_rows),
                                    static_cast<float>(temperature), writable<float>(log_probs),
                                    writable<float>(entropy), writable<float>(totals), device.stream));
  return {log_probs, entropy, totals};
}

void log_prob_backward(const Tensor& logits, const Tensor& targets, const Tensor& totals, const Tensor& grad_log_prob,
                       const std::optional<Tensor>& grad_entropy, int64_t vocab_start, int64_t num_valid,
                       double temperature, Tensor out) {
  check_rows(logits, targets, num_valid, temperature);
  check_gradient(logits, totals, grad_log_prob, grad_entropy, out);
  const LogProbRows rows = rows_of(logits, targets, vocab_start, num_valid, temperature);
  count("T", rows.num_rows);
  const OnDeviceOf device(logits);
  const LogProbGradient gradient{data<float>(totals), data<float>(grad_log_prob),
                                 grad_entropy ? data<float>(*grad_entropy) : nullptr, out.mutable_data_ptr(), out.stride(0)};
  check_launch("log_prob_backward", semion_log_prob_backward(&rows, &gradient, device.stream));
}

Tensor sequence_sums(const Tensor& values, const Tensor& cu_seqlens, const std::optional<Tensor>& mask) {
  const int32_t num_tokens = count("T", values.numel());
  check_vector("token_log_probs", values, {ScalarType::Float}, "[T]");
  const int32_t num_sequences = count("B", check_bounds("cu_seqlens", cu_seqlens, "token_log_probs", values));
  check_mask(mask, num_tokens, "token_log_probs", values);
  const OnDeviceOf device(values);
  Tensor sums = new_tensor(values, ScalarType::Float, num_sequences);
  check_launch("sequence_sums", semion_sequence_sums(data<float>(values), data<int32_t>(cu_seqlens), mask_of(mask), num_tokens,
                                                     num_sequences, writable<float>(sums), device.stream));
  return sums;
}

Tensor sequence_sums_backward(const Tensor& grad_sums, const Tensor& cu_seqlens, const std::optional<Tensor>& mask,
                              int64_t num_tokens) {
  check_vector("grad_sums", grad_sums, {ScalarType::Float}, "[B]");
  const int32_t num_sequences = count("B", check_bounds("cu_seqlens", cu_seqlens, "grad_sums", grad_sums));
  check_shape("grad_sums", grad_sums, {num_sequences}, "[B]");
  check_mask(mask, num_tokens, "grad_sums", grad_sums);
  const OnDeviceOf device(grad_sums);
  Tensor grad_values = torch::stable::new_zeros(grad_sums, {num_tokens}, ScalarType::Float);
  check_launch("sequence_sums_backward",
               semion_sequence_sums_backward(data<float>(grad_sums), data<int32_t>(cu_seqlens), mask_of(mask),
                                             count("T", num_tokens), num_sequences, writable<float>(grad_values),
                                             device.stream));
  return grad_values;
}

std::tuple<Tensor, Tensor, Tensor> grouped_advantages(const Tensor& rewards, const Tensor& cu_groups, int64_t normalize) {
  const int32_t num_rewards = count("B", rewards.numel());
  check_vector("rewards", rewards, {ScalarType::Float, ScalarType::Double}, "[B]");
  const int32_t num_groups = count("G", check_bounds("cu_groups", cu_groups, "rewards", rewards));
  check_normalize(normalize);
  const OnDeviceOf device(rewards);
  Tensor advantages = torch::stable::new_zeros(rewards, {num_rewards}, rewards.scalar_type());
  Tensor no_signal = new_tensor(rewards, ScalarType::Bool, num_groups), broken = new_tensor(rewards, ScalarType::Long, 1);
  check_launch("grouped_advantages",
               semion_grouped_advantages(rewards.const_data_ptr(), rewards.scalar_type() == ScalarType::Double,
                                         data<int32_t>(cu_groups), num_rewards, num_groups, static_cast<int>(normalize),
                                         advantages.mutable_data_ptr(), writable<uint8_t>(no_signal),
                                         writable<int64_t>(broken), device.stream));
  return {advantages, no_signal, broken};
}

std::tuple<Tensor, Tensor> policy_gradient(const Tensor& log_probs, const Tensor& old_log_probs,
                                           const std::optional<Tensor>& reference_log_probs, const Tensor& advantages,
                                           const Tensor& cu_seqlens, const Tensor& targets, double clip_low,
                                           double clip_high, double dual_clip, double kl_weight) {
  const int32_t num_tokens = count("T", log_probs.numel());
  const int32_t num_sequences = count("B", check_bounds("cu_seqlens", cu_seqlens, "log_probs", log_probs));
  check_policy(log_probs, old_log_probs, reference_log_probs, advantages, targets, num_sequences, clip_low, clip_high,
               dual_clip);
  const PolicyGradientRow row = row_of(log_probs, old_log_probs, reference_log_probs, advantages, cu_seqlens, targets,
                                       clip_low, clip_high, dual_clip, kl_weight);
  const OnDeviceOf device(log_probs);
  Tensor sums = new_tensor(log_probs, ScalarType::Float, num_policy_sums);
  Tensor gradient = new_tensor(log_probs, ScalarType::Float, num_tokens);
  Tensor workspace = new_tensor(log_probs, ScalarType::Double, semion_policy_gradient_workspace(num_tokens));
  check_launch("policy_gradient", semion_policy_gradient(&row, writable<double>(workspace), writable<float>(sums),
                                                         writable<float>(gradient), device.stream));
  return {sums, gradient};
}

Tensor block_digests(const std::vector<Tensor>& blocks, const Tensor& columns, const std::vector<int64_t>& rows,
                     const std::vector<int64_t>& cols, const std::vector<int64_t>& seeds) {
  check_blocks(blocks, columns, rows, cols, seeds);
  std::vector<SemionDigestBlock> table;
  for (size_t i = 0; i < blocks.size(); ++i)
    table.push_back({blocks[i].const_data_ptr(), blocks[i].stride(0), data<uint64_t>(columns) + cols[i], blocks[i].size(0),
                     blocks[i].size(1), rows[i], static_cast<uint64_t>(seeds[i])});
  const int32_t element_size = table.empty() ? 1 : static_cast<int32_t>(blocks[0].element_size());
  const OnDeviceOf device(columns);
  Tensor digests = new_tensor(columns, ScalarType::Long, table.size());
  check_launch("block_digests", semion_block_digests(table.data(), count("N", static_cast<int64_t>(table.size())), element_size,
                                                     writable<uint64_t>(digests), device.stream));
  return digests;
}
}  // namespace
}  // namespace semion::cuda

STABLE_TORCH_LIBRARY_IMPL(semion, CUDA, library) {
  library.impl("log_prob_parts", TORCH_BOX(&semion::cuda::log_prob_parts));
  library.impl("log_prob_join", TORCH_BOX(&semion::cuda::log_prob_join));
  library.impl("log_prob_backward", TORCH_BOX(&semion::cuda::log_prob_backward));
  library.impl("sequence_sums", TORCH_BOX(&semion::cuda::sequence_sums));
  library.impl("sequence_sums_backward", TORCH_BOX(&semion::cuda::sequence_sums_backward));
  library.impl("grouped_advantages", TORCH_BOX(&semion::cuda::grouped_advantages));
  library.impl("policy_gradient", TORCH_BOX(&semion::cuda::policy_gradient));
  library.impl("block_digests", TORCH_BOX(&semion::cuda::block_digests));
}
