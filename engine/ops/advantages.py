"""Advantages of groups of rewards: credit assignment is arithmetic on a group, nothing else. No gradient passes.

Shape legend: B rewards, G groups.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from engine.core.errors import NumericsError

Normalize = Literal["mean", "mean_std", "leave_one_out"]


def grouped_advantages(
    rewards: torch.Tensor, cu_groups: torch.Tensor, *, normalize: Normalize = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [B] of the rewards' type, no_signal [G] bool) of rewards [B] (float32 or float64).

    Group g holds the rewards cu_groups[g] to cu_groups[g + 1] (cu_groups [G + 1], int32). `mean`: reward minus the
    group's mean (paper, section 2.1). `mean_std`: that divided by the group's standard deviation, the root of the mean
    square (DeepSeekMath, section 4.1.2). `leave_one_out`: reward minus the mean of the others (RLOO). Where all rewards
    of a group are equal, or it has none, its advantages are exactly 0 and no_signal is true.

    Raises NumericsError naming the index of a reward that is not finite, ValueError naming argument, rule and value for
    a wrong shape or type.
    """
    modes = get_args(Normalize)
    if normalize not in modes:
        raise ValueError(f"normalize must be one of {', '.join(modes)}; found {normalize!r}")
    advantages, no_signal, broken = torch.ops.semion.grouped_advantages(rewards, cu_groups, modes.index(normalize))
    index = int(broken)
    if index >= 0:
        value = float(rewards[index])
        raise NumericsError(f"reward {index} of the group must be finite; found {value}: mend the reward function")
    return advantages, no_signal
