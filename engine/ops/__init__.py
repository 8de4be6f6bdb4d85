"""Arithmetic on packed rows that the losses are made of, in plain PyTorch: log-probs from vocab-parallel logits and
their sums per sequence. It knows no model and no algorithm.

Shape legend: T tokens of a packed row, V_local vocabulary columns of this rank, B sequences.
"""

from engine.ops.sequence import sequence_log_probs
from engine.ops.token_log_probs import token_log_probs

__all__ = ["sequence_log_probs", "token_log_probs"]
