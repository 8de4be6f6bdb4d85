"""What a person sees of a run: a live display on a terminal, a short line every few seconds elsewhere, and a table of
results at the end. It keeps no figures and writes no files (writing.py does).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.core.metrics import Metric
from engine.observe.pace import Pace

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
CELL_WIDTH = 36  # of a metric's title and value on a terminal, with the space between cells
LINE_SECONDS = 5.0  # without a terminal: the shortest time between two lines, so that a long run's log can be read


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
    ) -> None:
        """`metrics`: the declarations by name, of which those in SHOWN are shown. `pace` estimates the time left. `log_every`:
        a line each so many steps instead of every few seconds. `quiet`: neither display nor lines, notes alone."""
        assert total_steps > 0, total_steps
        self._cells = [(metrics[name], form, short) for name, (form, short) in SHOWN.items()]
        self._total_steps = total_steps
        self._title = title
        self._console = console or Console()
        self._pace = pace or Pace(total_steps)
        self._log_every = log_every
        self._quiet = quiet
        self._record: Mapping[str, float] = {}
        self._entered_seconds = self._ended_seconds = time.monotonic()
        self._told_seconds = -math.inf
        self._fresh = True  # no step is finished since entering or since a restart
        self._live: Live | None = None

    def update(self, record: Mapping[str, float]) -> None:
        """Shows the record of a finished step; on a terminal, the newest value of each metric."""
        now = time.monotonic()
        judged = record.get("evaluation_seconds", 0.0)
        # the first step's wall time would count the start of processes: its own measure is taken
        seconds = record.get("step_seconds", math.nan) if self._fresh else now - self._ended_seconds - judged
        if math.isfinite(seconds):
            self._pace.finished(int(record["step"]), max(seconds, 0.0), judged)
        self._fresh, self._ended_seconds = False, now
        self._record = {**self._record, **record}
        if self._live is not None:
            self._live.refresh()
        elif not self._quiet and self._due(int(record["step"]) + 1, now):
            self._told_seconds = now
            self.note(self._line(record))

    def rewind(self, step: int) -> None:
        """The run goes on after `step` steps with processes started anew: the bar goes back, the pace counts from there."""
        self._record = {**self._record, "step": step - 1}
        self._fresh = True
        self._pace.restart()
        if self._live is not None:
            self._live.refresh()

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live display where there is one; without one, after the time of day."""
        stamp = "" if self._live is not None else f"{time.strftime('%Y-%m-%d %H:%M:%S')}  "
        self._console.print(stamp + text, soft_wrap=True, markup=False, highlight=False)

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
            f"{done}/{self._total_steps}  {timedelta(seconds=round(time.monotonic() - self._entered_seconds))}, "
            f"left {'-' if left is None else timedelta(seconds=round(left))}"
        )

    def _display(self) -> RenderableType:
        """As many cells a row as the terminal is wide; a metric that the run has not had yet takes no place."""
        done = int(self._record["step"]) + 1 if self._record else 0
        head = Table.grid(padding=(0, 2))
        position = self._position()
        bar = min(40, self._console.width - len(self._title) - len(position) - 5)
        cells = [Text(self._title), Text(position, no_wrap=True)]
        head.add_row(*cells if bar < 8 else (cells[0], ProgressBar(self._total_steps, done, width=bar), cells[1]))
        body = Table.grid(padding=(0, 1))
        per_row = max(1, self._console.width // CELL_WIDTH)
        shown = [(m.title, _shown(self._record, m, form)) for m, form, _ in self._cells if m.name in self._record]
        for _ in range(per_row):
            body.add_column(style="dim", no_wrap=True)
            body.add_column(justify="right", no_wrap=True)
            body.add_column(width=1)
        for first in range(0, len(shown), per_row):
            body.add_row(*(text for title, value in shown[first : first + per_row] for text in (title, value, "")))
        return Group(head, body)

    def __enter__(self) -> Progress:
        self._entered_seconds = self._ended_seconds = time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._quiet:
            self._live = Live(get_renderable=self._display, console=self._console, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live is not None:
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
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*map(Text, row))  # no markup: a cell may hold what a model said
    (console or Console()).print(table)
