"""Figures on disk: what a resumed run keeps, and what a reader of the files gets."""

import json
import math

import pytest

from engine.observe.writing import MetricsWriter, write_json


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestMetricsWriter:
    def test_one_object_a_step(self, tmp_path):
        with MetricsWriter(tmp_path) as writer:
            writer.write({"step": 0, "loss": 0.5, "sync_seconds": 0.25})
            writer.write({"step": 1, "loss": math.inf})
        assert lines_of(tmp_path / "metrics.jsonl") == [
            {"step": 0, "loss": 0.5, "sync_seconds": 0.25},
            {"step": 1, "loss": None},
        ]

    def test_resuming_drops_the_steps_after_the_checkpoint(self, tmp_path):
        with MetricsWriter(tmp_path) as writer:
            for step in range(5):
                writer.write({"step": step, "loss": float(step)})
        with MetricsWriter(tmp_path) as resumed:
            resumed.ledger.cut(resumed.ledger.find(3))
            resumed.write({"step": 3, "loss": 30.0})
        assert [row["loss"] for row in lines_of(tmp_path / "metrics.jsonl")] == [0.0, 1.0, 2.0, 30.0]


def test_write_json_replaces_whole_documents(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"seed_accuracy": 0.4})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"seed_accuracy": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"seed_accuracy": 0.4}
