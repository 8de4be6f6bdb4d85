"""Negative log-likelihood: the loss of supervised fine-tuning."""

from __future__ import annotations

import torch

from engine.algorithms.base import Objective, Result, denominator
from engine.core.types import IGNORED, Batch, Microbatch


class NllObjective(Objective):
    """Negative log-likelihood of the completion, the mean over target tokens: the loss of `semion sft`."""

    metric_names = ("tokens", "nll")

    def coefficients(self, microbatch: Microbatch) -> torch.Tensor:
        """Every token counts the same; those without a target have a log-prob of 0."""
        return torch.ones_like(microbatch.targets, dtype=torch.float32)

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Objective."""
        nll = -log_probs.sum()
        tokens = (microbatch.targets != IGNORED).sum().float()
        return nll / denominator(batch, "tokens"), torch.stack([tokens, nll]).detach()
