"""The scripts of tools/ in bash, as shellcheck reads them; what the job script does is tested in tests/e2e/test_slurm.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(
    path for path in (ROOT / "tools").rglob("*") if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(script):
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["shellcheck", str(script)], env=os.environ | {"PATH": search}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_the_job_script_is_among_them_and_keeps_the_token_off_command_lines():
    (script,) = [path for path in SCRIPTS if path.name == "train.sbatch"]
    lines = script.read_text().splitlines()
    assert [line for line in lines if "RAY_AUTH_TOKEN" in line and not line.startswith("#")] == [
        "RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')",
        "export RAY_AUTH_TOKEN RAY_AUTH_MODE=token",
    ]
