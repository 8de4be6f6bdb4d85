// Checks of an operator's arguments: each failure is one sentence that names argument, rule and value, and becomes a
// ValueError in Python. Bindings of both devices use it; it reads shapes and types, never a tensor's contents.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace semion {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) text << (axis ? ", " : "") << tensor.size(axis);
  text << ']';
  return text.str();
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "another type";
  }
}

// The tensor has one of these types.
inline void check_type(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> types) {
  std::string wanted;
  for (const ScalarType type : types) {
    if (tensor.scalar_type() == type) return;
    wanted += (wanted.empty() ? "" : " or ") + std::string(name_of(type));
  }
  refuse(name, " must be ", wanted, "; found ", name_of(tensor.scalar_type()));
}

// The tensor has this shape, lies on the device of `other`, and is contiguous.
inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, const char* legend) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) same = same && tensor.size(axis++) == size;
  if (!same) {
    std::ostringstream wanted;
    for (const int64_t size : shape) wanted << (wanted.tellp() ? ", " : "") << size;
    refuse(name, " must have shape ", legend, " = [", wanted.str(), "]; found ", shape_of(tensor));
  }
  if (!tensor.is_contiguous()) refuse(name, " must be contiguous; found strides that are not: call .contiguous()");
}

inline void check_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  if (tensor.is_cuda() != other.is_cuda() || tensor.get_device_index() != other.get_device_index())
    refuse(name, " must be on the device of ", other_name, "; found ", tensor.is_cuda() ? "cuda" : "cpu", " beside ",
           other.is_cuda() ? "cuda" : "cpu");
}

// A matrix of float32, bfloat16 or float16 whose columns are adjacent and whose rows may have any stride.
inline void check_logits(const char* name, const Tensor& logits) {
  check_type(name, logits, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (logits.dim() != 2) refuse(name, " must have shape [T, V_local]; found ", shape_of(logits));
  if (logits.size(1) > 1 && logits.stride(1) != 1)
    refuse(name, " must have a column stride of 1; found ", logits.stride(1), ": call .contiguous()");
}

// A rectangle of bits at (row, col) of a larger tensor, and the weights of that tensor's columns (reshard/digest.h).
inline void check_block(const Tensor& block, const Tensor& columns, int64_t row, int64_t col) {
  if (block.dim() != 2) refuse("block must have shape [R, C]; found ", shape_of(block));
  if (block.size(1) > 1 && block.stride(1) != 1)
    refuse("block must have a column stride of 1; found ", block.stride(1), ": call .contiguous()");
  const size_t size = block.element_size();
  if (size != 1 && size != 2 && size != 4 && size != 8)
    refuse("block must have elements of 1, 2, 4 or 8 bytes; found ", size);
  if (row < 0) refuse("row must be at least 0; found ", row);
  if (col < 0) refuse("col must be at least 0; found ", col);
  check_type("columns", columns, {ScalarType::Long});
  check_shape("columns", columns, {columns.numel()}, "[at least col + C]");
  if (columns.numel() < col + block.size(1))
    refuse("columns must hold at least col + C = ", col + block.size(1), " weights; found ", columns.numel());
  check_device("columns", columns, "block", block);
}
}  // namespace semion
