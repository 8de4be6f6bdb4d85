"""DPO and GroupDPO: the preference losses of the paper (equations 3 and 4) over the pairs of a microbatch.

Shape legend: T tokens of the microbatch, B sequences of it, P pairs of it, K metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from engine.algorithms.base import Objective, Result, denominator, rollout_gap
from engine.algorithms.pairs import all_pairs
from engine.config.options import Algorithm
from engine.core.types import Batch, Microbatch
from engine.ops import sequence_log_probs


class DpoObjective(Objective):
    """-log sigmoid(beta * [(l_pi - l_ref)(chosen) - (l_pi - l_ref)(rejected)]), plus nll_weight * NLL(chosen): the mean
    of that over all pairs of a prompt, of which DPO has one and GroupDPO every correct with every incorrect response.

    l is the sum of token log-probs over the response, EOS included, not divided by length. Paper, equations 3 and 4.
    """

    metric_names: tuple[str, ...] = ("pairs", "margin", "preferred", "chosen_log_prob", "rejected_log_prob", "rollout_gap")
    needs_reference = True

    def __init__(self, algorithm: Algorithm, *, sampled: bool = True) -> None:
        """`sampled`: whether there are rollout log-probs to compare with; responses that others wrote have none."""
        self.beta, self.nll_weight, self.reduction = algorithm.beta, algorithm.nll_weight, algorithm.reduction
        self._sampled = sampled
        if not sampled:
            self.metric_names = self.metric_names[:-1]

    def weigh(self, microbatches: list[Microbatch], log_probs: Sequence[torch.Tensor]) -> list[Microbatch]:
        """See Objective. The slope of a sequence is the derivative of its group's loss by its log-prob: exact while the
        weights stand still, which they do until the optimizer steps."""
        sums = [self._sums(row.detach(), m) for row, m in zip(log_probs, microbatches, strict=True)]
        policy, reference = (torch.cat(parts) for parts in zip(*sums, strict=True))
        policy.requires_grad_()
        groups, chosen = (torch.cat([getattr(m, name) for m in microbatches]) for name in ("spread_groups", "chosen"))
        pairs, weights = all_pairs(groups.tolist(), chosen.tolist())
        with torch.enable_grad():
            loss, metrics = self._compare(policy, reference, pairs.to(policy.device), weights.to(policy.device))
        slopes = torch.autograd.grad(loss, policy)[0].split([m.chosen.numel() for m in microbatches])
        totals = torch.cat([loss.detach().unsqueeze(0), metrics])
        return [
            replace(m, slopes=slope, spread_sums=totals if index == 0 else torch.zeros_like(totals))
            for index, (m, slope) in enumerate(zip(microbatches, slopes, strict=True))
        ]

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Objective."""
        policy, reference = self._sums(log_probs, microbatch)
        loss, sums = self._compare(policy, reference, microbatch.pairs, microbatch.pair_weights)
        if microbatch.slopes is not None and microbatch.spread_sums is not None:
            loss = loss + microbatch.spread_sums[0] + (microbatch.slopes * (policy - policy.detach())).sum()
            sums = sums + microbatch.spread_sums[1:]
        if self._sampled:
            sums = torch.cat([sums, rollout_gap(log_probs, microbatch).unsqueeze(0)])
        return loss / denominator(batch, self.reduction), sums

    def _sums(self, log_probs: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's and the reference's log-prob of each response, [B] each."""
        assert microbatch.reference_log_probs is not None, "the reference must score a microbatch before DPO's loss"
        bounds = microbatch.cu_seqlens.to(log_probs.device)
        return sequence_log_probs(log_probs, bounds), sequence_log_probs(microbatch.reference_log_probs, bounds)

    def _compare(self, policy: torch.Tensor, reference: torch.Tensor, pairs: torch.Tensor, weights: torch.Tensor) -> Result:
        """(weighted sum over pairs of the loss, its metrics but the last)."""
        chosen, rejected = pairs.unbind(-1)
        log_ratio = policy - reference
        margin = self.beta * (log_ratio[chosen] - log_ratio[rejected])
        loss = -(weights * F.logsigmoid(margin)).sum()
        if self.nll_weight:
            loss = loss - self.nll_weight * (weights * policy[chosen]).sum()
        sums = [
            margin.new_tensor(float(chosen.numel())),
            margin.sum(),
            (margin > 0).float().sum(),
            policy[chosen].sum(),
            policy[rejected].sum(),
        ]
        return loss, torch.stack(sums).detach()
