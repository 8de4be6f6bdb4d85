// Checks of an operator's arguments: each failure is one sentence that names argument, rule and value, and becomes a
// ValueError in Python. Bindings of both devices use it; it reads shapes and types, never a tensor's contents.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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

// A contiguous tensor of this type and shape beside `other`.
inline void check(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> shape,
                  const char* legend, const char* other_name, const Tensor& other) {
  check_type(name, tensor, {type});
  check_shape(name, tensor, shape, legend);
  check_device(name, tensor, other_name, other);
}

// A vector of one of these types, contiguous: what the others are checked against.
inline void check_vector(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> types,
                         const char* legend) {
  check_type(name, tensor, types);
  check_shape(name, tensor, {tensor.numel()}, legend);
}

inline void check_rows(const Tensor& logits, const Tensor& targets, int64_t num_valid, double temperature) {
  check_logits("logits", logits);
  check("targets", targets, ScalarType::Long, {logits.size(0)}, "[T]", "logits", logits);
  if (num_valid < 0 || num_valid > logits.size(1))
    refuse("num_valid of this rank must be in [0, ", logits.size(1), "]; found ", num_valid);
  if (logits.size(1) > std::numeric_limits<int32_t>::max())
    refuse("V_local must be less than 2^31; found ", logits.size(1));
  if (!(temperature > 0)) refuse("temperature must be greater than 0; found ", temperature);
}

inline void check_parts(const Tensor& parts, const Tensor& targets) {
  if (parts.dim() != 3) refuse("parts must have shape [R, 4, T]; found ", shape_of(parts));
  check_type("parts", parts, {ScalarType::Float});
  check_shape("parts", parts, {parts.size(0), 4, targets.numel()}, "[R, 4, T]");
  check("targets", targets, ScalarType::Long, {targets.numel()}, "[T]", "parts", parts);
}

inline void check_gradient(const Tensor& logits, const Tensor& totals, const Tensor& grad_log_prob,
                           const std::optional<Tensor>& grad_entropy, const Tensor& out) {
  const int64_t num_rows = logits.size(0);
  check("totals", totals, ScalarType::Float, {3, num_rows}, "[3, T]", "logits", logits);
  check("grad_log_prob", grad_log_prob, ScalarType::Float, {num_rows}, "[T]", "logits", logits);
  if (grad_entropy) check("grad_entropy", *grad_entropy, ScalarType::Float, {num_rows}, "[T]", "logits", logits);
  check_logits("out", out);
  check_type("out", out, {logits.scalar_type()});
  check_device("out", out, "logits", logits);
  if (out.size(0) != num_rows || out.size(1) != logits.size(1))
    refuse("out must have the shape of logits = ", shape_of(logits), "; found ", shape_of(out));
}

// Boundaries of parts, beside `other`; their number less one. What they hold is for the device to check.
inline int64_t check_bounds(const char* name, const Tensor& bounds, const char* other_name, const Tensor& other) {
  check_type(name, bounds, {ScalarType::Int});
  if (bounds.dim() != 1 || bounds.size(0) < 1)
    refuse(name, " must have shape [parts + 1] with at least one element; found ", shape_of(bounds));
  check(name, bounds, ScalarType::Int, {bounds.size(0)}, "[parts + 1]", other_name, other);
  return bounds.size(0) - 1;
}

inline void check_mask(const std::optional<Tensor>& mask, int64_t num_tokens, const char* other_name, const Tensor& other) {
  if (mask) check("mask", *mask, ScalarType::Bool, {num_tokens}, "[T]", other_name, other);
}

inline void check_normalize(int64_t normalize) {
  if (normalize < 0 || normalize > 2) refuse("normalize must be 0, 1 or 2; found ", normalize);
}

// Everything of policy_gradient but the boundaries; `num_sequences` is what they say.
inline void check_policy(const Tensor& log_probs, const Tensor& old_log_probs,
                         const std::optional<Tensor>& reference_log_probs, const Tensor& advantages, const Tensor& targets,
                         int64_t num_sequences, double clip_low, double clip_high, double dual_clip) {
  const int64_t num_tokens = log_probs.numel();
  check_vector("log_probs", log_probs, {ScalarType::Float}, "[T]");
  const auto check_tokens = [&](const char* name, const Tensor& tensor, ScalarType type) {
    check(name, tensor, type, {num_tokens}, "[T]", "log_probs", log_probs);
  };
  check_tokens("old_log_probs", old_log_probs, ScalarType::Float);
  if (reference_log_probs) check_tokens("reference_log_probs", *reference_log_probs, ScalarType::Float);
  check_tokens("targets", targets, ScalarType::Long);
  check("advantages", advantages, ScalarType::Float, {num_sequences}, "[B]", "log_probs", log_probs);
  if (!(clip_low >= 0)) refuse("clip_low must be at least 0; found ", clip_low);
  if (!(clip_high >= 0)) refuse("clip_high must be at least 0; found ", clip_high);
  if (!(dual_clip > 1)) refuse("dual_clip must be greater than 1, or infinity for none; found ", dual_clip);
}

// A slice of bits at (row, col) of a larger tensor, and the weights of that tensor's columns (reshard/digest.h).
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

// Blocks of one element size, and for each where it lies and whose it is.
inline void check_blocks(const std::vector<Tensor>& blocks, const Tensor& columns, const std::vector<int64_t>& rows,
                         const std::vector<int64_t>& cols, const std::vector<int64_t>& seeds) {
  if (rows.size() != blocks.size() || cols.size() != blocks.size() || seeds.size() != blocks.size())
    refuse("rows, cols and seeds must be as many as blocks = ", blocks.size(), "; found ", rows.size(), ", ", cols.size(),
           " and ", seeds.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    check_block(blocks[i], columns, rows[i], cols[i]);
    if (blocks[i].element_size() != blocks[0].element_size())
      refuse("blocks must have elements of one size; found ", blocks[0].element_size(), " and ", blocks[i].element_size());
  }
}

// [T, heads, D] beside q, of its type; heads and tokens may have any stride.
inline void check_heads(const char* name, const Tensor& tensor, const Tensor& q, int64_t heads) {
  check_type(name, tensor, {q.scalar_type()});
  check_device(name, tensor, "q", q);
  if (tensor.dim() != 3 || tensor.size(0) != q.size(0) || tensor.size(1) != heads || tensor.size(2) != q.size(2))
    refuse(name, " must have shape [T, heads, D] = [", q.size(0), ", ", heads, ", ", q.size(2), "]; found ", shape_of(tensor));
  if (tensor.size(2) > 1 && tensor.stride(2) != 1)
    refuse(name, " must have a stride of 1 inside a head; found ", tensor.stride(2), ": call .contiguous()");
}

// Everything of packed_attention but what bounds and parents say.
inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cosines,
                            const std::optional<Tensor>& sines, const Tensor& bounds, const Tensor& parents, double scale) {
  check_type("q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (q.dim() != 3 || k.dim() != 3) refuse("q and k must have shape [T, heads, D]; found ", shape_of(q), " and ", shape_of(k));
  const int64_t heads = k.size(1);
  if (heads < 1 || q.size(1) < 1 || q.size(1) % heads != 0)
    refuse("q must have a multiple of k's heads = ", heads, "; found ", q.size(1));
  check_heads("q", q, q, q.size(1));
  check_heads("k", k, q, heads);
  check_heads("v", v, q, heads);
  if (cosines.has_value() != sines.has_value()) refuse("cosines and sines must be given together; found one alone");
  if (cosines) {
    if (q.size(2) % 2 != 0) refuse("D must be even where heads are rotated; found ", q.size(2));
    check("cosines", *cosines, q.scalar_type(), {q.size(0), q.size(2) / 2}, "[T, D / 2]", "q", q);
    check("sines", *sines, q.scalar_type(), {q.size(0), q.size(2) / 2}, "[T, D / 2]", "q", q);
  }
  check("parents", parents, ScalarType::Long, {check_bounds("cu_seqlens", bounds, "q", q)}, "[B]", "q", q);
  if (!(scale > 0)) refuse("scale must be greater than 0; found ", scale);
}

// Everything of cached_attention but what positions, slots, starts and table say; the number N of heads.
inline int64_t check_cached_attention(const Tensor& qkv, const Tensor& positions, const Tensor& slots, const Tensor& table,
                                      const Tensor& angles, const Tensor& cache, double scale, int64_t multiple) {
  check_type("cache", cache, {ScalarType::Float});
  if (cache.dim() != 4 || !cache.is_contiguous() || cache.size(1) < 1 || cache.size(2) < 1 || cache.size(3) < 2)
    refuse("cache must be contiguous and have shape [blocks, M, B, 2 D]; found ", shape_of(cache));
  const int64_t kv_heads = cache.size(1), dim = cache.size(3) / 2;
  if (cache.size(2) % multiple != 0 || cache.size(3) % (2 * multiple) != 0)
    refuse("B and D of the cache must be multiples of ", multiple, "; found B = ", cache.size(2), " and 2 D = ", cache.size(3));
  if (qkv.dim() != 2) refuse("qkv must have shape [T, (N + 2 M) D]; found ", shape_of(qkv));
  const int64_t heads = qkv.size(1) / dim - 2 * kv_heads;
  if (qkv.size(1) % dim != 0 || heads < 1 || heads % kv_heads != 0)
    refuse("qkv must have a multiple of M = ", kv_heads, " heads of D = ", dim, " beside M of keys and M of values; found ",
           shape_of(qkv));
  check("qkv", qkv, ScalarType::Float, {qkv.size(0), qkv.size(1)}, "[T, (N + 2 M) D]", "cache", cache);
  check("positions", positions, ScalarType::Long, {qkv.size(0)}, "[T]", "qkv", qkv);
  check("slots", slots, ScalarType::Long, {qkv.size(0)}, "[T]", "qkv", qkv);
  check_type("angles", angles, {ScalarType::Float});
  if (angles.dim() != 2) refuse("angles must have shape [P, D]; found ", shape_of(angles));
  check("angles", angles, ScalarType::Float, {angles.size(0), dim}, "[P, D]", "cache", cache);
  check_type("table", table, {ScalarType::Int});
  if (table.dim() != 2 || (table.size(1) > 1 && table.stride(1) != 1))
    refuse("table must have shape [R, blocks] and a column stride of 1; found ", shape_of(table));
  if (!(scale > 0)) refuse("scale must be greater than 0; found ", scale);
  return heads;
}

inline void check_swiglu(const Tensor& x) {
  check_type("x", x, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (x.dim() != 2 || x.size(1) % 2 != 0) refuse("x must have shape [T, 2 F]; found ", shape_of(x));
  check_shape("x", x, {x.size(0), x.size(1)}, "[T, 2 F]");
}

inline void check_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_type("x", x, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (x.dim() != 2 || x.size(1) < 1) refuse("x must have shape [T, H]; found ", shape_of(x));
  check_shape("x", x, {x.size(0), x.size(1)}, "[T, H]");
  check("weight", weight, x.scalar_type(), {x.size(1)}, "[H]", "x", x);
  if (!(epsilon >= 0)) refuse("epsilon must be at least 0; found ", epsilon);
}

// Everything of sample_tokens but what the temperatures are.
inline void check_sampling(const Tensor& logits, const Tensor& temperatures, const Tensor& seeds) {
  check_logits("logits", logits);
  if (logits.size(1) < 1) refuse("logits must have a column at least; found ", shape_of(logits));
  check("temperatures", temperatures, ScalarType::Float, {logits.size(0)}, "[T]", "logits", logits);
  check("seeds", seeds, ScalarType::Long, {logits.size(0)}, "[T]", "logits", logits);
}
}  // namespace semion
