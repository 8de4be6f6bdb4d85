"""Group-relative advantages: each reward minus its group's mean, and nothing more (paper, equation 1 and section 2.1:
no division by the standard deviation) unless the configuration asks for another normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine import ops
from engine.ops.advantages import Normalize


def grouped_advantages(rewards: Sequence[float], normalize: Normalize = "mean") -> list[float]:
    """Rewards of one group (any length) to advantages of the same length, which sum to 0; exactly 0 if all are equal.

    `normalize` is explained at ops.grouped_advantages. Raises NumericsError naming the index of a reward that is not
    finite.
    """
    bounds = torch.tensor([0, len(rewards)], dtype=torch.int32)
    values = torch.tensor(rewards, dtype=torch.float64)
    advantages, _ = ops.grouped_advantages(values, bounds, normalize=normalize)
    found: list[float] = advantages.tolist()
    return found
