"""The records of a run over a resume: they are cut where the checkpoint says, at a cost that its age does not change; what
somebody edited or an older version left out is found by reading, with a note; the guard goes on as if nothing had happened.
"""

import json
import math
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.load import RunConfig
from engine.core.errors import CheckpointError, StorageError
from engine.core.jsonl import line_of, read_rows
from engine.core.segment_writer import SegmentWriter
from engine.core.segments import segments_of
from engine.core.types import Rollout, RolloutGroup, Score
from engine.observe.guard import Guard
from engine.observe.rollouts import heads
from engine.rollouts.ledger import RolloutLedger, ledger_rows
from engine.rollouts.writer import RolloutWriter
from engine.run.records import Records
from tests import builders
from tests.rollouts import make_completion, make_prompt

LEDGERS = ("metrics", "evaluations", "samples", "guard")
TEXT = "x" * 500  # of a rollout


def config_of(root: Path, **guard: Any) -> RunConfig:
    return builders.config(root, run={"steps": 1000}, data={"held_out": "unused"}, evaluation={"every": 50}, guard=guard)


def live(records: Records, steps: range) -> None:
    """What a run of these steps writes; an evaluation every 50."""
    for step in steps:
        if step % 50 == 0:
            judged = {"step": step, "set": "sums", "measure": "accuracy", "mean": float(step), "standard_error": 0.1}
            records.judge(judged | {"completion_tokens_mean": 3.0}, [{"problem": 1}])
            records.samples.append([{"step": step, "set": "sums"}])
        records.rollouts.append(step, [rollouts_of(step)])
        entropy = 1.0 if step % 40 < 25 else 0.01
        record = {"step": step, "rollout_entropy": entropy, "completion_tokens_mean": 9.0, "reward_mean": 0.5}
        records.finish_step(record)
        for finding in records.guard.observe(record):
            records.find(finding)


def rollouts_of(step: int, version: int | None = None) -> RolloutGroup:
    """Two rollouts of a step, by the weights of that step or of another one."""
    version = step if version is None else version
    completions = [make_completion("p", place, step, version, (step, place), (-0.5, -0.25), TEXT, "stop") for place in range(2)]
    prompt = make_prompt("p", (1,), "", "", "", "")
    return RolloutGroup(prompt, step, tuple(Rollout(completion, Score(1.0, "ok")) for completion in completions))


def files(root: Path) -> dict[str, bytes]:
    found = {name: (root / f"{name}.jsonl").read_bytes() for name in LEDGERS}
    return found | {f"rollouts/{path.name}": path.read_bytes() for path in (root / "rollouts").glob("*")}


def sampled_steps(root: Path) -> list[int]:
    """The steps of which rollouts are on record."""
    return sorted({head.step for head in heads(root / "rollouts")})


def begun(root: Path, saved: int, beyond: int) -> dict[str, Any]:
    """A run that saved a checkpoint after `saved` steps and was lost after `beyond` more; what the checkpoint keeps."""
    records = Records.open(config_of(root), 0, None)
    live(records, range(saved))
    kept = json.loads(json.dumps(records.kept({saved - 100})))
    live(records, range(saved, saved + beyond))
    records.close()
    return kept


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr("engine.rollouts.writer.SegmentWriter", partial(SegmentWriter, segment_bytes=30_000))


def test_a_resumed_run_has_the_records_of_one_that_was_never_lost(tmp_path):
    whole = Records.open(config_of(tmp_path / "whole"), 0, None)
    live(whole, range(260))
    whole.close()
    for place, saved in enumerate((1, 49, 50, 170, 200, 259)):
        kept = begun(root := tmp_path / str(place), saved, 60)
        resumed = Records.open(config_of(root), saved, kept)
        assert resumed.notes == []
        assert sampled_steps(root) == list(range(saved))
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
    """Nor does it list more than the segments' names."""
    sizes, costs = [], []
    guard = Guard(config_of(tmp_path).guard).state()
    packed = tmp_path / "packed"
    writer = SegmentWriter(packed, {"token_ids": "int32"}, segment_bytes=1)
    for step in range(2):
        writer.append(step, [{"step": step, "text": TEXT}] * 99, {"token_ids": [np.arange(900, dtype=np.int32)] * 99})
    writer.close()
    full, columns = packed / "00000000-00000000.jsonl.zst", packed / "00000000.arrows"
    folder = tmp_path / "rollouts"
    for saved in (400, 400, 50, 40_000):  # the first time is for imports and the like
        num_bytes = {}
        for name in LEDGERS:  # the same rows at any age, but for the digits of their steps
            rows = ({"step": step, "set": "sums", "text": TEXT} for step in range(saved + 20))
            lines = [line_of(row) for row in rows]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
            num_bytes[name] = sum(map(len, lines[:saved]))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for first in range(0, saved - 40, 40):  # of 40 steps each
            os.link(full, folder / f"{first:08d}-{first + 39:08d}.jsonl.zst")
            os.link(columns, folder / f"{first:08d}.arrows")
        writer = SegmentWriter(folder, {"token_ids": "int32", "log_probs": "float32"})
        for step in range(saved - 5, saved):
            writer.append(step, *columns_of_step(step))
        known = writer.sync()
        for step in range(saved, saved + 20):
            writer.append(step, *columns_of_step(step))
        writer.close()
        sizes.append(sum(num_bytes.values()) + sum(path.stat().st_size for path in folder.iterdir()))
        config = config_of(tmp_path)
        kept: dict[str, Any] = {"bytes": num_bytes, "guard": guard, "judged": [], "rollouts": known}
        costs.append(moved_by(lambda c=config, s=saved, k=kept: Records.open(c, s, k).close()))
        assert {(tmp_path / f"{name}.jsonl").stat().st_size for name in LEDGERS} == {num_bytes["metrics"]}
        assert segments_of(folder)[-1].last_step() == saved - 1
    (_, _, small, large), (_, _, young, old) = sizes, costs
    assert large > 500 * small > 50_000_000
    assert [abs(a - b) < 1000 for a, b in zip(young, old, strict=True)] == [True, True], (young, old)
    assert old[0] < 500_000


def columns_of_step(step: int) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    row = {"step": step, "version": step, "text": TEXT}
    return [row, row], {"token_ids": [np.arange(2)] * 2, "log_probs": [np.arange(2, dtype=np.float32)] * 2}


def test_edited_records_are_cut_where_their_step_begins_and_somebody_is_told(tmp_path):
    kept = begun(tmp_path, 120, 7)
    metrics, segment = tmp_path / "metrics.jsonl", segments_of(tmp_path / "rollouts")[-1]
    lines = segment.rows.read_text().splitlines(keepends=True)
    assert segment.first < 114
    segment.rows.write_text("".join(lines[10:]))
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:100]))
    records = Records.open(config_of(tmp_path), 120, kept)
    records.close()
    assert segment.rows.read_text() == "".join(lines[10:-14])
    assert [row["step"] for row in read_rows(metrics)] == list(range(100))
    assert len(records.notes) == 2
    assert "metrics.jsonl was changed: by the checkpoint, step 120 begins at byte" in records.notes[0]
    assert "rollouts was changed: by the checkpoint, step 120 begins in segment" in records.notes[1]


def test_a_line_that_is_no_row_where_a_step_is_looked_for_is_named(tmp_path):
    kept = begun(tmp_path, 10, 2)
    rollouts = tmp_path / "rollouts" / "00000000.jsonl"
    rollouts.write_bytes(rollouts.read_bytes() + b"not ours\n")
    with pytest.raises(CheckpointError, match=r"00000000\.jsonl, byte \d+: "):
        Records.open(config_of(tmp_path), 5, None)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(12)), "none was cut"
    assert Records.open(config_of(tmp_path), 10, kept).notes == [], "what follows the checkpoint is cut unread"


def test_the_rollouts_of_a_run_that_an_older_version_began_are_gone_on_with(tmp_path):
    """It wrote one file of them, and its checkpoint says how long that was."""
    kept = begun(tmp_path / "whole", 120, 7)
    begun(tmp_path / "run", 120, 7)
    shutil.rmtree(tmp_path / "run" / "rollouts")
    lines = [line_of(row) for step in range(127) for row in ledger_rows(rollouts_of(step))]
    (tmp_path / "run" / "rollouts.jsonl").write_text("".join(lines))
    del kept["rollouts"]
    kept["bytes"]["rollouts"] = sum(map(len, lines[:240]))
    records = Records.open(config_of(tmp_path / "run"), 120, kept)
    assert records.notes == []
    live(records, range(120, 127))
    records.close()
    ledger, whole = RolloutLedger(tmp_path / "run" / "rollouts"), RolloutLedger(tmp_path / "whole" / "rollouts")
    assert [ledger.rows(step) for step in range(127)] == [whole.rows(step) for step in range(127)]


@pytest.mark.parametrize("name", ["evaluations", "metrics"])
def test_a_line_that_stays_and_is_no_row_is_found_before_anything_is_cut(tmp_path, name):
    """With a checkpoint of an older version, which says neither what was judged nor what the guard has seen."""
    begun(tmp_path, 120, 7)
    config = config_of(tmp_path)
    ledger = tmp_path / f"{name}.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    if name == "evaluations":  # the row of step 100
        lines[-1] = lines[-1][:-2] + b"\n"
    else:
        lines[30] = b"x" * (len(lines[30]) - 1) + b"\n"
    ledger.write_bytes(b"".join(lines))
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name}\.jsonl, (byte|line) \d+: must be one JSON object"):
        Records.open(config, 120, None)
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
    assert not list((tmp_path / "rollouts").iterdir())


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
    restored.restore(json.loads(json.dumps(whole.state(), allow_nan=False)))
    assert [whole.observe(row) for row in rows[resumed_at:]] == [restored.observe(row) for row in rows[resumed_at:]]
    assert whole.state() == restored.state()


def test_a_guard_with_another_share_goes_on_and_tells_by_that_share(tmp_path):
    """What the old share told is told once more by the new one, where it goes on; no metrics are read for it."""
    kept = begun(tmp_path, 30, 0)
    assert kept["guard"]["told"] == ["entropy"]
    assert Records.open(config_of(tmp_path), 30, kept).guard.state() == kept["guard"]
    lenient = Records.open(config_of(tmp_path, entropy_share=0.001), 30, kept).guard.state()
    assert lenient["told"] == [] and lenient["series"] == kept["guard"]["series"]


def test_what_cannot_be_written_is_told_at_the_next_step_and_nothing_follows_it(tmp_path):
    class Full:
        """A store of which the disk is full at step 1."""

        def __init__(self) -> None:
            self.steps: list[int] = []

        def append(self, step: int, groups: object) -> None:
            if step == 1:
                raise StorageError("runs/r/rollouts cannot be written: the disk is full")
            self.steps.append(step)

        def sync(self) -> None:
            """Nothing to sync."""

        def close(self) -> None:
            """Nothing to close."""

    store = Full()
    writer = RolloutWriter(store)
    with pytest.raises(StorageError, match="rollouts cannot be written: the disk is full"):
        _appended(writer, 8)
    with pytest.raises(StorageError):
        _appended(RolloutWriter(Full()), 2).settle()
    with pytest.raises(StorageError):
        _appended(RolloutWriter(Full()), 2).sync()
    with pytest.raises(StorageError):
        _appended(RolloutWriter(Full()), 2).close()
    writer.close()
    assert store.steps == [0]


def _appended(writer: RolloutWriter, num_steps: int) -> RolloutWriter:
    for step in range(num_steps):
        writer.append(step, [])
    return writer


def test_a_step_on_record_has_its_rollouts(tmp_path):
    """Metrics wait for the thread that writes rollouts, and a checkpoint for all of them."""
    records = Records.open(config_of(tmp_path), 0, None)
    written, begin = [], threading.Event()
    store = records.rollouts._store
    real = store.append

    def slow(step: int, groups: Any) -> None:
        assert begin.wait(10)
        real(step, groups)
        written.append(step)

    store.append = slow  # type: ignore[method-assign]
    records.rollouts.append(0, [rollouts_of(0)])
    assert written == [], "whoever hands a step over goes on"
    threading.Timer(0.1, begin.set).start()
    records.finish_step({"step": 0})
    assert (written, sampled_steps(tmp_path)) == ([0], [0])
    records.rollouts.append(1, [rollouts_of(1)])
    kept = records.kept(())
    assert kept["rollouts"] == {
        "segment": 0,
        "rows": (tmp_path / "rollouts" / "00000000.jsonl").stat().st_size,
        "columns": (tmp_path / "rollouts" / "00000000.arrows").stat().st_size,
    }
    records.close()
