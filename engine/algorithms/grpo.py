"""GRPO: the clipped policy-gradient loss of the paper (equation 1) with a KL term to the reference.

Shape legend: T tokens of the microbatch, B sequences of it, K metrics.
"""

from __future__ import annotations

import torch

from engine.algorithms.base import Objective, Result, denominator, response_lengths
from engine.config.options import Algorithm
from engine.core.types import IGNORED, Batch, Microbatch
from engine.ops import policy_gradient_loss, sequence_log_probs


class GrpoObjective(Objective):
    """-sum over tokens of min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), plus kl_weight * KL(policy, reference).

    ratio = exp(log-prob - rollout log-prob), A is the sequence's advantage, KL is k3: exp(d) - d - 1 with
    d = reference - policy. No length and no standard-deviation normalisation (paper, equation 1); normalize_length
    divides a response's sum, KL included, by its number of tokens (DeepSeekMath, equation 3).
    """

    metric_names = ("with_signal", "kl", "clipped", "ratio", "rollout_gap")

    def __init__(self, algorithm: Algorithm) -> None:
        self.clip, self.kl_weight, self.reduction = algorithm.clip_ratio, algorithm.kl_weight, algorithm.reduction
        self.normalize_length = algorithm.normalize_length
        self.needs_reference = algorithm.kl_weight > 0

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Objective."""
        reference = microbatch.reference_log_probs if self.needs_reference else None
        assert reference is not None or not self.needs_reference, "the reference must score before GRPO's KL"
        advantages, fused_reference = microbatch.advantages, reference
        if self.normalize_length:  # the fused KL knows no weight of a sequence
            advantages, fused_reference = advantages / response_lengths(microbatch), None
        loss, sums = policy_gradient_loss(
            log_probs,
            microbatch.rollout_log_probs,
            fused_reference,
            advantages,
            microbatch.cu_seqlens,
            microbatch.targets,
            clip_ratio=self.clip,
            kl_weight=self.kl_weight,
        )
        if reference is not None and fused_reference is None:
            d = torch.where(microbatch.targets != IGNORED, reference - log_probs, 0.0)
            kl = sequence_log_probs(d.exp() - d - 1, microbatch.cu_seqlens)
            loss = loss + self.kl_weight * (kl / response_lengths(microbatch)).sum()
            sums = torch.cat([kl.detach().sum().unsqueeze(0), sums[1:]])
        with_signal = (microbatch.advantages != 0).sum().to(sums).unsqueeze(0)
        return loss / denominator(batch, self.reduction), torch.cat([with_signal, sums])
