"""Arithmetic on packed rows that the losses are made of: kernels of csrc/ with autograd, communication and documentation.
It knows no model and no algorithm. tests/reference_ops.py holds a twin of each in PyTorch alone, the oracle of the tests.

Shape legend: T tokens of a packed row, V_local vocabulary columns of this rank, H hidden, B sequences, G groups.
"""

from engine.ops import _library, _shapes
from engine.ops.activation import swiglu
from engine.ops.advantages import grouped_advantages
from engine.ops.attention import cached_attention, packed_attention
from engine.ops.digest import block_digest, block_digests, column_weights
from engine.ops.lm_head import Coefficients, lm_head_log_probs
from engine.ops.norm import rms_norm
from engine.ops.policy_gradient import policy_gradient_loss, policy_gradient_slopes
from engine.ops.products import linear
from engine.ops.sampling import sample_tokens
from engine.ops.sequence import sequence_log_probs
from engine.ops.token_log_probs import log_square_probs, token_log_probs
from engine.ops.transfer import to_device

_library.load()
_shapes.register()

__all__ = [
    "Coefficients",
    "block_digest",
    "block_digests",
    "cached_attention",
    "column_weights",
    "grouped_advantages",
    "linear",
    "lm_head_log_probs",
    "log_square_probs",
    "packed_attention",
    "policy_gradient_loss",
    "policy_gradient_slopes",
    "rms_norm",
    "sample_tokens",
    "sequence_log_probs",
    "swiglu",
    "to_device",
    "token_log_probs",
]
