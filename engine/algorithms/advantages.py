"""Group-relative advantages: each reward minus its group's mean, and nothing more (paper, equation 1 and section 2.1:
no division by the standard deviation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine import ops


def grouped_advantages(rewards: Sequence[float]) -> list[float]:
    """Rewards of one group (any length) to advantages of the same length, which sum to 0; exactly 0 if all are equal.

    Raises NumericsError naming the index of a reward that is not finite.
    """
    bounds = torch.tensor([0, len(rewards)], dtype=torch.int32)
    advantages, _ = ops.grouped_advantages(torch.tensor(rewards, dtype=torch.float64), bounds)
    values: list[float] = advantages.tolist()
    return values
