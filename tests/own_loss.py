"""Losses that a user brought in one file, as the tests name them by path: OAPL's regression towards the regularised optimum,
against the weights that sampled the rollouts or against the reference. The engine knows nothing of this file.
"""

import math

import torch
from pydantic import Field

from engine.algorithms.group import Group, GroupLoss, GroupOptions
from engine.core.metrics import Metric


class RegressionOptions(GroupOptions):
    """The loss's own options."""

    temperature: float = Field(1.0, gt=0, description="of the regularised optimum, beta")


class Regression(GroupLoss):
    """The mean over a group of (beta * log(pi / pi_old) - (r - V))^2, V = beta * log mean exp(r / beta)."""

    Options = RegressionOptions
    metrics = (
        Metric("residual_mean", "what is left of the regression", reduce="mean", per="groups"),
        Metric("residual_max", "the largest", reduce="max"),
    )

    def values(self, group):
        """The length of each response, to show that an attached value arrives."""
        return {"length": [float(len(rollout.completion.token_ids)) for rollout in group.judged]}

    def group_loss(self, group: Group):
        """See GroupLoss."""
        assert group.values["length"].tolist() == group.num_tokens.tolist()
        beta, count = self.options.temperature, len(group.rewards)
        value = beta * (torch.logsumexp(group.rewards / beta, 0) - math.log(count))
        residual = beta * (group.sums(group.log_probs) - group.sums(self.anchor(group))) - (group.rewards - value)
        squares = residual.square()
        return squares.mean(), {"residual_mean": squares.mean(), "residual_max": squares.max()}

    def anchor(self, group: Group):
        """What the policy is held against."""
        return group.rollout_log_probs


class ReferenceRegression(Regression):
    """The same against the reference."""

    needs_reference = True

    def anchor(self, group: Group):
        """See Regression."""
        return group.reference_log_probs
