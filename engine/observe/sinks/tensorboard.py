"""TensorBoard: scalars, and the configuration, answers and findings as texts, in event files below the run's directory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from engine.observe.sinks.base import End, Followed, Sink, figures

FOLDER = "tensorboard"  # in the run's directory


class TensorBoard(Sink):
    """Writes event files. A metric that is not finite is NaN there."""

    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def open(self, run: Followed) -> str:
        """Makes a new event file; TensorBoard reads all of a folder as one run."""
        self._files = EventFileWriter(str(run.directory / FOLDER), flush_secs=10)
        if run.known is None:
            rows = "".join(f"| `{name}` | `{value}` |\n" for name, value in run.options.items())
            self._text(0, "configuration", f"| option | value |\n|---|---|\n{rows}")
        return FOLDER

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A scalar each, named as in metrics.jsonl."""
        for row in rows:
            known = {name: math.nan if value is None else value for name, value in row.items() if name != "step"}
            self._scalars(row["step"], known, row.get("unix_seconds"))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Scalars evaluation/SET/..."""
        self._scalars(row["step"], figures(row))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """One text an evaluation."""
        told = (f"**{row['set']}**: {row['problem']}\n\n```\n{row['text']}\n```\n" for row in rows)
        self._text(step, "samples", "\n".join(told))

    def finding(self, row: Mapping[str, Any]) -> None:
        """A text."""
        self._text(row["step"], f"findings/{row['kind']}", row["text"])

    def flush(self) -> None:
        """Hands everything to the file system."""
        self._files.flush()

    def close(self, end: End) -> None:
        """Closes the file."""
        self._files.close()

    def _scalars(self, step: int, known: Mapping[str, float], unix_seconds: float | None = None) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in known.items()]
        self._files.add_event(Event(wall_time=unix_seconds or time.time(), step=step, summary=Summary(value=values)))

    def _text(self, step: int, tag: str, text: str) -> None:
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(tag=tag, metadata=kind, tensor=tensor)
        self._files.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
