"""What a person sees of a run: a live display on a terminal, a short line every few seconds elsewhere, and a table of
results at the end. While something is under way that takes long (the start, an evaluation, a checkpoint, the end), both say
what. It keeps no figures and writes no files (writing.py does).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.core.metrics import Metric
from engine.observe.answers import in_a_line
from engine.observe.pace import Pace
from engine.observe.telling import Activity

# what is shown, in this order, where a run has it: the format of its number, and whether a line without a terminal has it too
SHOWN: dict[str, tuple[str, bool]] = {
    "reward_mean": ("{:.3f}", True),
    "accuracy": ("{:.1%}", True),
    "skipped_prompts": ("{:.0f}", True),
    "truncated": ("{:.1%}", False),
    "reward_failures": ("{:.0f}", False),
    "reward_timeouts": ("{:.0f}", False),
    "loss": ("{:.4f}", True),
    "margin_mean": ("{:.3f}", False),
    "grad_norm": ("{:.3g}", True),
    "learning_rate": ("{:.2g}", False),
    "rollout_entropy": ("{:.3f}", False),
    "completion_tokens_mean": ("{:.1f}", True),
    "staleness": ("{:.0f}", False),
    "log_prob_gap_mean": ("{:.1e}", False),
    "generation_tokens_per_second": ("{:,.0f}", False),
    "training_tokens_per_second": ("{:,.0f}", False),
    "sync_seconds": ("{:.2f}", False),
    "sync_mebibytes": ("{:.1f}", False),
    "step_seconds": ("{:.2f}", True),
    "wait_seconds": ("{:.2f}", False),
}
UNITS = ("s", "MiB", "tokens", "tokens/s")  # that are shown beside a number
LINE_WIDTH = 120  # of an answer without a terminal
CELL_WIDTH = 36  # of a metric's title and value on a terminal, with the space between cells
LINE_SECONDS = 5.0  # without a terminal: the shortest time between two lines, so that a long run's log can be read
QUIET_SECONDS = 10.0  # without a terminal: the longest time without a line while something is under way
SHORT_SECONDS = 1.0  # what is done sooner than this gets no line of its own
MILESTONES = ("weights", "engine")  # but these, which people wait for
UNTOLD = ("imports", "evaluation", "engines")  # done before there is a display; told by its result; by each engine
SHOWN_ACTIVITIES = 3  # on a terminal: how many that are under way are shown, the newest last


class Progress:
    """Shows a run while it is entered: on a terminal a display drawn over, elsewhere a line with the time of day every few
    seconds, and the last step's in any case."""

    def __init__(
        self,
        total_steps: int,
        title: str,
        metrics: Mapping[str, Metric],
        console: Console | None = None,
        *,
        pace: Pace | None = None,
        log_every: int | None = None,
        quiet: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`metrics`: the declarations by name, of which those in SHOWN are shown. `pace` estimates the time left. `log_every`:
        a line each so many steps instead of every few seconds. `quiet`: neither display nor lines, notes alone. `clock`:
        seconds, where it is not time.monotonic's."""
        assert total_steps > 0, total_steps
        self._cells = [(metrics[name], form, short) for name, (form, short) in SHOWN.items()]
        self._total_steps = total_steps
        self._title = title
        self._console = console or Console()
        self._pace = pace or Pace(total_steps)
        self._log_every = log_every
        self._quiet = quiet
        self._clock = clock or time.monotonic
        self._drawn = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet  # a display, no lines
        self._record: Mapping[str, float] = {}
        self._entered_seconds = self._ended_seconds = self._clock()
        self._told_seconds = -math.inf
        self._fresh = True  # no step is finished since entering or since a restart
        self._live: Live | None = None
        self._under_way: dict[tuple[str, str, str], tuple[Activity, float]] = {}  # and when it began, by this clock
        self._spoke_seconds = self._entered_seconds
        self._ticking: threading.Thread | None = None
        self._over = threading.Event()

    def update(self, record: Mapping[str, float]) -> None:
        """Shows the record of a finished step; on a terminal, the newest value of each metric."""
        now = self._clock()
        judged = record.get("evaluation_seconds", 0.0)
        # the first step's wall time would count the start of processes: its own measure is taken
        seconds = record.get("step_seconds", math.nan) if self._fresh else now - self._ended_seconds - judged
        if math.isfinite(seconds):
            self._pace.finished(int(record["step"]), max(seconds, 0.0), judged)
        self._fresh, self._ended_seconds = False, now
        self._record = {**self._record, **record}
        if self._live is not None:
            self._live.refresh()
        elif not self._drawn and not self._quiet and self._due(int(record["step"]) + 1, now):
            self._told_seconds = now
            self.note(self._line(record))

    def rewind(self, step: int) -> None:
        """The run goes on after `step` steps with processes started anew: the bar goes back, the pace counts from there."""
        self._record = {**self._record, "step": step - 1}
        self._fresh = True
        self._under_way = {}
        self._pace.restart()
        if self._live is not None:
            self._live.refresh()

    def activity(self, told: Activity) -> None:
        """Shows what begins, goes on or is done. What is done gets a line of its own at the start and at the end, and between
        two steps where it took long; but not an evaluation, whose result is told."""
        key = (told.where, told.what, told.about)
        if told.state == "done":
            self._under_way.pop(key, None)
            last = self._record.get("step", -1) + 1 >= self._total_steps
            worth = told.seconds >= (SHORT_SECONDS if self._fresh or last else LINE_SECONDS) or told.what in MILESTONES
            if worth and told.what not in UNTOLD and not self._quiet:
                self.note(str(told))
        else:
            self._under_way = {**self._under_way, key: (told, self._clock() - told.seconds)}  # the thread may be reading
        if self._live is not None:
            self._live.refresh()

    def _now(self) -> list[str]:
        """What is under way, in the order in which it began, with the seconds so far."""
        now = self._clock()
        return [str(replace(told, seconds=now - began)) for told, began in self._under_way.values()]

    def _tick(self) -> None:
        """Without a terminal: says what is under way where nothing was said for long."""
        while not self._over.wait(0.5):
            self.remind()

    def remind(self) -> None:
        """Says what is under way, if there is anything, and nothing was said for as long as `QUIET_SECONDS`."""
        if self._under_way and self._clock() - self._spoke_seconds >= QUIET_SECONDS:
            self.note(f"still {'; '.join(self._now()[-SHOWN_ACTIVITIES:])}")

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live display where there is one; without one, after the time of day."""
        self._spoke_seconds = self._clock()
        stamp = "" if self._drawn else f"{time.strftime('%Y-%m-%d %H:%M:%S')}  "
        # A terminal's line breaks between words; elsewhere a line stays one, whatever reads it.
        self._console.print(stamp + text, soft_wrap=not self._console.is_terminal, markup=False, highlight=False)

    def answers(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Prints what was asked and what was said, a line each, cut to the terminal's width."""
        width = self._console.width if self._console.is_terminal else LINE_WIDTH
        for asked, said in pairs:
            for mark, text in (("?", asked), (">", said)):
                line = Text(f"  {mark} {in_a_line(text, width - 4)}", no_wrap=True, overflow="ellipsis")
                self._console.print(line, style="dim" if mark == "?" else "", soft_wrap=not self._console.is_terminal)

    def _due(self, done: int, now: float) -> bool:
        if done >= self._total_steps:
            return True
        if self._log_every is not None:
            return done % self._log_every == 0
        return now - self._told_seconds >= LINE_SECONDS

    def _line(self, record: Mapping[str, float]) -> str:
        shown = ((metric, form) for metric, form, short in self._cells if short and metric.name in record)
        figures = "  ".join(f"{metric.title} {_shown(record, metric, form)}" for metric, form in shown)
        return f"{self._title} {self._position()}  {figures}"

    def _position(self) -> str:
        """Steps done of all, the time since entering and the time left."""
        done = int(self._record["step"]) + 1 if self._record else 0
        left = self._pace.seconds_left()
        return (
            f"{done}/{self._total_steps}  {timedelta(seconds=round(self._clock() - self._entered_seconds))}, "
            f"left {'-' if left is None else timedelta(seconds=round(left))}"
        )

    def display(self) -> RenderableType:
        """What is drawn over: the head, what is under way, and the newest figures, as many cells a row as the terminal is wide;
        a metric that the run has not had yet takes no place."""
        done = int(self._record["step"]) + 1 if self._record else 0
        head = Table.grid(padding=(0, 2))
        position = self._position()
        bar = min(40, self._console.width - len(self._title) - len(position) - 5)
        cells = [Text(self._title), Text(position, no_wrap=True)]
        head.add_row(
            *cells
            if bar < 8
            else (
                cells[0],
                ProgressBar(self._total_steps, done, width=bar, complete_style="cyan", finished_style="green"),
                cells[1],
            )
        )
        body = Table.grid(padding=(0, 1))
        per_row = max(1, self._console.width // CELL_WIDTH)
        shown = [(m.title, _shown(self._record, m, form)) for m, form, _ in self._cells if m.name in self._record]
        for _ in range(per_row):
            body.add_column(style="dim", no_wrap=True)
            body.add_column(justify="right", no_wrap=True)
            body.add_column(width=1)
        for first in range(0, len(shown), per_row):
            body.add_row(*(text for title, value in shown[first : first + per_row] for text in (title, value, "")))
        rows = self._now()
        if len(rows) > SHOWN_ACTIVITIES:
            rows = [*rows[: SHOWN_ACTIVITIES - 1], f"and {len(rows) - SHOWN_ACTIVITIES + 1} more"]
        under_way = [Text(row, no_wrap=True, overflow="ellipsis", style="dim") for row in rows]
        return Group(head, *under_way, *((body,) if shown else ()))

    def __enter__(self) -> Progress:
        self._entered_seconds = self._ended_seconds = self._spoke_seconds = self._clock()
        if self._drawn:
            self._live = Live(get_renderable=self.display, console=self._console, refresh_per_second=1)
            self._live.start()
        elif not self._quiet:
            self._over.clear()
            self._ticking = threading.Thread(target=self._tick, daemon=True)
            self._ticking.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        if self._ticking is not None:
            self._ticking.join()
            self._ticking = None
        if self._live is not None:
            self._under_way = {}
            self._live.transient = (
                self._record.get("step", -1) < 0
            )  # before the first step it says nothing that is worth keeping
            self._live.stop()
            self._live = None


def _shown(record: Mapping[str, float], metric: Metric, form: str) -> str:
    value = record.get(metric.name, math.nan)
    unit = f" {metric.unit}" if metric.unit in UNITS else ""
    return form.format(value) + unit if math.isfinite(value) else "-"


def print_table(title: str, rows: Iterable[Sequence[str]], console: Console | None = None) -> None:
    """Prints a table: the first of `rows` is its heading, the first column names, the others are right-aligned."""
    heading, *body = rows
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(heading):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")  # nothing is cut where it is narrow
    for row in body:
        table.add_row(*map(Text, row))  # no markup: a cell may hold what a model said
    (console or Console()).print(table)
