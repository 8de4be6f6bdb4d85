"""What a person sees of a run: lines of a log, a display at the widths that terminals have, and a time left that is right."""

import io
import json
import random
import re
import threading
from itertools import pairwise
from unittest import mock

import pytest
from rich.console import Console

from engine.core.segment_writer import SegmentWriter
from engine.observe import progress as progress_module
from engine.observe.answers import greedy_answers, in_a_line, rollouts
from engine.observe.pace import Pace
from engine.observe.progress import LINE_SECONDS, QUIET_SECONDS, SHOWN, Progress, print_table
from engine.observe.telling import Activity, State
from engine.run.metrics import catalogue

METRICS = catalogue()
FIGURES = {name: 12345.678 for name in SHOWN}  # wide ones


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


class TestWithoutTerminal:
    def test_a_short_line_with_the_time_of_day_and_the_metrics_it_holds(self, clock):
        text = io.StringIO()
        with Progress(4, "train", METRICS, Console(file=text, width=40)) as progress:
            clock[0] += 30.0  # processes start
            for step in range(2):
                clock[0] += 10.0
                progress.update({"step": step, "loss": 0.125, "accuracy": 0.5, "step_seconds": 10.0, "wait_seconds": 1.0})
        first, second = text.getvalue().splitlines()
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  train 1/4  0:00:40, left 0:00:30  ", first)
        assert "train 2/4  0:00:50, left 0:00:20  accuracy 50.0%  loss 0.1250  step 10.00 s" in second
        assert "margin" not in first and " -" not in first and "waited" not in first
        assert len(first) < 120

    def test_a_line_every_few_seconds_and_the_last_step_in_any_case(self, clock):
        text = io.StringIO()
        with Progress(103, "train", METRICS, Console(file=text)) as progress:
            for step in range(103):
                clock[0] += 0.1 * LINE_SECONDS
                progress.update({"step": step})
        told = [int(n) for n in re.findall(r"train (\d+)/", text.getvalue())]
        assert told == [*range(1, 102, 10), 103]

    def test_a_line_every_so_many_steps_or_none_at_all(self, clock):
        for options, told in (({"log_every": 4}, ["4", "8", "9"]), ({"quiet": True}, [])):
            text = io.StringIO()
            with Progress(9, "train", METRICS, Console(file=text), **options) as progress:
                for step in range(9):
                    progress.update({"step": step})
                progress.note("a warning")
            assert re.findall(r"train (\d+)/9", text.getvalue()) == told
            assert "a warning\n" in text.getvalue()

    def test_a_dumb_terminal_gets_lines(self, clock, monkeypatch):
        monkeypatch.setenv("TERM", "dumb")
        text = io.StringIO()
        with Progress(2, "train", METRICS, Console(file=text, force_terminal=True)) as progress:
            progress.update({"step": 0})
            assert "train 1/2" in text.getvalue()

    def test_a_note_is_one_line_and_not_markup(self):
        text = io.StringIO()
        with Progress(1, "train", METRICS, Console(file=text, width=20)) as progress:
            progress.note("checkpoint of [bold] step 3 written to a long path")
        assert text.getvalue()[21:] == "checkpoint of [bold] step 3 written to a long path\n"


class TestUnderWay:
    """What takes long is told while it lasts, on a terminal and off it."""

    def told(self, what: str, state: State, seconds: float = 0.0, about: str = "", where: str = "trainer rank 0") -> Activity:
        return Activity(where, what, state, about, seconds)

    def lines(self, text: io.StringIO) -> list[str]:
        return [line[21:] for line in text.getvalue().splitlines()]

    def test_no_ten_seconds_pass_without_a_line_at_a_slow_start(self, clock, monkeypatch):
        monkeypatch.setattr(progress_module.threading, "Thread", mock.Mock())  # the test is the clock
        text = io.StringIO()
        with Progress(4, "train", METRICS, Console(file=text)) as progress:
            progress.activity(self.told("preflight", "begins"))
            clock[0] += 0.5
            progress.activity(self.told("preflight", "done", 0.5))
            progress.activity(self.told("ray", "begins"))
            progress.activity(self.told("engine", "begins", where="engine 0"))
            said = clock[0] = 200.0
            for _ in range(70):
                clock[0] += 0.5
                before = len(self.lines(text))
                progress.remind()
                said = clock[0] if len(self.lines(text)) > before else said
                assert clock[0] - said < QUIET_SECONDS
            progress.activity(self.told("ray", "done", 35.0))
        assert self.lines(text)[0] == "still starting Ray, 100 s; engine 0 is loading, 100 s"
        assert self.lines(text)[-1] == "Ray is up, 35 s"
        assert "checked" not in text.getvalue(), "what took a moment has no line"

    def test_the_thread_that_reminds_ends_with_the_display(self):
        before = threading.active_count()
        with Progress(4, "train", METRICS, Console(file=io.StringIO())):
            assert threading.active_count() == before + 1
        assert threading.active_count() == before

    def test_between_steps_only_what_took_long_has_a_line_and_at_the_end_more(self, clock):
        text = io.StringIO()
        with Progress(3, "train", METRICS, Console(file=text), log_every=100) as progress:
            progress.activity(self.told("weights", "done", 0.2))
            progress.update({"step": 0})
            progress.activity(self.told("checkpoint", "done", 4.0, "of 1 steps"))
            progress.activity(self.told("checkpoint", "done", 40.0, "of 1 steps"))
            progress.update({"step": 2})
            progress.activity(self.told("last sync", "done", 3.0))
            progress.activity(self.told("evaluation", "done", 30.0, "step 3 on sums"))
        kept = [line for line in self.lines(text) if not line.startswith("train ")]
        assert kept == [
            "the weights are read, 0.2 s",
            "a checkpoint of 1 steps is saved, 40 s",
            "the last weights are sent to the engines, 3.0 s",
        ]

    def test_a_quiet_run_tells_nothing_of_it(self, clock):
        text = io.StringIO()
        with Progress(3, "train", METRICS, Console(file=text), quiet=True) as progress:
            progress.activity(self.told("engine", "done", 50.0))
        assert text.getvalue() == ""

    def test_a_terminal_shows_what_is_under_way_with_the_seconds(self, clock):
        text = io.StringIO()
        console = Console(file=text, width=80, force_terminal=True, color_system=None)
        with Progress(4, "train", METRICS, console) as progress:
            for engine in range(5):
                progress.activity(self.told("engine", "begins", where=f"engine {engine}"))
            clock[0] += 12.0
            drawn = [
                "".join(part.text for part in line).rstrip() for line in console.render_lines(progress.display(), pad=False)
            ]
            assert drawn[1:] == ["engine 0 is loading, 12 s", "engine 1 is loading, 12 s", "and 3 more"]
            for engine in range(5):
                progress.activity(self.told("engine", "done", 12.0, where=f"engine {engine}"))
            assert len(console.render_lines(progress.display(), pad=False)) == 1
        assert text.getvalue().count("engine 4 is up, 12 s") == 1

    def test_a_restart_forgets_what_was_under_way(self, clock):
        text = io.StringIO()
        with Progress(4, "train", METRICS, Console(file=text)) as progress:
            progress.activity(self.told("checkpoint", "begins"))
            progress.rewind(0)
            clock[0] += 60.0
            progress.remind()
        assert text.getvalue() == ""


class TestAnswers:
    def test_a_long_answer_keeps_its_beginning_and_its_end(self):
        assert in_a_line("a\n b", 10) == "a b"
        said = in_a_line("x" * 50 + " The answer is 42.", 30)
        assert len(said) == 30 and said.startswith("xxxx") and " … " in said and said.endswith(" 42.")

    @pytest.mark.parametrize("width", [40, 80])
    def test_answers_are_a_line_each_on_a_terminal_and_in_a_file(self, width):
        pairs = [("How many [bold] metres are 7 km? " * 9, "First, " * 40 + "so 7000"), ("1+1", "2, right: 2")]
        for terminal in (True, False):
            text = io.StringIO()
            console = Console(file=text, width=width, force_terminal=terminal, color_system=None)
            Progress(4, "train", METRICS, console).answers(pairs)
            lines = text.getvalue().splitlines()
            assert len(lines) == 4 and max(map(len, lines)) <= (width if terminal else 120)
            assert lines[0].startswith("  ? How many [bold] metr") and lines[1].endswith("so 7000")
            assert lines[2:] == ["  ? 1+1", "  > 2, right: 2"]

    def test_they_are_of_the_evaluation_or_the_step_that_was_told(self, tmp_path):
        samples = [
            {"step": step, "set": name, "problem": f"{name} {step}", "answer": "2", "text": f"said {n}"}
            for step in (0, 4)
            for name in ("sums", "chats")
            for n in range(3)
        ]
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        found = [(f"sums {4}", f"said {n}, right: 2") for n in range(2)]
        assert greedy_answers(tmp_path, 4, "sums", 2) == found
        rows = [
            {"step": step, "prompt_id": prompt, "reward": 0.5, "status": status, "text": f"{step} {prompt} {n}"}
            for step in (1, 2, 3)
            for prompt, status in (("a", "ok"), ("b", "timeout"))
            for n in range(2)
        ]
        (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert rollouts(tmp_path, 2, 3) == [
            ("a, reward 0.5", "2 a 0"),
            ("b, not judged: timeout", "2 b 0"),
            ("a, reward 0.5", "2 a 1"),
        ]
        writer = SegmentWriter(tmp_path / "rollouts", {}, segment_bytes=1)
        for step in (1, 2, 3):  # full segments are packed
            kept = [{name: value for name, value in row.items() if name != "text"} for row in rows if row["step"] == step]
            writer.append(step, kept, {})
        writer.close()
        assert rollouts(tmp_path, 2, 1) == [("a, reward 0.5", "(what it says is not kept: no 'text' in records.rollouts)")]
        assert rollouts(tmp_path, 9, 3) == [] and greedy_answers(tmp_path / "none", 0, "sums", 1) == []


class TestTimeLeft:
    def test_a_resumed_run_counts_its_own_steps(self):
        pace = Pace(100)
        assert pace.seconds_left() is None
        pace.finished(97, 10.0)
        assert pace.seconds_left() == 20.0

    def test_a_restart_is_no_step(self, clock):
        text = io.StringIO()
        with Progress(10, "train", METRICS, Console(file=text)) as progress:
            clock[0] += 10.0
            progress.update({"step": 6, "step_seconds": 9.0})
            clock[0] += 500.0  # a process hangs
            progress.rewind(4)
            clock[0] += 60.0  # all start anew
            progress.update({"step": 4, "step_seconds": 3.0})
        assert "5/10  0:09:30, left 0:00:15" in text.getvalue()

    @pytest.mark.parametrize("interval", [1, 4, 10, 40])
    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_right_within_a_fifth_from_the_tenth_step_on(self, interval, seed):
        """A run of 200 steps whose first step of an interval waits for the interval's rollouts, with evaluations every 50 steps
        and noise of a tenth."""
        draw, total, due = random.Random(seed), 200, {0, 50, 100, 150, 200}
        steps = [(1.0 + (0.8 * interval if step % interval == 0 else 0.0)) * draw.uniform(0.9, 1.1) for step in range(total)]
        judged = [20.0 if step in due else 0.0 for step in range(total + 1)]
        steps[0] += 5.0  # compiles
        pace = Pace(total, interval, lambda done: sum(step >= done for step in due))
        for step in range(180):
            pace.finished(step, steps[step], judged[step])
            if step >= 9 and (step >= interval or interval == 1):
                true = sum(steps[step + 1 :]) + sum(judged[step + 1 :])
                told = pace.seconds_left()
                assert told is not None and abs(told - true) <= 0.2 * true, (step, told, true)

    def test_the_waits_that_are_left_are_counted(self):
        pace = Pace(100, 10)
        pace.finished(0, 21.0)
        assert pace.seconds_left() == pytest.approx(99 * 21.0), "nothing else is known yet"
        pace.finished(1, 1.0)
        assert pace.seconds_left() == pytest.approx(9 * 21.0 + 89 * 1.0)
        pace.finished(10, 11.0)
        assert pace.seconds_left() == pytest.approx(8 * 11.0 + 81 * 1.0), "the first step of all, which compiles, is left out"


class TestOnTerminal:
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
        assert "2/4" in final and "0.2500" in final and "12,346 tokens/s" in final
        assert "margin" not in final, "what the run does not have takes no place"

    @pytest.mark.parametrize(("width", "per_row"), [(40, 1), (60, 1), (80, 2), (120, 3), (200, 5)])
    def test_no_line_is_cut_or_wrapped_at_any_width(self, clock, width, per_row):
        """At most 24 lines, every title whole beside its value."""
        text = io.StringIO()
        console = Console(file=text, width=width, force_terminal=True, color_system=None)
        progress = Progress(5000, "train", METRICS, console)
        with progress:
            progress.update({"step": 4321, **FIGURES})
            drawn = console.render_lines(progress.display(), pad=False)
        lines = ["".join(segment.text for segment in line).rstrip() for line in drawn]
        assert len(lines) <= 1 + -(-len(SHOWN) // per_row) <= 24
        assert max(map(len, lines)) <= width
        assert "4322/5000" in lines[0] and "left" in lines[0]
        body = "\n".join(lines)
        for name in SHOWN:
            assert METRICS[name].title and METRICS[name].title in body
        assert "…" not in "\n".join(lines[1:] if width < 60 else lines), "below 60 columns the time left may be cut"

    def test_a_restart_is_seen_before_the_first_step_that_follows(self, clock):
        text = io.StringIO()
        with Progress(8, "train", METRICS, Console(file=text, width=120, force_terminal=True, color_system=None)) as progress:
            progress.update({"step": 5, "loss": 0.5})
            progress.rewind(0)
            progress.rewind(4)
        shown = text.getvalue()
        places = [shown.index(position) for position in ("6/8", "0/8", "4/8")]
        assert all(before < after for before, after in pairwise(places))
        assert "0.5000" in shown[shown.rindex("4/8") :], "the newest value of a metric stays"


def test_print_table_shows_heading_and_rows():
    text = io.StringIO()
    print_table("held out", [("model", "accuracy"), ("seed", "41.0 ± 0.9")], Console(file=text, width=60))
    title, *rest = text.getvalue().splitlines()
    assert title.strip() == "held out"
    assert any("model" in line and "accuracy" in line for line in rest)
    assert any("seed" in line and "41.0 ± 0.9" in line for line in rest)
