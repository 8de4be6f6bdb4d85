"""Metric names are stable and each is declared once: what a step of any loss writes down is in the catalogue, the catalogue
names nothing that no step writes, and docs/metrics.md is what the declarations say.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from engine.algorithms.nll import NllLoss
from engine.algorithms.registry import make_loss
from engine.core.errors import ConfigError
from engine.core.metrics import Metric, by_name
from engine.inference.pool import Usage
from engine.megatron import metrics as of_policy
from engine.observe.curves import CURVES
from engine.observe.progress import SHOWN
from engine.rollouts.batch import compared_tokens, step_data
from engine.rollouts.metrics import rollout_metrics
from engine.rollouts.waves import METRICS as OF_WAVES
from engine.run.loop import _finished
from engine.run.metrics import METRICS, catalogue
from tests.builders import algorithm_options
from tests.unit.rollouts.test_rollouts import MIXED, run_config
from tools.document import DOCS, DOCUMENTS

OWN_LOSS = Path(__file__).resolve().parents[2] / "own_loss.py"
ALGORITHMS: list[dict[str, Any]] = [
    {"loss": "dpo", "nll_weight": 1.0, "entropy_weight": 1e-4},
    {"loss": "group_dpo", "alpha": 0.01},
    {"loss": "dpo", "weight_pairs": True},
    {"loss": "grpo"},
    {"loss": "grpo", "correction": "truncate", "correction_high": 2.0},
    {"loss": "cispo"},
    {"loss": "oapl"},
]
# What the code computes only beside engines; tests/e2e holds real rows against the catalogue
ELSEWHERE = {
    *(
        "staleness",
        "staleness_max",
        "updated_in_flight",
        "wait_seconds",
        "reward_seconds",
        "engines_idle_share",
        "reward_mean_NAME",
        "reward_PART_mean",
        "groups",
    ),
    *(one.name for one in METRICS),
    *(one.name for one in OF_WAVES),
}
RECORDED = {  # what the figures on record and their readers depend on
    *("step", "loss", "grad_norm", "learning_rate", "reward_mean", "accuracy", "rollout_entropy", "completion_tokens_mean"),
    *("margin_mean", "preferred_share", "chosen_log_prob_mean", "rejected_log_prob_mean", "log_prob_gap_mean", "kl_mean"),
    *("rollout_kl_mean", "ratio_max", "clamped_tokens"),
    *("clipped_share", "ratio_mean", "entropy_mean", "nll_mean", "skipped_share", "staleness", "sync_seconds"),
    *("sync_mebibytes", "wait_seconds", "train_seconds", "step_seconds"),
    *("generation_tokens_per_second", "training_tokens_per_second"),
}


def documented() -> set[str]:
    """The names of the catalogue."""
    return set(catalogue())


def written() -> set[str]:
    """The names of a step's record, over all losses, as far as no engine is needed for them."""
    names = set[str]()
    for options in ALGORITHMS:
        sampling = {"truncated": "wrong", "overlong_buffer": 2}
        config = run_config(algorithm={"samples_per_prompt": 6} | options, sampling=sampling)
        names |= step_data(MIXED, [(len(MIXED), len(MIXED) - 1)], rollout_metrics(MIXED, Usage(9, 1.0)), config).metrics.keys()
        names |= {metric.name for metric in make_loss(config.algorithm).metrics}
    names |= {metric.name for metric in (*NllLoss.metrics, *of_policy.METRICS)} | compared_tokens([]).keys()
    return names | _finished({"train_seconds": 1.0, "generation_seconds": 1.0, "generation_tokens": 1.0}).keys()


def test_the_catalogue_declares_what_a_step_writes_down_and_nothing_else():
    assert written() | ELSEWHERE == documented()
    assert documented() >= RECORDED


def test_the_document_is_made_from_the_declarations():
    for name, document in DOCUMENTS.items():
        assert (DOCS / name).read_text("utf-8") == document(), "run tools/document.py"


@pytest.mark.parametrize("shown", [set(SHOWN), {name for _, series in CURVES.values() for _, name in series}])
def test_what_is_displayed_and_plotted_is_declared(shown):
    assert shown <= documented()
    assert all(catalogue()[name].title for name in SHOWN), "what stands on a screen has a title"


def test_every_declaration_says_what_it_is():
    sums = {name for metric in catalogue().values() for name in metric.sums}
    for metric in catalogue().values():
        assert metric.help and "|" not in metric.help
        assert (metric.reduce == "mean") is bool(metric.per)
        assert not metric.per or metric.per in sums | catalogue().keys()


def test_two_declarations_of_one_name_are_a_fault():
    with pytest.raises(AssertionError, match="two declarations of loss"):
        by_name([Metric("loss", "one"), Metric("loss", "another")])


def test_means_are_over_their_own_count_and_of_nothing_no_number():
    mean = Metric("margin_mean", "of pairs", reduce="mean", per="pairs")
    assert mean.value(6.0, {"pairs": 4.0}) == 1.5
    assert math.isnan(mean.value(0.0, {"pairs": 0.0}))
    assert math.isnan(mean.value(1.0, {}))
    assert Metric("pairs", "count", reduce="sum").value(3.0, {}) == 3.0


def test_a_users_own_loss_adds_its_metrics_and_takes_no_name_of_ours(tmp_path):
    own = catalogue(algorithm_options({"loss": f"{OWN_LOSS}:Regression"}))
    assert own.keys() - documented() == {"residual_mean", "residual_max"}
    taken = tmp_path / "taken.py"
    taken.write_text(
        "from engine.algorithms.group import GroupLoss\nfrom engine.core.metrics import Metric\n"
        "class Taken(GroupLoss):\n    metrics = (Metric('accuracy', 'of mine', reduce='sum'),)\n"
        "    def group_loss(self, group):\n        return group.log_probs.sum()\n"
    )
    with pytest.raises(ConfigError, match=r"taken\.py:Taken' must give its metrics names of their own; found 'accuracy'"):
        catalogue(algorithm_options({"loss": f"{taken}:Taken"}))
