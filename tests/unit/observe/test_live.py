"""The report that is served: what is new reaches a browser, a look costs what was appended however old the run is, and only
this machine is answered.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from engine import cli
from engine.config.load import dump_config, load_config
from engine.core.jsonl import JsonlLedger
from engine.observe.live import LivePage, LiveRun, make_server
from engine.run.metrics import catalogue, groups

ROOT = Path(__file__).resolve().parents[3]
CONFIG = '[run]\ndirectory = "unused"\nsteps = 40\n[model]\npath = "seed"\n[data]\ntrain = "train.jsonl"\n'


def metrics_of(step):
    return {"step": step, "reward_mean": step / 10, "loss": 1.0, "unix_seconds": 1.8e9 + step, "generation_tokens": 5.0}


@pytest.fixture
def ledger(tmp_path):
    (tmp_path / "run.toml").write_text(CONFIG)
    folder = tmp_path / "live"
    folder.mkdir()
    (folder / "config.toml").write_text(dump_config(load_config(tmp_path / "run.toml")))
    return JsonlLedger(folder / "metrics.jsonl")


@pytest.fixture
def address(ledger, monkeypatch):
    monkeypatch.setattr("engine.observe.live.LOOK_SECONDS", 0.0)
    live = LivePage([LiveRun(ledger.path.parent, "live", {})], catalogue(), groups())
    with make_server(live, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def asked(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return answer.status, answer.headers, answer.read().decode()


def test_a_browser_gets_what_is_new_and_nothing_where_nothing_is(ledger, address):
    status, headers, text = asked(f"{address}/")
    assert status == 200 and "live: 0 steps" in text and "fetch(" in text
    assert (
        "script-src 'nonce-" in headers["Content-Security-Policy"]
        and "default-src 'none'" in headers["Content-Security-Policy"]
    )
    ledger.append([metrics_of(0), metrics_of(1)])
    status, headers, text = asked(f"{address}/content?since=1")
    assert status == 200 and "live: 2 steps" in text and "Reward" in text
    version = headers["X-Version"]
    assert asked(f"{address}/content?since={version}")[0] == 204
    evaluation = {"step": 2, "set": "sums", "measure": "accuracy", "mean": 0.5, "standard_error": 0.1}
    JsonlLedger(ledger.path.with_name("evaluations.jsonl")).append(
        [evaluation | {"length_normalized_reward": None, "completion_tokens_mean": 3.0}]
    )
    JsonlLedger(ledger.path.with_name("restarts.jsonl")).append([{"step": 1, "lost_steps": 1, "restart": 1, "text": "<lost>"}])
    text = asked(f"{address}/content?since={version}")[2]
    assert "50.0%" in text and "&lt;lost&gt;" in text


def test_only_this_machine_is_answered_and_nothing_else_is_there(address):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        asked(f"{address}/", Host="evil.example")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        asked(f"{address}/../config.toml")


def test_a_look_at_an_old_run_costs_what_was_appended(ledger):
    """Bytes are counted, not seconds: of a run of 20,000 steps and of one of 200."""
    costs = []
    for steps in (200, 20_000):
        ledger.append(metrics_of(step) for step in range(ledger_length(ledger), steps))
        run = LiveRun(ledger.path.parent, "live", {})
        assert run.look() and not run.look()
        before = run.bytes_read
        ledger.append([metrics_of(steps)])
        assert run.look()
        costs.append(run.bytes_read - before)
        assert len(run.records.metrics.rows()) <= 802
    assert costs[1] <= costs[0] + 20


def ledger_length(ledger):
    return len(ledger.path.read_text().splitlines())


def test_a_broken_record_is_told_and_the_page_goes_on(ledger, address):
    ledger.append([metrics_of(0)])
    whole = ledger.num_bytes
    with ledger.path.open("a") as file:
        file.write("broken\n")
    assert "metrics.jsonl, line 2: must be" in asked(f"{address}/content?since=0")[2]
    ledger.cut(whole)
    ledger.append([metrics_of(1)])
    assert "live: 2 steps" in asked(f"{address}/content?since=0")[2]


def test_what_does_not_go_with_serving_is_refused(ledger, tmp_path, capsys):
    folder = str(ledger.path.parent)
    assert cli.main(["report", folder, "--serve", "--output", str(tmp_path / "x.html")]) == 2
    assert "--output must be left out with --serve" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["report", folder, "--serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "must be free to listen at" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_cleanly(ledger):
    """As a command on a terminal is ended, while a browser has asked."""
    command = [sys.executable, "-m", "engine.cli", "report", str(ledger.path.parent), "--serve", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:") and "shows live; Ctrl-C ends it" in line
    assert asked(line.split()[0])[0] == 200
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_real_browser_renews_the_page_by_itself(ledger, address, monkeypatch):
    """The script, under its content security policy: a step that comes after the page was given is seen without a reload."""
    ledger.append([metrics_of(0)])
    given = LivePage.whole

    def whole(page):
        text = given(page)
        ledger.append([metrics_of(1)])
        return text

    monkeypatch.setattr(LivePage, "whole", whole)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000", "--dump-dom"]
    done = subprocess.run(["chromium", *flags, f"{address}/"], capture_output=True, text=True, timeout=240)
    assert "live: 2 steps" in done.stdout and "live: 1 steps" not in done.stdout, done.stdout[:2000] + done.stderr[-2000:]
