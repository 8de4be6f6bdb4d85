"""The entropy term that may be added to any loss (paper, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.algorithms.base import Loss, Result, denominator, response_lengths
from engine.core.metrics import Metric
from engine.core.types import IGNORED, Batch, Microbatch

if TYPE_CHECKING:
    import torch

ENTROPY = Metric(
    "entropy_mean",
    "with algorithm.entropy_weight: exact next-token entropy, over the tokens trained on",
    unit="nats a token",
    reduce="mean",
    per="target_tokens",
    peers={"TRL": "entropy", "verl": "actor/entropy"},
)


class EntropyBonus(Loss):
    """Minus the mean next-token entropy over a response, summed over the responses trained on (paper, section 5)."""

    metrics = (ENTROPY,)
    needs_entropy = True

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def denominator(self, batch: Batch) -> int:
        """See Loss."""
        return denominator(batch, self.reduction)

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        from engine.ops import sequence_log_probs

        assert entropy is not None, "the entropy of every microbatch must come with the log-probs"
        sums = sequence_log_probs(entropy, microbatch.cu_seqlens, microbatch.targets != IGNORED)
        loss = -(sums / response_lengths(microbatch)).sum()
        return loss / denominator(batch, self.reduction), {ENTROPY.name: sums.detach().sum()}
