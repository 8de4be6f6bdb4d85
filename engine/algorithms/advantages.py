"""Group-relative advantages: each reward minus its group's mean, and nothing more (paper, equation 1 and section 2.1:
no division by the standard deviation) unless the configuration asks for another normalisation, ours or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from engine.core.errors import NumericsError
from engine.core.registry import called, load_function
from engine.core.types import RolloutGroup
from engine.core.types import Sequence as TrainingSequence

if TYPE_CHECKING:
    from engine.ops.advantages import Normalize

OPTION = "algorithm.normalize_advantages"
BATCH = "batch_std"  # reward minus its group's mean, over the root mean square of that in the step (REINFORCE++-baseline)
LARGEST = (2 - 2**-23) * 2.0**127  # that float32 holds
Advantages = Callable[[Sequence[float]], list[float]]  # rewards of one group to advantages of the same length


def advantage_function(name: str) -> Advantages:
    """Ours of that name, or a user's own by where it stands: a function of the rewards of a group's judged rollouts.

    What a user's own returns must be one finite number a reward; anything else is a NumericsError that names it.
    """
    if name == BATCH:  # the rest is done with the whole step's groups, by scale_by_batch
        return grouped_advantages
    if ":" not in name:
        return partial(grouped_advantages, normalize=cast("Normalize", name))
    function = load_function(name, OPTION, "rewards")

    def own(rewards: Sequence[float]) -> list[float]:
        return _checked(name, called(name, OPTION, function, list(rewards)), len(rewards)) if rewards else []

    return own


def grouped_advantages(rewards: Sequence[float], normalize: Normalize = "mean") -> list[float]:
    """Rewards of one group (any length) to advantages of the same length, which sum to 0; exactly 0 if all are equal.

    `normalize` is explained at ops.grouped_advantages. Raises NumericsError naming the index of a reward that is not
    finite, and for an advantage that float32, in which losses are, does not hold.
    """
    import torch

    from engine import ops

    bounds = torch.tensor([0, len(rewards)], dtype=torch.int32)
    values = torch.tensor(rewards, dtype=torch.float64)
    advantages, _ = ops.grouped_advantages(values, bounds, normalize=normalize)
    found: list[float] = advantages.tolist()
    return bounded(found)


def bounded(advantages: list[float], most: float = LARGEST) -> list[float]:
    """These advantages. NumericsError where one is not a number or larger than `most`, of either sign."""
    largest = max(map(abs, advantages), default=0.0)
    if largest > most or any(math.isnan(advantage) for advantage in advantages):
        raise NumericsError(f"advantages must be at most {most:.3g}; found {largest:.3g}: scale the rewards down")
    return advantages


def advantages_of(function: Advantages, group: RolloutGroup) -> list[float]:
    """One advantage for each judged rollout of the group. NumericsError names the prompt."""
    try:
        return function([rollout.score.value for rollout in group.judged])
    except NumericsError as error:
        raise NumericsError(f"step {group.step}, prompt {group.prompt.id}: {error}") from error


def scale_by_batch(sequences: Sequence[TrainingSequence], groups: Sequence[RolloutGroup]) -> list[TrainingSequence]:
    """For BATCH: the step's sequences with their advantages, each minus its group's mean so far, divided by the root of the
    mean square of all judged rollouts of the step's `groups` (arXiv 2501.03262, its baseline variant, whose mean over the batch
    is 0 already). A step without a signal is left as it is, and so is one whose root is only rounding (LEAST_DEVIATION)."""
    from engine.ops.advantages import LEAST_DEVIATION

    every = [a for group in groups for a in advantages_of(grouped_advantages, group)]
    largest = max((abs(rollout.score.value) for group in groups for rollout in group.judged), default=0.0)
    root = math.sqrt(math.fsum(a * a for a in every) / max(1, len(every)))
    if root <= LEAST_DEVIATION * largest:
        return list(sequences)
    return [replace(sequence, advantage=sequence.advantage / root) for sequence in sequences]


def _checked(name: str, found: Any, count: int) -> list[float]:
    rule = f"{OPTION} = {name!r} must return one finite number for each of {count} rewards"
    try:
        advantages = [float(advantage) for advantage in found]
    except (TypeError, ValueError) as error:
        raise NumericsError(f"{rule}; found {found!r}: mend the function") from error
    if len(advantages) != count or not all(abs(advantage) <= LARGEST for advantage in advantages):
        raise NumericsError(f"{rule}; found {advantages}: mend the function")
    return advantages
