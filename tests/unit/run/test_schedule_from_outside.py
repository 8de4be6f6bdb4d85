"""A regime that the engine does not have, in a file of its own: an interval that doubles, so syncs at 0, 1, 3, 7, 15 and on. It
drives the loop, the rules and the proof from the records, and nothing in engine/ knows of it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import RunConfig, dump_config, load_config
from engine.config.schedules.registry import SCHEDULES
from engine.core.errors import CheckpointError, ConfigError
from engine.observe.regime import prove
from engine.run.checkpoint import check_prolonged
from engine.run.milestones import commits
from tests.unit.run.test_loop import World, step_of

DOUBLING = '''
from engine.config.schedules.base import Schedule


class Doubling(Schedule):
    """Syncs at 0, 1, 3, 7, 15 and on."""

    def sync_due(self, step):
        return (step + 1) & step == 0
'''
SYNCS = [0, 1, 3, 7, 15]
BASE = """
[run]
directory = "run"
steps = 20
[model]
path = "seed"
[data]
train = "train.jsonl"
held_out = "held_out.jsonl"
"""


def configured(folder: Path, code: str, *overrides: str) -> RunConfig:
    (folder / "mine.py").write_text(code, encoding="utf-8")
    (folder / "run.toml").write_text(BASE, encoding="utf-8")
    return load_config(folder / "run.toml", [f"sync.semantics={folder / 'mine.py'}:Doubling", *overrides])


def test_it_drives_the_loop(tmp_path):
    schedule = configured(tmp_path, DOUBLING, "run.steps=5", "sync.reference=follow").schedule
    world = World()
    records = world.run(schedule)
    assert world.log == [
        "publish 0", "evaluate 0", "open 0-0", *step_of(0),
        "publish 1", "evaluate 1", "reference", "open 1-2", *step_of(1), *step_of(2),
        "publish 3", "evaluate 3", "reference", "open 3-4", *step_of(3), *step_of(4),
        "publish 5", "evaluate 5",
    ]  # fmt: skip
    assert world.staleness == {0: 0, 1: 0, 2: 1, 3: 0, 4: 1}
    assert ["sync_seconds" in record for record in records] == [True, True, False, True, False]


def test_an_evaluation_between_its_syncs_changes_no_rollout(tmp_path):
    schedule = configured(tmp_path, DOUBLING).schedule
    plain, watched = World(), World(colocated=True)
    plain.run(schedule, due=lambda step: False)
    watched.run(schedule, due=lambda step: step % 2 == 0)
    assert watched.staleness == plain.staleness == {t: t - max(s for s in SYNCS if s <= t) for t in range(20)}


def test_the_rules_and_what_is_due_ask_it(tmp_path):
    """A checkpoint comes where the run can be continued, as soon as its interval is over."""
    config = configured(tmp_path, DOUBLING, "checkpoint.every=5", "evaluation.every=5")
    assert [step for step in range(21) if config.checkpoint_due(step)] == [7, 15, 20]
    assert [step for step in range(21) if config.evaluation_due(step)] == [0, 5, 10, 15, 20]
    assert config.evaluates_between_syncs
    assert not config.keeps_seed, "only offline are the seed's weights wanted again"
    assert [step for step in range(1, 21) if commits(config, step, ends=True)] == [1, 3, 7, 15, 20]
    check_prolonged(config, 15, range(0))
    with pytest.raises(CheckpointError, match=r"cannot be raised from 12: .* is one of 7 steps"):
        check_prolonged(config, 12, range(0))
    ahead = configured(tmp_path, DOUBLING, "sync.lookahead=1")
    check_prolonged(ahead, 7, range(7, 15))
    check_prolonged(ahead, 3, range(3, 15))  # of a run with a longer interval there, or one that was longer
    with pytest.raises(CheckpointError, match=r"lookahead = 1 .* steps 7 to 14 .* found those of 7 to 11 in it"):
        check_prolonged(ahead, 7, range(7, 12))
    with pytest.raises(CheckpointError, match=r"run\.steps = 20 .* of 7 steps: .* found none in it"):
        check_prolonged(ahead, 7, range(0))
    updated = configured(tmp_path, DOUBLING, "sync.lookahead=2", "sync.in_flight=true").schedule
    assert [updated.versions(step) for step in (2, 3, 7, 15)] == [(0,), (0, 1), (1, 3), (3, 7)]
    assert (updated.completes(7), updated.in_flight(7), updated.samples(7)) == (range(7, 15), range(7, 20), range(15, 20))
    with pytest.raises(ConfigError, match=r"data\.replay needs sync\.sync_interval = 'never'"):
        configured(tmp_path, DOUBLING, "data.replay=rollouts.jsonl")
    (tmp_path / "again.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config


def records(folder: Path, versions: dict[int, int], synced: list[int]) -> None:
    """rollouts.jsonl and metrics.jsonl of a run, one rollout a step."""
    rows: list[dict[str, Any]] = [{"step": t, "version": v} for t, v in versions.items()]
    told = {t: {"sync_seconds": 1.0} if t in synced else {} for t in versions}
    metrics = [{"step": t, "staleness": float(t - v)} | told[t] for t, v in versions.items()]
    for name, lines in (("rollouts", rows), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_proof_holds_for_it_and_refutes_another(tmp_path):
    schedule = configured(tmp_path, DOUBLING).schedule
    versions = {t: max(s for s in SYNCS if s <= t) for t in range(20)}
    records(tmp_path, versions, SYNCS)
    proof = prove(tmp_path, schedule)
    assert proof.holds
    assert proof.sentence() == "Doubling with s = 1: staleness 0..7, proven from 20 rollouts of 20 steps"
    assert not prove(tmp_path, configured(tmp_path, DOUBLING, "sync.semantics=paper").schedule).holds
    records(tmp_path, versions | {4: 1}, SYNCS)
    assert "line 5 must have version 3 at step 4; found 1" in prove(tmp_path, schedule).sentence()


CONTRADICTIONS = {
    "no weight sync before step 0": "def sync_due(self, step): return step == 1",
    "never_syncs, and a weight sync before step 1": "never_syncs = True\n    def sync_due(self, step): return True",
    r"submitted together before step 0, which serves version 0": (
        "def sync_due(self, step): return step == 0\n    def version(self, step): return step"
    ),
    "where those of step 0 come next": "def sync_due(self, step): return True\n    def opens(self, step): return range(0)",
    "to weights that are not the seed's": (
        "def sync_due(self, step): return step in (0, 3)\n    def opens(self, step): return range(step, step + 1)"
    ),
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_a_regime_that_contradicts_itself_is_refused_before_anything_starts(tmp_path, words):
    code = f"from engine.config.schedules.base import Schedule\n\n\nclass Doubling(Schedule):\n    {CONTRADICTIONS[words]}\n"
    with pytest.raises(ConfigError, match=f"sync.semantics must be a regime that the loop can follow; .*{words}.*: mend it"):
        configured(tmp_path, code)


def test_ours_contradict_nothing_and_an_unknown_name_is_refused(tmp_path):
    assert SCHEDULES.names == ("fairseq2", "paper")
    for name in SCHEDULES.names:
        for interval in (1, 2, 5, "never"):
            assert SCHEDULES.load(name)(interval, "never", 20, 6).contradictions() == []
    with pytest.raises(ConfigError, match=r"sync\.semantics must be one of fairseq2, paper, or your own"):
        configured(tmp_path, DOUBLING, "sync.semantics=queue")
