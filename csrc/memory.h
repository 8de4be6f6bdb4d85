// What the bindings of both devices do with memory and types: new tensors beside another, typed pointers, and the plain
// rows that the kernels take. It checks nothing: check.h does.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "logprob/rows.h"
#include "policy/row.h"

namespace semion {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Sizes>
Tensor new_tensor(const Tensor& like, ScalarType type, Sizes... sizes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(sizes)...}, type);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* writable(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Element element_of(const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  return type == ScalarType::Float ? Element::float32 : type == ScalarType::Half ? Element::float16 : Element::bfloat16;
}

inline LogProbRows rows_of(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_valid,
                           double temperature) {
  LogProbRows rows{};
  rows.logits = logits.const_data_ptr();
  rows.row_stride = logits.stride(0);
  rows.targets = data<int64_t>(targets);
  rows.num_rows = logits.size(0);
  rows.vocab_start = vocab_start;
  rows.temperature = temperature;
  rows.element = element_of(logits);
  rows.num_columns = static_cast<int32_t>(logits.size(1));
  rows.num_valid = static_cast<int32_t>(num_valid);
  return rows;
}

inline PolicyGradientRow row_of(const Tensor& log_probs, const Tensor& old_log_probs,
                                const std::optional<Tensor>& reference_log_probs, const Tensor& advantages,
                                const Tensor& cu_seqlens, const Tensor& targets, double clip_low, double clip_high,
                                double dual_clip, double kl_weight) {
  return {data<float>(log_probs),
          data<float>(old_log_probs),
          reference_log_probs ? data<float>(*reference_log_probs) : nullptr,
          data<float>(advantages),
          data<int32_t>(cu_seqlens),
          data<int64_t>(targets),
          static_cast<int32_t>(log_probs.numel()),
          static_cast<int32_t>(advantages.numel()),
          static_cast<float>(clip_low),
          static_cast<float>(clip_high),
          static_cast<float>(dual_clip),
          static_cast<float>(kl_weight)};
}
}  // namespace semion
