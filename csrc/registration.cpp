// The operators torch.ops.semion.*: their schemas, for whichever device. cpu_bindings.cpp and cuda_bindings.cpp implement
// them; engine/ops wraps them in functions with documentation, autograd and communication.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(semion, library) {
  // logits [T, V_local] float32/bfloat16/float16, targets [T] int64 that are -100 or in [lowest_id, end_id)
  // -> [4, T] float32: this rank's part of every row (csrc/logprob/logprob.h). every_row: for an entropy.
  library.def(
      "log_prob_parts(Tensor logits, Tensor targets, int vocab_start, int num_valid, int lowest_id, int end_id, "
      "float temperature, bool every_row) -> Tensor");
  // parts [R, 4, T] -> log_probs [T], entropy [T], totals [3, T], all float32.
  library.def(
      "log_prob_join(Tensor parts, Tensor targets, float temperature) -> "
      "(Tensor log_probs, Tensor entropy, Tensor totals)");
  // Writes the gradient of the logits to out, which may be the logits.
  library.def(
      "log_prob_backward(Tensor logits, Tensor targets, Tensor totals, Tensor grad_log_prob, Tensor? grad_entropy, "
      "int vocab_start, int num_valid, float temperature, Tensor(a!) out) -> ()");

  // values [T] float32, cu_seqlens [B + 1] int32, mask [T] bool -> [B] float32; and back.
  library.def("sequence_sums(Tensor values, Tensor cu_seqlens, Tensor? mask) -> Tensor");
  library.def("sequence_sums_backward(Tensor grad_sums, Tensor cu_seqlens, Tensor? mask, int num_tokens) -> Tensor");

  // rewards [B] float32/float64, cu_groups [G + 1] int32, normalize: 0 mean, 1 mean_std, 2 leave_one_out
  // -> advantages [B], no_signal [G] bool, broken [1] int64: index of the first reward that is not
  // finite, or whose advantage is not, or -1.
  library.def(
      "grouped_advantages(Tensor rewards, Tensor cu_groups, int normalize) -> "
      "(Tensor advantages, Tensor no_signal, Tensor broken)");

  // log-probs [T] float32, advantages [B] float32, cu_seqlens [B + 1] int32, targets [T] int64
  // -> sums [6] float32 (loss, KL, clipped, ratio, gap, beyond), gradient [T] float32 of the loss: csrc/policy/policy_gradient.h.
  library.def(
      "policy_gradient(Tensor log_probs, Tensor old_log_probs, Tensor? reference_log_probs, Tensor advantages, "
      "Tensor cu_seqlens, Tensor targets, float clip_low, float clip_high, float dual_clip, float kl_weight) -> "
      "(Tensor sums, Tensor gradient)");

  // On the CPU alone. q [T, N, D], k and v [T, M, D], float32/bfloat16/float16, cosines and sines [T, D / 2] of that type,
  // cu_seqlens [B + 1] int32, parents [B] int64: the segment that a segment goes on from, or -1
  // -> output [T, N, D], sums [N, T] float32: csrc/attention/packed_attention.h; and back.
  library.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor? cosines, Tensor? sines, Tensor cu_seqlens, Tensor parents, "
      "float scale) -> (Tensor output, Tensor sums)");
  library.def(
      "packed_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor? cosines, Tensor? sines, "
      "Tensor cu_seqlens, Tensor parents, Tensor output, Tensor sums, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");

  // On the CPU alone, float32. qkv [T, (N + 2 M) D], positions and slots [T] int64, starts [R + 1] int32: each request's tokens,
  // table [R, blocks] int32, angles [P, D], cache [blocks, M, B, 2 D], written to -> [T, N D]: csrc/attention/cached_attention.h.
  library.def(
      "cached_attention(Tensor qkv, Tensor positions, Tensor slots, Tensor starts, Tensor table, Tensor angles, "
      "Tensor(a!) cache, float scale) -> Tensor");

  // On the CPU alone. x [T, 2 F] -> [T, F], and back: csrc/activation/swiglu.h.
  library.def("swiglu(Tensor x) -> Tensor");
  library.def("swiglu_backward(Tensor gradient, Tensor x) -> Tensor");

  // On the CPU alone. x [T, H], weight [H] of one type -> [T, H], scales [T] float32: csrc/norm/rms_norm.h; and back.
  library.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor out, Tensor scales)");
  library.def(
      "rms_norm_backward(Tensor gradient, Tensor x, Tensor weight, Tensor scales) -> (Tensor of_x, Tensor of_weight)");

  // On the CPU alone, float32. x [T, H], weight [N, H] -> [T, N]: csrc/linear/few_rows.h.
  library.def("few_rows_product(Tensor x, Tensor weight) -> Tensor");

  // On the CPU alone. logits [T, V] float32/bfloat16/float16, temperatures [T] float32, seeds [T] int64
  // -> tokens [T] int64, log_probs [T] float32, ranks [T] int64: csrc/sampling/sample_tokens.h.
  library.def(
      "sample_tokens(Tensor logits, Tensor temperatures, Tensor seeds, bool raw) -> "
      "(Tensor tokens, Tensor log_probs, Tensor ranks)");

  // N blocks [R, C] of elements of one size, 1, 2, 4 or 8 bytes, columns [at least col + C] int64: every column's weight
  // -> [N] int64: the digest of each block's bits at (row, col) of the tensor that its seed names (csrc/reshard/digest.h).
  library.def("block_digests(Tensor[] blocks, Tensor columns, int[] rows, int[] cols, int[] seeds) -> Tensor");
}
