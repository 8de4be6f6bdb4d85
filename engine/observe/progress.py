"""What a person sees of a run: a live display on a terminal, one line a step elsewhere, and a table of results at the
end. It keeps no figures and writes no files (sinks.py does).
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

# what is shown and its number's format; a metric's title and value make one cell of the display
SHOWN: dict[str, str] = {
    "reward_mean": "{:.3f}",
    "accuracy": "{:.1%}",
    "skipped_prompts": "{:.0f}",
    "reward_timeouts": "{:.0f}",
    "loss": "{:.4f}",
    "margin_mean": "{:.3f}",
    "grad_norm": "{:.3g}",
    "learning_rate": "{:.2g}",
    "rollout_entropy": "{:.3f}",
    "completion_tokens_mean": "{:.1f}",
    "staleness": "{:.0f}",
    "log_prob_gap_mean": "{:.1e}",
    "generation_tokens_per_second": "{:,.0f}",
    "training_tokens_per_second": "{:,.0f}",
    "sync_seconds": "{:.2f}",
    "sync_mebibytes": "{:.1f}",
    "step_seconds": "{:.2f}",
    "wait_seconds": "{:.2f}",
}
UNITS = ("s", "MiB", "tokens", "tokens/s")  # that are shown beside a number
CELLS_PER_ROW = 4


class Progress:
    """Shows a run of `total_steps` while it is entered. Without a terminal: one line an update, one a note.

    The time left counts the steps done since entering or since a restart, so that a resumed run is not taken for a fast one.
    """

    def __init__(self, total_steps: int, title: str, metrics: Mapping[str, Metric], console: Console | None = None) -> None:
        """`metrics`: the declarations by name, of which those in SHOWN are shown."""
        assert total_steps > 0, total_steps
        self._cells = [(metrics[name], form) for name, form in SHOWN.items()]
        self._total_steps = total_steps
        self._title = title
        self._console = console or Console()
        self._record: Mapping[str, float] = {}
        self._entered_seconds = time.monotonic()
        self._first_step: int | None = None
        self._live: Live | None = None

    def update(self, record: Mapping[str, float]) -> None:
        """Shows the record of a finished step; on a terminal, the newest value of each metric."""
        self._record = {**self._record, **record}
        if self._first_step is None:
            self._first_step = int(record["step"])
        if self._live is not None:
            self._live.update(self._display(), refresh=True)
        else:
            shown = ((metric, form) for metric, form in self._cells if metric.name in record)
            figures = "  ".join(f"{metric.title} {_shown(record, metric, form)}" for metric, form in shown)
            self.note(f"{self._title}  {self._position()}  {figures}")

    def rewind(self, step: int) -> None:
        """The run goes on after `step` steps with processes started anew: the bar goes back, the time left counts from now."""
        self._record = {**self._record, "step": step - 1}
        self._entered_seconds, self._first_step = time.monotonic(), None
        if self._live is not None:
            self._live.update(self._display(), refresh=True)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live display where there is one."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _position(self) -> str:
        """Steps done of all, and the time left at the mean pace since entering."""
        done = int(self._record["step"]) + 1 if self._record else 0
        if self._first_step is None:
            return f"{done}/{self._total_steps}  left -"
        pace_seconds = (time.monotonic() - self._entered_seconds) / (done - self._first_step)
        left = timedelta(seconds=round(pace_seconds * (self._total_steps - done)))
        return f"{done}/{self._total_steps}  left {left}"

    def _display(self) -> RenderableType:
        done = int(self._record["step"]) + 1 if self._record else 0
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(self._title), ProgressBar(self._total_steps, done, width=40), self._position())
        body = Table.grid(padding=(0, 2))
        cells = [(metric.title, _shown(self._record, metric, form)) for metric, form in self._cells]
        for _ in range(CELLS_PER_ROW):
            body.add_column(style="dim")
            body.add_column(justify="right")
        for first in range(0, len(cells), CELLS_PER_ROW):
            body.add_row(*(text for cell in cells[first : first + CELLS_PER_ROW] for text in cell))
        return Group(head, body)

    def __enter__(self) -> Progress:
        self._entered_seconds = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(self._display(), console=self._console, refresh_per_second=1)
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
