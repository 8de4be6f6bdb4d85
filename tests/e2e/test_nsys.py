"""Ray starts the chosen processes under nsys, a stand-in here, and a run's end waits for the reports. What the real nsys makes
of it needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.load import RunConfig, dump_config
from tests.unit.observe import fake_nsys

pytestmark = pytest.mark.timeout(600)


def test_only_the_chosen_ranks_run_under_nsys_and_their_reports_are_waited_for(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    profile = ["profile.tool=nsys", "profile.ranks=[1]", "profile.first_step=0"]
    config = run_config("trainer.tensor_parallel=2", *profile, directory="a run")
    file = tmp_path / "run.toml"
    file.write_text(dump_config(config))
    path = f"{fake_nsys.install(tmp_path / 'bin')}:{os.environ['PATH']}"
    probe = [sys.executable, str(Path(__file__).with_name("nsys_probe.py")), str(file)]
    environment = os.environ | {"PATH": path, fake_nsys.LINGERS: "1.5"}
    run = subprocess.run(probe, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    folder = config.run_directory / "profile"
    assert [report.name for report in folder.iterdir()] == ["rank-1.nsys-rep"]
    said = json.loads((folder / "rank-1.nsys-rep").read_text())
    assert f"--output={folder / 'rank-1.nsys-rep'}" in said
    assert any("default_worker" in argument for argument in said), "the program is Ray's worker"
    events = json.loads(run.stdout.split("RESULT ")[1])
    assert [event["rank"] for event in events if "rank" in event] == [0, 1]
