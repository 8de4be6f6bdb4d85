"""The entropy term that may be added to any loss (paper, section 5)."""

from __future__ import annotations

import torch

from engine.algorithms.base import Objective, Result, denominator, response_lengths
from engine.config.options import Algorithm
from engine.core.types import IGNORED, Batch, Microbatch
from engine.ops import sequence_log_probs


class EntropyObjective(Objective):
    """Minus the mean next-token entropy over a response, summed over the responses trained on (paper, section 5)."""

    metric_names = ("entropy",)  # summed over target tokens
    needs_entropy = True

    def __init__(self, algorithm: Algorithm) -> None:
        self.reduction = algorithm.reduction

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Objective."""
        assert entropy is not None, "the entropy of every row must come with the log-probs"
        sums = sequence_log_probs(entropy, microbatch.cu_seqlens, microbatch.targets != IGNORED)
        loss = -(sums / response_lengths(microbatch)).sum()
        return loss / denominator(batch, self.reduction), sums.detach().sum().unsqueeze(0)
