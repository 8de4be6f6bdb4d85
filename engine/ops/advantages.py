"""Advantages of groups of rewards: credit assignment is arithmetic on a group, nothing else. No gradient passes.

Shape legend: B rewards, G groups.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from engine.core.errors import NumericsError

Normalize = Literal["mean", "mean_std", "leave_one_out"]
# Of the group's largest |reward|: a standard deviation up to that is rounding (csrc/advantages/scale.h: least_deviation)
LEAST_DEVIATION = 1e-6


def grouped_advantages(
    rewards: torch.Tensor, cu_groups: torch.Tensor, *, normalize: Normalize = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [B] of the rewards' type, no_signal [G] bool) of rewards [B] (float32 or float64).

    Group g holds the rewards cu_groups[g] to cu_groups[g + 1] (cu_groups [G + 1], int32). `mean`: reward minus the
    group's mean (paper, section 2.1). `mean_std`: that divided by the group's standard deviation, the root of the mean
    square (DeepSeekMath, section 4.1.2). `leave_one_out`: reward minus the mean of the others (RLOO). Where all rewards
    of a group are equal, or it has none, its advantages are exactly 0 and no_signal is true; for `mean_std` so too where the
    deviation is at most LEAST_DEVIATION times the largest |reward|: divided by, rounding would become a signal. Sums and
    squares keep the range of rewards however large or small.

    Raises NumericsError naming the index of a reward that is not finite, or whose advantage is not, ValueError naming
    argument, rule and value for a wrong shape or type.
    """
    modes = get_args(Normalize)
    if normalize not in modes:
        raise ValueError(f"normalize must be one of {', '.join(modes)}; found {normalize!r}")
    advantages, no_signal, broken = torch.ops.semion.grouped_advantages(rewards, cu_groups, modes.index(normalize))
    index = int(broken)
    if index >= 0:
        value = float(rewards[index])
        if not math.isfinite(value):
            raise NumericsError(f"reward {index} of the group must be finite; found {value}: mend the reward function")
        raise NumericsError(
            f"the advantage of reward {index} must be finite; found the reward {value} in a group from "
            f"{float(rewards[rewards.isfinite()].min())} to {float(rewards[rewards.isfinite()].max())}: scale the rewards down"
        )
    return advantages, no_signal
