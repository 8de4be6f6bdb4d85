"""What processes tell while they work: heard at once, in its place among the steps, in words, and written down."""

import json
import subprocess
import sys
from typing import Any

import pytest

from engine.observe import telling
from engine.observe.telling import BYTES, COUNTED_IN_WORDS, TOLD, WORDS, Activity, Doing, Told, duration, in_order
from engine.observe.timeline import EVENTS, STARTUP, Timeline

PROCESS = """
import sys
from pathlib import Path
from engine.observe.journal import Journal
from engine.observe.telling import activity, tell
Journal(Path(sys.argv[1]), sys.argv[2], False).open()
tell({"kind": "note", "text": "of interest"})
with activity("weights", total=4 << 30, unit="bytes") as reading:
    reading.at(1 << 30)
    reading.more(3 << 30)
"""


def process(folder, name):
    done = subprocess.run([sys.executable, "-c", PROCESS, str(folder), name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_process_tells_is_heard_once_and_goes_into_its_log(tmp_path):
    (tmp_path / f"engine_0{TOLD}").write_text('{"kind": "note", "text": "of a command that was killed", "unix_seconds": 1}\n')
    told = Told(tmp_path)
    assert told.fresh() == []
    process(tmp_path, "trainer rank 0")
    note, begins, done = told.fresh()
    assert (note["kind"], note["text"]) == ("note", "of interest") and note["unix_seconds"] > 1e9
    assert (begins["where"], begins["state"], begins["done"]) == ("trainer rank 0", "begins", 0)
    assert (done["state"], done["done"], done["total"], done["unit"]) == ("done", 4 << 30, 4 << 30, BYTES)
    assert told.fresh() == []
    log = (tmp_path / "trainer_rank_0.log").read_text()
    assert "of interest" in log and "the weights are read: 4.0 GiB" in log
    told.close()
    assert not list(tmp_path.glob(f"*{TOLD}"))


def test_of_the_trainer_ranks_the_first_speaks(tmp_path):
    told = Told(tmp_path)
    process(tmp_path, "trainer rank 1")
    assert told.fresh() == []
    assert "the weights are read" in (tmp_path / "trainer_rank_1.log").read_text()
    process(tmp_path, "engine 1")
    assert {event.get("where", "engine 1") for event in told.fresh()} == {"engine 1"}


def test_how_far_it_has_come_is_told_now_and_then(monkeypatch):
    now = [0.0]
    heard: list[Any] = []
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(telling, "tell", heard.append)
    with telling.activity("evaluation", total=100) as doing:
        for part in range(100):
            now[0] += 0.25
            doing.at(part + 1)
    assert [event["done"] for event in heard] == [0, *range(8, 97, 8), 100]
    assert [event["seconds"] for event in heard[:3]] == [0.0, 2.0, 4.0]


def test_an_activity_that_fails_is_not_done(monkeypatch):
    heard: list[Any] = []
    monkeypatch.setattr(telling, "tell", heard.append)
    with pytest.raises(OSError, match="no disk"), telling.activity("checkpoint"):
        raise OSError("no disk")
    assert [event["state"] for event in heard] == ["begins"]


@pytest.mark.parametrize("what", WORDS)
def test_every_activity_has_words(what):
    assert what in COUNTED_IN_WORDS or "{total}" not in "".join(WORDS[what])
    for state in ("begins", "done"):
        said = str(Activity.of(Doing(what, "of 4 steps", total=2, where="engine 1").event(state)))  # type: ignore[arg-type]
        assert "{" not in said and said.endswith(" s") and said[0] != " "


@pytest.mark.parametrize(
    ("activity", "words"),
    [
        (Activity("engine 1", "engine", "done", seconds=12.3, total=2), "engine 1 (of 2) is up, 12 s"),
        (Activity("the reward engine", "engine", "begins", seconds=1.0), "the reward engine is loading, 1.0 s"),
        (
            Activity("trainer rank 0", "weights", "goes on", seconds=200.0, done=37 << 30, total=131 << 30, unit=BYTES),
            "reading the weights: 37.0 of 131.0 GiB, 3 min 20 s",
        ),
        (Activity("trainer rank 0", "ranks", "done", seconds=2.0, total=8), "all 8 trainer ranks are up, 2.0 s"),
        (Activity("trainer rank 0", "checkpoint", "done", "of 4 steps", 0.3), "a checkpoint of 4 steps is saved, 0.3 s"),
        (
            Activity("trainer rank 0", "evaluation", "begins", "step 0 on sums", 3.0, 120, 512, "problems"),
            "evaluating step 0 on sums: 120 of 512 problems, 3.0 s",
        ),
    ],
)
def test_activities_as_people_read_them(activity, words):
    assert str(activity) == words


def test_durations_are_as_exact_as_they_are_long():
    assert [duration(seconds) for seconds in (0.04, 9.94, 9.96, 119, 125.2)] == ["0.0 s", "9.9 s", "10 s", "119 s", "2 min 5 s"]


def test_what_is_told_stands_before_the_step_that_ended_after_it():
    """Also where it is read too early: an evaluation of step 2 while the event of step 1 is still under way."""

    def told(text: str, unix_seconds: float) -> dict[str, Any]:
        return {"kind": "note", "text": text, "unix_seconds": unix_seconds}

    arriving = [[told("data", 1.0)], [told("after 0", 2.5), told("after 1", 4.5)], [], [told("end", 6.0)]]
    steps = [{"kind": "step", "step": step, "unix_seconds": 2.0 * (step + 1)} for step in range(2)]
    events = list(in_order(lambda: arriving.pop(0), [*steps, None, {"kind": "done"}]))
    assert [event.get("text", event.get("step", "done")) for event in events] == [
        "data",
        0,
        "after 0",
        1,
        "after 1",
        "end",
        "done",
    ]
    assert list(in_order(lambda: [{"kind": "warning"}], [None])) == [{"kind": "warning"}], "without a time: at once"


def test_a_start_is_written_down_by_its_phases(tmp_path):
    timeline = Timeline(100.0)

    def done(what: str, unix_seconds: float, seconds: float, where: str = "the command") -> dict[str, Any]:
        return Doing(what, where=where).event("done") | {"unix_seconds": unix_seconds, "seconds": seconds}

    timeline.add(done("preflight", 103.0, 2.0))
    assert not list(tmp_path.iterdir()), "the directory is not ours yet"
    timeline.open(tmp_path)
    timeline.add(Doing("weights").event("begins"))
    timeline.add({"kind": "note", "text": "data", "unix_seconds": 104.0})
    timeline.add(done("weights", 109.0, 4.0, "trainer rank 0"))
    for step in range(2):
        timeline.add({"kind": "step", "step": step, "unix_seconds": 110.0 + step})
    timeline.add(done("checkpoint", 120.0, 1.0, "trainer rank 0"))
    timeline.add({"kind": "restart", "step": 1, "text": "lost", "unix_seconds": 130.0})
    timeline.add(done("ray", 133.0, 3.0))
    timeline.add({"kind": "step", "step": 1, "unix_seconds": 140.0})
    first, second = [json.loads(line) for line in (tmp_path / STARTUP).read_text().splitlines()]
    assert (first["step"], first["unix_seconds"], first["seconds"]) == (0, 100.0, 10.0)
    assert [(phase["process"], phase["name"], phase["after_seconds"], phase["seconds"]) for phase in first["phases"]] == [
        ("the command", "preflight", 1.0, 2.0),
        ("trainer rank 0", "weights", 5.0, 4.0),
        ("trainer rank 0", "first step", 9.0, 1.0),
    ]
    assert (second["step"], second["seconds"]) == (1, 10.0)
    last = [(phase["name"], phase["after_seconds"], phase["seconds"]) for phase in second["phases"]]
    assert last == [("ray", 0.0, 3.0), ("first step", 3.0, 7.0)], "what no phase is told of is the first step"
    rows = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    assert [row.get("what", row["kind"]) for row in rows] == ["preflight", "note", "weights", "checkpoint", "ray"]
    assert all(row["unix_seconds"] >= 103.0 for row in rows)
