// The operators of registration.cpp on the CPU: checks, memory, rows split over torch's threads, then the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "logprob/logprob.h"

namespace semion::cpu {
namespace {
constexpr int64_t work_per_thread = 1 << 15;  // elements below which another thread costs more than it brings

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
  semion::log_prob_join(floats(parts), parts.size(0), static_cast<const int64_t*>(targets.const_data_ptr()), num_rows,
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
}  // namespace
}  // namespace semion::cpu

STABLE_TORCH_LIBRARY_IMPL(semion, CPU, library) {
  library.impl("log_prob_parts", TORCH_BOX(&semion::cpu::log_prob_parts));
  library.impl("log_prob_join", TORCH_BOX(&semion::cpu::log_prob_join));
  library.impl("log_prob_backward", TORCH_BOX(&semion::cpu::log_prob_backward));
}
