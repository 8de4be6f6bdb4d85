"""Sinks: what a resumed run keeps, and what a reader of the files gets."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from engine.observe.sinks import MetricsWriter, write_json
from engine.run.metrics import catalogue

METRICS = catalogue()


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
