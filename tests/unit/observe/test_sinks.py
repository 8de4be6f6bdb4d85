"""Sinks and progress: what a resumed run keeps, what a reader of the files gets, what a person sees in each mode."""

import io
import json
import math

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from engine.observe import progress as progress_module
from engine.observe.progress import SHOWN, Progress, print_table
from engine.observe.sinks import MetricsWriter, write_json
from engine.run.metrics import catalogue

METRICS = catalogue()


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


class TestMetricsWriter:
    def test_one_object_a_step_and_the_same_scalars_in_tensorboard(self, tmp_path):
        with MetricsWriter(tmp_path) as writer:
            writer.write({"step": 0, "loss": 0.5, "sync_seconds": 0.25})
            writer.write({"step": 1, "loss": math.inf})
        assert lines_of(tmp_path / "metrics.jsonl") == [
            {"step": 0, "loss": 0.5, "sync_seconds": 0.25},
            {"step": 1, "loss": None},
        ]
        assert scalars(tmp_path) == [(0, "loss", 0.5), (0, "sync_seconds", 0.25), (1, "loss", math.inf)]

    def test_resuming_drops_the_steps_after_the_checkpoint(self, tmp_path):
        with MetricsWriter(tmp_path) as writer:
            for step in range(5):
                writer.write({"step": step, "loss": float(step)})
        with MetricsWriter(tmp_path) as resumed:
            resumed.cut(resumed.ledger.find(3), 3)
            resumed.write({"step": 3, "loss": 30.0})
        assert [row["loss"] for row in lines_of(tmp_path / "metrics.jsonl")] == [0.0, 1.0, 2.0, 30.0]
        restarts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
        assert restarts == [3]


def events(directory):
    paths = sorted((directory / "tensorboard").iterdir(), key=lambda path: path.name)
    return [event for path in paths for event in EventFileLoader(str(path)).Load()]


def scalars(directory):
    return [
        (event.step, value.tag, value.simple_value or value.tensor.float_val[0])
        for event in events(directory)
        for value in event.summary.value
    ]


def test_write_json_replaces_whole_documents(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"seed_accuracy": 0.4})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"seed_accuracy": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"seed_accuracy": 0.4}


class TestProgressWithoutTerminal:
    def test_exactly_one_line_a_step_with_the_metrics_it_holds(self, clock):
        text = io.StringIO()
        with Progress(4, "train", METRICS, Console(file=text, width=40)) as progress:
            for step in range(2):
                clock[0] += 10.0
                progress.update({"step": step, "loss": 0.125, "accuracy": 0.5})
        first, second = text.getvalue().splitlines()
        assert first.startswith("train  1/4  left 0:00:30  ")
        assert second.startswith("train  2/4  left 0:00:20  ")
        assert "loss 0.1250" in first
        assert "accuracy 50.0%" in first
        assert "margin" not in first and " -" not in first

    def test_time_left_of_a_resumed_run_counts_its_own_steps(self, clock):
        text = io.StringIO()
        with Progress(100, "train", METRICS, Console(file=text)) as progress:
            clock[0] += 10.0
            progress.update({"step": 97})
        assert "98/100  left 0:00:20" in text.getvalue()

    def test_a_restart_takes_the_bar_back_and_the_pace_is_that_of_what_follows(self, clock):
        text = io.StringIO()
        with Progress(10, "train", METRICS, Console(file=text)) as progress:
            clock[0] += 10.0
            progress.update({"step": 6})
            clock[0] += 500.0  # a process hangs
            progress.rewind(4)
            clock[0] += 3.0
            progress.update({"step": 4})
        assert "5/10  left 0:00:15" in text.getvalue()

    def test_a_note_is_one_line_and_not_markup(self):
        text = io.StringIO()
        with Progress(1, "train", METRICS, Console(file=text, width=20)) as progress:
            progress.note("checkpoint of [bold] step 3 written to a long path")
        assert text.getvalue() == "checkpoint of [bold] step 3 written to a long path\n"


class TestProgressOnTerminal:
    def test_the_display_is_drawn_over_and_ends_with_the_newest_figures(self, clock):
        text = io.StringIO()
        console = Console(file=text, width=120, force_terminal=True, color_system=None)
        with Progress(4, "semi-online", METRICS, console) as progress:
            clock[0] += 5.0
            progress.update({"step": 0, "loss": 0.5})
            progress.note("weights of step 1 served")
            progress.update({"step": 1, "loss": 0.25, "generation_tokens_per_second": 12345.6})
        screen = text.getvalue()
        assert "\x1b[2K" in screen, "the display must erase its earlier drawing"
        assert "weights of step 1 served\n" in screen
        final = screen[screen.rindex("semi-online") :]
        assert "2/4" in final
        assert "0.2500" in final
        assert "12,346 tokens/s" in final
        assert all(METRICS[name].title and METRICS[name].title in final for name in SHOWN)

    def test_a_restart_is_seen_before_the_first_step_that_follows(self, clock):
        text = io.StringIO()
        with Progress(8, "train", METRICS, Console(file=text, width=120, force_terminal=True, color_system=None)) as progress:
            progress.update({"step": 5, "loss": 0.5})
            progress.rewind(0)
            progress.rewind(4)
        shown = text.getvalue()
        assert shown.index("6/8") < shown.index("0/8  left -") < shown.index("4/8  left -")
        assert "0.5000" in shown[shown.rindex("4/8") :], "the newest value of a metric stays"


def test_print_table_shows_heading_and_rows():
    text = io.StringIO()
    print_table("held out", [("model", "accuracy"), ("seed", "41.0 ± 0.9")], Console(file=text, width=60))
    title, *rest = text.getvalue().splitlines()
    assert title.strip() == "held out"
    assert any("model" in line and "accuracy" in line for line in rest)
    assert any("seed" in line and "41.0 ± 0.9" in line for line in rest)
