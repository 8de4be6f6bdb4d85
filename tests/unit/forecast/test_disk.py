"""What checkpoints take: rollouts that they keep for later steps, against what is written."""

from __future__ import annotations

import numpy as np
import pytest

from engine.core.arrays import LogProbs
from engine.core.types import Rollout, RolloutGroup, Score
from engine.forecast import disk
from engine.inference.pool import Usage
from engine.rollouts.ahead import AHEAD, Ahead
from tests import builders
from tests.rollouts import make_completion, make_prompt

TABLES = {
    "run": {"steps": 12},
    "data": {"prompts_per_step": 2},
    "algorithm": {"samples_per_prompt": 4},
    "sampling": {"max_tokens": 500},
    "checkpoint": {"every": 3},
}


def test_rollouts_kept_ahead_count_as_long_as_they_may_be(tmp_path):
    """Two intervals of three steps each, of the longest tokens: no more than the estimate, and not less than half of it."""
    made = builders.spec(builders.config(**TABLES, sync={"sync_interval": 3, "lookahead": 2}))
    draw, steps = np.random.default_rng(0), {}
    for step in range(6):
        rollouts = []
        for sample in range(8):
            log_probs = LogProbs.copied(-draw.exponential(0.5, 500).astype(np.float32))
            tokens = draw.integers(100_000, 128_256, 500).tolist()
            answer = make_completion("p", sample, 2**62, 0, tokens, log_probs, "word" * 500, "length")
            rollouts.append(Rollout(answer, Score(1.0, "ok")))
        steps[step] = [RolloutGroup(make_prompt("p", (1,), "", "", "", ""), step, tuple(rollouts))], Usage(1, 1.0)
    Ahead(steps).write(tmp_path)
    written = sum(file.stat().st_size for file in (tmp_path / AHEAD).iterdir())
    assert disk.ahead_bytes(made) / 2 < written <= disk.ahead_bytes(made)
    alone = builders.spec(builders.config(**TABLES, sync={"sync_interval": 3}))
    assert disk.checkpoint_bytes(made) - disk.checkpoint_bytes(alone) == disk.ahead_bytes(made)


@pytest.mark.parametrize(
    "changes",
    [{"sync": {"sync_interval": 3}}, {"sync": {"sync_interval": 3, "lookahead": 2}, "checkpoint": {"every": 12}}],
)
def test_nothing_is_kept_ahead_without_a_lookahead_or_at_the_end_alone(changes):
    assert disk.ahead_bytes(builders.spec(builders.config(**builders.merged(TABLES, changes)))) == 0
