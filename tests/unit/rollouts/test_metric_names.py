"""Metric names are stable and each is explained: what a step of any objective writes down stands in the table of
docs/architecture.md, and the table names nothing that no step writes.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from engine.algorithms.nll import NllObjective
from engine.algorithms.registry import make_objective
from engine.config.options import Algorithm
from engine.inference.pool import Usage
from engine.observe.progress import METRICS
from engine.observe.report import CURVES
from engine.rollouts.batch import compared_tokens, training_sequences
from engine.rollouts.metrics import rollout_metrics
from engine.run.loop import _finished
from tests.unit.rollouts.test_rollouts import MIXED, run_config

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "architecture.md"
# What the policy, the source and the publisher add; the end-to-end test holds real rows against the table
ADDED = {
    *("step", "loss", "grad_norm", "learning_rate", "num_tokens", "target_tokens", "staleness", "skipped_share"),
    *("rollout_seconds", "wait_seconds", "train_seconds", "step_seconds", "sync_seconds", "sync_mebibytes", "sync_attempts"),
    *("reward_mean_math", "reward_mean_model", "reward_mean_function", "spare_prompts_used", "unused_prompts"),
}
ALGORITHMS: list[dict[str, Any]] = [
    {"loss": "dpo", "nll_weight": 1.0, "entropy_weight": 1e-4},
    {"loss": "group_dpo", "alpha": 0.01},
    {"loss": "grpo"},
]


def documented() -> set[str]:
    """The names of the table's first column."""
    section = DOCUMENT.read_text("utf-8").split("## What a person watches")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def written() -> set[str]:
    """The names of a step's record, over all objectives."""
    names = set(ADDED)
    _, counts = training_sequences(MIXED, run_config())
    rollouts = rollout_metrics(MIXED, Usage(9, 1.0)) | counts | compared_tokens([])
    for objective in [*(make_objective(Algorithm(**algorithm)) for algorithm in ALGORITHMS), NllObjective()]:
        names |= _finished(dict.fromkeys((*ADDED, *objective.metric_names), 1.0) | rollouts).keys()
    return names


def test_the_table_explains_what_a_step_writes_down_and_nothing_else():
    assert documented() == written()


@pytest.mark.parametrize("shown", [{key for _, key, _ in METRICS}, {key for *_, own in CURVES.values() for _, key in own}])
def test_what_is_displayed_and_plotted_is_written_down(shown):
    assert shown <= written()
