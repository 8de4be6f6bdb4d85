"""The kernels of other libraries that tools/bench_ops compares ours with on a GPU: the cross entropy of given logits, and the
output layer together with it. Each is optional, and imported when it is called: who has not installed one is told so.

The calls are written by the libraries' own sources: megatron-core 0.16.1, Transformer Engine 2.12.0, Liger 0.8.5, quack-kernels
0.6.5, cut-cross-entropy 25.1.1. tests/unit/tools/test_bench_peers.py makes each of them without a GPU, against stand-ins with
those signatures; the kernels behind them have not run here (docs/results.md says what was tried by hand).

Shape legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch

Tensors = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A kernel of another library. `call` takes logits [T, V] and targets [T], and returns each token's loss [T]; of an output
    layer it takes hidden states [T, H], weight [V, H] and targets [T], and returns the mean loss []."""

    name: str
    package: str  # that is imported
    distribution: str  # that is installed
    call: Tensors


def fused_megatron(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """megatron-core's, whose parts torch.compile fuses. It asks the group for rank and size, so None will not do."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    return fused_vocab_parallel_cross_entropy(logits[:, None], targets[:, None], get_tensor_model_parallel_group())[:, 0]


def transformer_engine(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In Triton; it writes the gradient over the logits in the forward."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy(logits[None], targets[None], 0.0, False, None).view(-1)


def liger(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In Triton; it writes the gradient over the logits in the forward, and its losses have the logits' type."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, targets, reduction="none")


def quack(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In CuTe; the gradient goes over the logits, as ours does."""
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, targets, reduction="none", inplace_backward=True)


def liger_head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A chunk at a time. The weight's gradient is added up in the weight's own type, Liger's default; ours is in float32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


def quack_head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Chunks of 4096 rows, the weight's gradient added up in float32 by the product; on compute capability 9.0 and in bf16 its
    pipeline without stored logits."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, targets)


def cut_head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """In Triton, without stored logits. By default it leaves out parts of the gradients that are small; exact: it does not."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, **({"filter_eps": None} if exact else {}))


TRITON_ENGINE, TRITON_LIGER = ("transformer_engine", "transformer_engine"), ("liger_kernel", "liger-kernel")
QUACK, CUT = ("quack", "quack-kernels"), ("cut_cross_entropy", "cut-cross-entropy")
CROSS_ENTROPIES = (
    Peer("megatron_fused", "megatron", "megatron-core", fused_megatron),
    Peer("te", *TRITON_ENGINE, transformer_engine),
    Peer("liger", *TRITON_LIGER, liger),
    Peer("quack", *QUACK, quack),
)
OUTPUT_LAYERS = (
    Peer("liger", *TRITON_LIGER, liger_head),
    Peer("quack", *QUACK, quack_head),
    Peer("cut", *CUT, partial(cut_head, exact=False)),
    Peer("cut_exact", *CUT, partial(cut_head, exact=True)),
)


def installed(peers: Sequence[Peer]) -> list[Peer]:
    """Those whose package is there; it is not imported."""
    return [peer for peer in peers if find_spec(peer.package) is not None]


def versions(peers: Sequence[Peer] = (*CROSS_ENTROPIES, *OUTPUT_LAYERS)) -> dict[str, str]:
    """By distribution, its version or "not installed"."""
    there = {peer.distribution for peer in installed(peers)}
    names = dict.fromkeys(peer.distribution for peer in peers)
    return {name: version(name) if name in there else "not installed" for name in names}
