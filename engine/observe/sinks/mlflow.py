"""MLflow: one MLflow run for each run of ours, gone on with under the same id. Where to is what MLflow's own environment
variables say (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and those of its login); without an address, a folder below the run's
directory. It registers no model and uploads no weights.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from engine.observe.sinks.base import End, Followed, Sink, figures

EXPERIMENT = "semion"  # where MLFLOW_EXPERIMENT_NAME is not set
FOLDER = "mlflow"  # in the run's directory, where MLFLOW_TRACKING_URI is not set
MOST_PARAMS, MOST_METRICS, PARAM_LENGTH = 100, 1000, 6000  # of one request, as MLflow has it
EVERY_STEP = "unix_seconds"  # a metric that every row has
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "lost": "KILLED"}
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


class MLflow(Sink):
    """Logs metrics with our steps, the configuration as parameters, answers as JSON artifacts, findings as tags."""

    packages: ClassVar[tuple[str, ...]] = ("mlflow-skinny", "mlflow")

    def open(self, run: Followed) -> str:
        """Makes an MLflow run or sets it running again; raises MlflowException, one of `failures`, where it cannot."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self.failures = (OSError, MlflowException)
        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI") or (run.directory / FOLDER).absolute().as_uri()
        self._client = MlflowClient(tracking_uri=address)
        self._last = -1  # step that is there already; a killed follower may have told of steps without noting it
        if run.known is not None:
            self._id = run.known
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, EVERY_STEP)
            self._last = max((metric.step for metric in history), default=-1)
            return self._id
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        self._id = self._client.create_run(place, run_name=run.name).info.run_id
        params = [Param(_name(name), str(value)[:PARAM_LENGTH]) for name, value in run.options.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MOST_PARAMS])
        self._client.log_dict(self._id, dict(run.metrics), "metrics.json")
        return self._id

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every finite value, under the names of metrics.jsonl."""
        values = [
            self._metric(_name(name), value, _milliseconds(row.get("unix_seconds")), row["step"])
            for row in rows
            if row["step"] > self._last
            for name, value in row.items()
            if name != "step" and value is not None
        ]
        for first in range(0, len(values), MOST_METRICS):
            self._client.log_batch(self._id, metrics=values[first : first + MOST_METRICS])

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Metrics evaluation/SET/..."""
        values = [self._metric(_name(name), value, _milliseconds(), row["step"]) for name, value in figures(row).items()]
        self._client.log_batch(self._id, metrics=values)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """An artifact of the answers."""
        self._client.log_dict(self._id, {"step": step, "answers": [dict(row) for row in rows]}, f"samples/step_{step:06}.json")

    def finding(self, row: Mapping[str, Any]) -> None:
        """A tag each."""
        self._client.set_tag(self._id, f"{row['kind']}.step_{row['step']:06}", str(row["text"])[:PARAM_LENGTH])

    def close(self, end: End) -> None:
        """FINISHED, FAILED or, where it can go on, KILLED."""
        if end.text:
            self._client.set_tag(self._id, "ended_by", end.text[:PARAM_LENGTH])
        self._client.set_terminated(self._id, STATUS[end.state])


def _name(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _milliseconds(unix_seconds: float | None = None) -> int:
    return int(1000 * (unix_seconds or time.time()))
