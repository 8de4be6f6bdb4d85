"""Group-relative advantages: each reward minus its group's mean, and nothing more (paper, equation 1 and section 2.1:
no division by the standard deviation)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.errors import NumericsError


def grouped_advantages(rewards: Sequence[float]) -> list[float]:
    """Rewards of one group (any length) to advantages of the same length, which sum to 0.

    Raises NumericsError naming the index of a reward that is not finite.
    """
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise NumericsError(f"reward {index} of the group must be finite; found {reward}: mend the reward function")
    if not rewards:
        return []
    mean = math.fsum(rewards) / len(rewards)
    mean = min(max(mean, min(rewards)), max(rewards))  # rounding: equal rewards must give exactly 0, which means no signal
    return [reward - mean for reward in rewards]
