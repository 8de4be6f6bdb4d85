"""From a group of scored rollouts to one preference pair, or to none. Arithmetic on a group, nothing else."""

from __future__ import annotations

import random

from engine.seeds import counted_seed
from engine.types import Rollout, RolloutGroup


def random_pair(group: RolloutGroup, run_seed: int) -> tuple[Rollout, Rollout] | None:
    """(chosen, rejected): one drawn from the correct rollouts (reward > 0), one from the others; None if either is empty.

    The draw is a pure function of (run seed, step, prompt id, first sample index). A rollout that could not be judged is
    neither. Source: paper, section 3, verifiable task.
    """
    correct = [r for r in group.judged if r.score.value > 0]
    wrong = [r for r in group.judged if r.score.value <= 0]
    if not correct or not wrong:
        return None
    first = group.rollouts[0].completion.sample_index
    draw = random.Random(counted_seed(run_seed, "pair", group.step, group.prompt.id, first))
    return draw.choice(correct), draw.choice(wrong)
