"""Negative log-likelihood: the loss of supervised fine-tuning. `semion sft` uses it; algorithm.loss does not name it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.algorithms.base import Loss, Result, denominator
from engine.core.metrics import Metric
from engine.core.types import IGNORED, Batch, Microbatch

if TYPE_CHECKING:
    import torch

TOKENS = Metric("tokens", "supervised training: tokens that the loss looks at", unit="tokens", reduce="sum")
NLL = Metric(
    "nll_mean", "supervised training: of the tokens trained on", unit="nats a token", reduce="mean", per="target_tokens"
)


class NllLoss(Loss):
    """Negative log-likelihood of the completion, the mean over target tokens: the loss of `semion sft`."""

    metrics = (TOKENS, NLL)

    def denominator(self, batch: Batch) -> int:
        """See Loss."""
        return denominator(batch, "tokens")

    def coefficients(self, microbatch: Microbatch) -> torch.Tensor:
        """Every token counts the same; those without a target have a log-prob of 0."""
        import torch

        return torch.ones_like(microbatch.targets, dtype=torch.float32)

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        nll = -log_probs.sum()
        tokens = (microbatch.targets != IGNORED).sum().float()
        return nll / denominator(batch, "tokens"), {TOKENS.name: tokens, NLL.name: nll.detach()}
