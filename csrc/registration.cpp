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
}
