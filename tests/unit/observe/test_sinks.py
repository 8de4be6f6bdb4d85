"""Sinks: each row once and in order whatever the run loses, a sink that fails or hangs told of once and ending nothing, and the
three programs for real, without a network: what they read back is what the run wrote.
"""

import json
import os
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from engine.core.errors import ConfigError, PreemptedError
from engine.core.jsonl import JsonlLedger, read_rows
from engine.observe.sinks import follow as following
from engine.observe.sinks.base import End, Followed, Sink
from engine.observe.sinks.follow import Follower, follow
from engine.observe.sinks.followers import Followers
from engine.observe.sinks.mlflow import MLflow
from engine.observe.sinks.redact import redacted
from engine.observe.sinks.registry import SINKS, check_sinks, label
from engine.observe.sinks.tensorboard import TensorBoard
from engine.observe.sinks.wandb import WeightsAndBiases
from engine.run.machine import descendants, families, runs

OPTIONS = {"run.steps": 4, "model.path": "models/llama"}
METRICS = {"loss": {"unit": "nats", "help": "what is minimised", "title": "loss"}}
EVALUATION = {"step": 2, "set": "sums", "measure": "accuracy", "mean": 0.5, "standard_error": None, "num_seeds": 4}
SAMPLE = {"step": 2, "set": "sums", "problem": "1+1", "answer": "2", "text": "so 2"}


class Told(Sink):
    """Keeps what it is told; fails where it is asked to."""

    def __init__(self):
        self.told, self.fails, self.known = [], 0, None

    def open(self, run):
        self.known = run.known
        return "run-1"

    def metrics(self, rows):
        if self.fails:
            self.fails -= 1
            raise ConnectionError("at 0x7f: https://me:hunter2@host is down")
        self.told += [("metrics", row["step"]) for row in rows]

    def evaluation(self, row):
        assert "records" not in row
        self.told.append(("evaluation", row["step"]))

    def samples(self, step, rows):
        self.told.append(("samples", step, len(rows)))

    def finding(self, row):
        self.told.append((row["kind"], row["step"]))

    def close(self, end):
        self.told.append(end.state)


@pytest.fixture
def ledgers(tmp_path):
    """A run of three steps with an evaluation after two of them."""
    made = {name: JsonlLedger(tmp_path / "run" / file) for name, file in following.STREAMS.items()}
    made["metrics"].append({"step": n, "loss": 1 / (1 + n), "bad": None, "unix_seconds": 1.8e9 + n} for n in range(3))
    made["evaluations"].append([EVALUATION | {"records": ["long"]}])
    made["samples"].append([SAMPLE, SAMPLE | {"problem": "1+2"}])
    made["guard"].append([{"step": 1, "what": "length", "text": "length collapsed"}])
    return made


def followed(tmp_path, known=None):
    return Followed(tmp_path / "run", "run", OPTIONS, METRICS, known)


def follower_of(sink, tmp_path):
    return Follower(sink, followed(tmp_path), tmp_path / "run" / "sinks" / "told.json")


def exhaust(follower):
    while follower.turn():
        pass


IN_ORDER = [
    *(("metrics", 0), ("metrics", 1), ("guard", 1)),
    *(("evaluation", 2), ("samples", 2, 2), ("metrics", 2)),
]


def test_rows_come_in_the_order_of_steps(ledgers, tmp_path):
    sink = Told()
    exhaust(follower_of(sink, tmp_path))
    assert sink.told == IN_ORDER


def test_no_row_comes_twice_whether_the_run_or_the_sink_starts_again(ledgers, tmp_path):
    first = Told()
    follower = follower_of(first, tmp_path)
    exhaust(follower)
    ledgers["metrics"].cut(ledgers["metrics"].find(1))
    ledgers["guard"].cut(0)
    ledgers["restarts"].append([{"step": 1, "lost_steps": 2, "restart": 1, "text": "engine 0 ended"}])
    exhaust(follower)
    ledgers["metrics"].append({"step": n, "loss": 1.0, "unix_seconds": 1.9e9 + n} for n in range(1, 5))
    ledgers["guard"].append([{"step": n, "what": "length", "text": "length collapsed"} for n in (1, 4)])
    exhaust(follower)
    assert first.told == [*IN_ORDER, ("restart", 1), ("metrics", 3), ("metrics", 4), ("guard", 4)]
    ledgers["metrics"].append([{"step": 5, "loss": 1.0}])
    second = Told()
    exhaust(follower_of(second, tmp_path))
    assert (second.known, second.told) == ("run-1", [("metrics", 5)]), "the same run of the program, where it stood"


def test_what_the_sink_refused_is_told_again_and_the_failure_once(ledgers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(following, "FIRST_PAUSE", 0.0)
    sink = Told()
    sink.fails = 3
    waits = iter([None, None, None, None, End("finished")])
    assert follow(follower_of(sink, tmp_path), sink, lambda seconds: next(waits), 10.0)
    assert sink.told == [*IN_ORDER, "finished"]
    told = {record.getMessage() for record in caplog.records}
    assert len(caplog.records) == 3 and len(told) == 1, "equal words, which are counted and not repeated"
    assert "hunter2" not in told.pop()


def test_a_sink_that_stays_unreachable_does_not_hold_the_end_up(ledgers, tmp_path, monkeypatch):
    monkeypatch.setattr(following, "FIRST_PAUSE", 0.05)
    sink = Told()
    sink.fails = 10**6
    began = time.monotonic()
    assert not follow(follower_of(sink, tmp_path), sink, lambda seconds: End("finished"), 0.2)
    assert time.monotonic() - began < 2.0


# -- the process of its own

OWN = """
import os, time
from engine.observe.sinks.base import Sink
class Own(Sink):
    def open(self, run):
        self.file = (run.directory / "own.txt").open("a")
        return "x"
    def metrics(self, rows):
        if os.environ.get("OWN_SINK") == "hangs":
            time.sleep(600)
        if os.environ.get("OWN_SINK") == "breaks":
            raise ValueError("broken with " + os.environ["OWN_API_KEY"])
        self.file.write("".join(f"{row['step']}\\n" for row in rows))
    def close(self, end):
        self.file.write(f"{end.state} {end.text}\\n")
        self.file.close()
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return f"{tmp_path / 'mine.py'}:Own"


def sinks(names, tmp_path, seconds=120.0):
    return Followers(names, tmp_path / "run", OPTIONS, METRICS, finish_seconds=seconds)


def test_a_sink_of_the_users_own_hears_the_run_and_its_end(ledgers, tmp_path, own):
    with sinks([own], tmp_path) as followers:
        assert followers.end(End("finished")) == []
    assert (tmp_path / "run" / "own.txt").read_text() == "0\n1\n2\nfinished \n"


@pytest.mark.parametrize(("raised", "state"), [(PreemptedError("asked to stop"), "stopped"), (ValueError("odd"), "failed")])
def test_how_a_run_ended_is_told(ledgers, tmp_path, own, raised, state):
    with pytest.raises(type(raised)), sinks([own], tmp_path):
        raise raised
    assert (tmp_path / "run" / "own.txt").read_text().endswith(f"{state} {raised}\n")


def test_a_broken_sink_is_told_of_once_without_its_secrets(ledgers, tmp_path, own, monkeypatch):
    monkeypatch.setenv("OWN_SINK", "breaks")
    monkeypatch.setenv("OWN_API_KEY", "very-secret")
    with sinks([own], tmp_path) as followers:
        told, deadline = list[dict[str, Any]](), time.monotonic() + 120
        while followers._processes and time.monotonic() < deadline:
            told += followers.fresh()
            time.sleep(0.1)
        assert followers._losses == {own: 4}, "started again three times"
        told += followers.end(End("finished"))
    (warning,) = told
    assert warning["where"] == "sink mine_Own" and "ended with code 1, and the run goes on" in warning["text"]
    written = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert [(row["text"], row["count"]) for row in written] == [(warning["text"], 1), (warning["text"], 4)]
    log = (tmp_path / "run" / "logs" / "sinks" / "sink_mine_Own.log").read_text()
    assert "ValueError: broken with ***" in log and "very-secret" not in log


def test_a_sink_that_dies_once_goes_on_where_it_stood(ledgers, tmp_path, own):
    with sinks([own], tmp_path) as followers:
        (process,) = followers._processes.values()
        process.kill()
        process.wait()
        assert "ended with code -9" in followers.fresh()[0]["text"]
        followers.end(End("finished"))
    assert (tmp_path / "run" / "own.txt").read_text() == "0\n1\n2\nfinished \n"


@pytest.mark.slow
def test_what_a_sink_starts_is_not_taken_for_a_process_of_the_run(ledgers, tmp_path):
    """As W&B's own process is, which lives in a session of its own."""
    file = tmp_path / "starts.py"
    file.write_text(
        "import subprocess, time\nfrom engine.observe.sinks.base import Sink\nclass Starts(Sink):\n"
        "    def open(self, run):\n"
        "        self.other = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "        (run.directory / 'pid').write_text(str(self.other.pid))\n        return 'x'\n"
        "    def metrics(self, rows):\n        pass\n"
        "    def close(self, end):\n        time.sleep(600)\n"
    )
    with sinks([f"{file}:Starts"], tmp_path, seconds=1.0) as followers:
        others = descendants()
        while not (tmp_path / "run" / "pid").exists() or not (tmp_path / "run" / "pid").read_text():
            time.sleep(0.05)
        started = psutil.Process(int((tmp_path / "run" / "pid").read_text()))
        assert started in descendants() - others and started in families(others)
        followers.end(End("stopped"))
    deadline = time.monotonic() + 20.0
    while runs(started) and time.monotonic() < deadline:  # killed, and gone as soon as the kernel has a moment for it
        time.sleep(0.05)
    assert not runs(started), "and it is ended with a sink that is"


@pytest.mark.slow
def test_a_hanging_sink_is_ended_at_the_deadline(ledgers, tmp_path, own, monkeypatch):
    monkeypatch.setenv("OWN_SINK", "hangs")
    monkeypatch.setattr("engine.observe.sinks.followers.GRACE_SECONDS", 0.5)
    began = time.monotonic()
    with sinks([own], tmp_path, seconds=1.0) as followers:
        (warning,) = followers.end(End("finished"))
    assert "had not sent all of the run after 1 s" in warning["text"]
    assert time.monotonic() - began < 15.0


def test_a_command_that_vanishes_leaves_no_sink_behind(ledgers, tmp_path, own):
    with sinks([own], tmp_path) as followers:
        (process,) = followers._processes.values()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20.0)
        followers._processes.clear()
    assert (tmp_path / "run" / "own.txt").read_text().endswith("lost the command ended without a word\n")


# -- names and what they need


def test_faults_of_names_are_found_before_a_run(tmp_path, own, monkeypatch):
    assert SINKS.names == ("mlflow", "tensorboard", "wandb")
    assert check_sinks(["tensorboard", own]) == [] and label(own) == "mine_Own"
    (twice,) = check_sinks(["tensorboard", "tensorboard"])
    assert "each sink once" in str(twice)
    (unknown,) = check_sinks(["tensorbord"])
    assert isinstance(unknown, ConfigError) and "must be one of mlflow, tensorboard, wandb" in str(unknown)
    for kind in (TensorBoard, WeightsAndBiases, MLflow):
        monkeypatch.setattr(kind, "packages", ("no-such-distribution",))
    for name in SINKS.names:
        (missing,) = check_sinks([name])
        assert f"run.sinks has '{name}'" in str(missing) and "pip install --no-deps -r requirements/tracking.txt" in str(
            missing
        )


def test_wandb_without_a_key_is_refused_unless_offline(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (fault,) = check_sinks(["wandb"])
    assert "there is no API key" in str(fault)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    (tmp_path / "netrc").chmod(0o600)
    assert check_sinks(["wandb"]) == []
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_sinks(["wandb"]) == []


def test_secrets_are_taken_out(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefgh")
    assert redacted("abcdefgh at https://user:pw@host/abc") == "*** at https://***@host/abc"


# -- the programs themselves


def told(sink, tmp_path, known=None):
    """Tells a sink the run of `ledgers` in this process; its id."""
    name = sink.open(followed(tmp_path, known))
    sink.metrics(list(read_rows(tmp_path / "run" / "metrics.jsonl")))
    sink.evaluation(EVALUATION)
    sink.samples(2, [SAMPLE])
    sink.finding({"kind": "guard", "step": 2, "text": "length collapsed"})
    sink.flush()
    return name


def test_tensorboard_reads_back_scalars_and_texts(ledgers, tmp_path):
    sink = TensorBoard()
    told(sink, tmp_path)
    sink.close(End("finished"))
    paths = (tmp_path / "run" / "tensorboard").iterdir()
    values = [(event, value) for path in paths for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    scalars = {
        (value.tag, event.step): value.tensor.float_val[0]
        for event, value in values
        if value.metadata.plugin_data.plugin_name == "scalars"
    }
    assert scalars["loss", 2] == pytest.approx(1 / 3) and scalars["evaluation/sums/accuracy", 2] == 0.5
    assert scalars["bad", 0] != scalars["bad", 0], "what is not finite is NaN there"
    texts = {value.tag: value.tensor.string_val[0].decode() for _, value in values if value.tensor.string_val}
    assert "models/llama" in texts["configuration"] and "so 2" in texts["samples"] and "collapsed" in texts["findings/guard"]


def logged(data):
    """The records of a W&B file: LevelDB's log format after a header of 7 bytes (a record is cut at blocks of 32 KiB; each part
    has a checksum of 4 bytes, a length of 2 and a kind: 1 whole, 2 first, 3 middle, 4 last)."""
    place, held = 7, b""
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_over_a_resume(ledgers, tmp_path, monkeypatch):
    """In processes of their own, as W&B works; its files are read back as they lie on disk."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed")

    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(PreemptedError), sinks(["wandb"], tmp_path):
        raise PreemptedError("asked to stop")
    ledgers["metrics"].append([{"step": 3, "loss": 0.25}])
    with sinks(["wandb"], tmp_path) as followers:
        assert followers.end(End("finished")) == []
    ids, steps = set(), []
    config: dict[str, Any] = {}
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in logged(path.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                if "loss" in row:
                    steps.append((record.history.step.num, row["loss"]))
    assert len(ids) == 1
    assert steps == [(n, pytest.approx(1 / (1 + n))) for n in range(4)], "each step once, over both"
    assert config["model.path"] == "models/llama"
    assert ids == {json.loads((tmp_path / "run" / "sinks" / "wandb.json").read_text())["known"]}


@pytest.mark.slow
def test_mlflow_in_a_folder_keeps_one_run_over_a_resume(ledgers, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    sink = MLflow()
    name = told(sink, tmp_path)
    sink.close(End("stopped", "asked to stop"))
    assert sink._client.get_run(name).info.status == "KILLED"
    ledgers["metrics"].append([{"step": 3, "loss": 0.25, "unix_seconds": 1.8e9}])
    again = MLflow()
    assert told(again, tmp_path, known=name) == name
    again.close(End("finished"))
    run = again._client.get_run(name)
    assert (run.info.status, run.data.params["model.path"]) == ("FINISHED", "models/llama")
    assert [metric.step for metric in again._client.get_metric_history(name, "loss")] == [0, 1, 2, 3], "no step twice"
    assert run.data.metrics["evaluation/sums/accuracy"] == 0.5
    assert run.data.tags["guard.step_000002"] == "length collapsed"
    assert [file.path for file in again._client.list_artifacts(name, "samples")] == ["samples/step_000002.json"]


def test_mlflow_that_nobody_answers_is_a_failure_to_be_tried_again(ledgers, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        sink = MLflow()
        with pytest.raises(Exception, match=r"(?i)refused|max retries") as raised:
            sink.open(followed(tmp_path))
    assert isinstance(raised.value, sink.failures)


def test_the_pins_of_sinks_are_those_of_gpu_machines_where_both_have_one():
    root = Path(__file__).resolve().parents[3] / "requirements"
    pins = {
        file: dict(
            line.strip().split("==") for line in (root / file).read_text().splitlines() if "==" in line and line[0] != "#"
        )
        for file in ("tracking.txt", "gpu.txt", "cpu_py312.txt")
    }
    assert {"wandb", "mlflow-skinny"} <= pins["tracking.txt"].keys()
    for name, version in pins["tracking.txt"].items():
        assert pins["gpu.txt"].get(name, version) == version, name
        assert pins["cpu_py312.txt"].get(name, version) == version, name
    assert os.access(root / "tracking.txt", os.R_OK)
