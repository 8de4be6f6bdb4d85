"""The records of a run over a resume: they are cut where the checkpoint says, at a cost that its age does not change; what
somebody edited or an older version left out is found by reading, with a note; the guard goes on as if nothing had happened.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.load import RunConfig
from engine.core.errors import CheckpointError
from engine.core.jsonl import line_of, read_rows
from engine.observe.guard import Guard
from engine.run.records import Records
from tests import builders

LEDGERS = ("metrics", "evaluations", "samples", "rollouts", "guard")
TEXT = "x" * 500  # of a rollout


def config_of(root: Path, **guard: Any) -> RunConfig:
    return builders.config(root, run={"steps": 1000}, data={"held_out": "unused"}, evaluation={"every": 50}, guard=guard)


def live(records: Records, steps: range) -> None:
    """What a run of these steps writes; an evaluation every 50."""
    for step in steps:
        if step % 50 == 0:
            records.judge({"step": step, "set": "sums", "mean": float(step)}, [{"problem": 1}])
            records.samples.append([{"step": step, "set": "sums"}])
        records.rollouts.append({"step": step, "text": TEXT} for _ in range(2))
        entropy = 1.0 if step % 40 < 25 else 0.01
        record = {"step": step, "rollout_entropy": entropy, "completion_tokens_mean": 9.0, "reward_mean": 0.5}
        records.metrics.write(record)
        for finding in records.guard.observe(record):
            records.find(finding)


def files(root: Path) -> dict[str, bytes]:
    return {name: (root / f"{name}.jsonl").read_bytes() for name in LEDGERS}


def begun(root: Path, saved: int, beyond: int) -> dict[str, Any]:
    """A run that saved a checkpoint after `saved` steps and was lost after `beyond` more; what the checkpoint keeps."""
    records = Records.open(config_of(root), 0, None)
    live(records, range(saved))
    kept = json.loads(json.dumps(records.kept({saved - 100})))
    live(records, range(saved, saved + beyond))
    records.close()
    return kept


def test_a_resumed_run_has_the_records_of_one_that_was_never_lost(tmp_path):
    whole = Records.open(config_of(tmp_path / "whole"), 0, None)
    live(whole, range(260))
    whole.close()
    for place, saved in enumerate((1, 49, 50, 170, 200, 259)):
        kept = begun(root := tmp_path / str(place), saved, 60)
        resumed = Records.open(config_of(root), saved, kept)
        assert resumed.notes == []
        assert [row["step"] for row in read_rows(root / "rollouts.jsonl")][-1] == saved - 1
        live(resumed, range(saved, 260))
        resumed.close()
        assert files(root) == files(tmp_path / "whole"), saved


def test_what_was_judged_at_the_checkpoint_stands_unless_it_is_due_again(tmp_path):
    """Later evaluations are held against those of step 0 and of the checkpoints that stand; others are not remembered."""
    kept = begun(tmp_path, 150, 60)
    assert [row["step"] for row in kept["judged"]] == [0, 50]
    again = Records.open(config_of(tmp_path), 150, kept)
    assert [row["step"] for row in again.judged] == [0, 50]
    assert [row["step"] for row in read_rows(again.evaluations.path)] == [0, 50, 100]
    live(again, range(150, 170))
    again.close()
    config = config_of(tmp_path)
    rare = config.evaluation.model_copy(update={"every": "ends"})
    stands = Records.open(config.model_copy(update={"evaluation": rare}), 150, kept)
    assert [row["step"] for row in stands.judged] == [0, 50, 150]
    assert [row["step"] for row in read_rows(stands.samples.path)] == [0, 50, 100, 150]
    assert all("records" not in row for row in stands.judged)
    stands.close()


def moved_by(action: Any) -> tuple[int, int]:
    """Bytes that this process read and wrote, through whatever call, while `action` ran."""

    def counted() -> tuple[int, int]:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["rchar"]), int(lines["wchar"])

    before = counted()
    action()
    after = counted()
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.slow
def test_what_a_resume_reads_and_writes_does_not_grow_with_the_age_of_the_run(tmp_path):
    sizes = []
    costs = []
    guard = Guard(config_of(tmp_path).guard).state()
    for saved in (400, 400, 40_000):  # the first time is for imports and the like
        num_bytes = {}
        for name in LEDGERS:  # the same rows at any age, but for the digits of their steps
            rows = ({"step": step, "set": "sums", "text": TEXT} for step in range(saved + 20))
            lines = [line_of(row) for row in rows]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
            num_bytes[name] = sum(map(len, lines[:saved]))
        sizes.append(sum(num_bytes.values()))
        config, kept = config_of(tmp_path), {"bytes": num_bytes, "guard": guard, "judged": []}
        costs.append(moved_by(lambda c=config, s=saved, k=kept: Records.open(c, s, k).close()))
        assert {len(data) for data in files(tmp_path).values()} == {num_bytes["rollouts"]}
    (_, small, large), (_, young, old) = sizes, costs
    assert large > 100 * small > 100_000_000
    assert [abs(a - b) < 200 for a, b in zip(young, old, strict=True)] == [True, True], (young, old)
    assert old[0] < 500_000


def test_an_edited_ledger_is_cut_where_its_step_begins_and_somebody_is_told(tmp_path):
    kept = begun(tmp_path, 120, 7)
    metrics, rollouts = tmp_path / "metrics.jsonl", tmp_path / "rollouts.jsonl"
    lines = rollouts.read_text().splitlines(keepends=True)
    rollouts.write_text("".join(lines[10:]))
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:100]))
    records = Records.open(config_of(tmp_path), 120, kept)
    records.close()
    assert rollouts.read_text() == "".join(lines[10:240])
    assert [row["step"] for row in read_rows(metrics)] == list(range(100))
    assert len(records.notes) == 2
    assert all("was changed: by the checkpoint, step 120 begins at byte" in note for note in records.notes)


def test_a_line_that_is_no_row_where_a_step_is_looked_for_is_named(tmp_path):
    kept = begun(tmp_path, 20, 2)
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_bytes(rollouts.read_bytes() + b"not ours\n")
    with pytest.raises(CheckpointError, match=r"rollouts\.jsonl, byte \d+: "):
        Records.open(config_of(tmp_path), 10, None)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(22)), "none was cut"
    assert Records.open(config_of(tmp_path), 20, kept).notes == [], "what follows the checkpoint is cut unread"


@pytest.mark.parametrize("name", ["evaluations", "metrics"])
def test_a_line_that_stays_and_is_no_row_is_found_before_anything_is_cut(tmp_path, name):
    """Of evaluations what came with the checkpoint's step is read, of metrics all, where the guard has other options."""
    kept: dict[str, Any] | None = begun(tmp_path, 120, 7)
    config = config_of(tmp_path, entropy_share=0.001)
    ledger = tmp_path / f"{name}.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    if name == "evaluations":  # the row of step 100, which a checkpoint of an older version does not have
        lines[-1], kept = lines[-1][:-2] + b"\n", None
    else:
        lines[30] = b"x" * (len(lines[30]) - 1) + b"\n"
    ledger.write_bytes(b"".join(lines))
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name}\.jsonl, (byte|line) \d+: must be one JSON object"):
        Records.open(config, 120, kept)
    assert files(tmp_path) == before


def test_a_checkpoint_of_an_older_version_is_resumed_by_reading(tmp_path):
    begun(tmp_path, 120, 7)
    records = Records.open(config_of(tmp_path), 120, None)
    assert [row["step"] for row in records.judged] == [0, 50, 100]
    assert "does not say how long the records were" in records.notes[0]
    live(records, range(120, 127))
    records.close()
    begun(tmp_path / "whole", 120, 7)
    assert files(tmp_path) == files(tmp_path / "whole")


def test_a_run_that_starts_over_empties_all_its_records(tmp_path):
    begun(tmp_path, 120, 7)
    records = Records.open(config_of(tmp_path), 0, None)
    records.close()
    assert (set(files(tmp_path).values()), records.notes) == ({b""}, [])


ENTROPIES = st.lists(st.sampled_from([0.05, 0.12, 1.0, math.nan]), min_size=30, max_size=30)


@settings(deadline=None)
@given(st.integers(1, 29), ENTROPIES)
def test_a_guard_restored_from_its_state_finds_what_one_does_that_saw_it_all(resumed_at, entropies):
    options = config_of(Path("unused")).guard
    rows = [{"step": step, "rollout_entropy": entropy, "reward_mean": entropy} for step, entropy in enumerate(entropies)]
    whole = Guard(options)
    for row in rows[:resumed_at]:
        whole.observe(row)
    restored = Guard(options)
    assert restored.restore(json.loads(json.dumps(whole.state(), allow_nan=False)))
    assert [whole.observe(row) for row in rows[resumed_at:]] == [restored.observe(row) for row in rows[resumed_at:]]
    assert whole.state() == restored.state()


def test_a_guard_with_other_shares_looks_at_the_run_anew(tmp_path):
    """What the old shares told is not what the new ones would have."""
    kept = begun(tmp_path, 30, 0)
    assert kept["guard"]["told"] == ["entropy"]
    assert Records.open(config_of(tmp_path), 30, kept).guard.state() == kept["guard"]
    lenient = Records.open(config_of(tmp_path, entropy_share=0.001), 30, kept).guard.state()
    assert lenient["told"] == [] and lenient["series"] == kept["guard"]["series"]
