"""What an engine's process is given before vLLM is imported in it."""

from __future__ import annotations

import os
import tempfile

import pytest

from engine.inference.process import ENGINES_FOLDER, ENVIRONMENT, LONGEST_FOLDER, prepare_process
from tests import builders


@pytest.fixture
def environment(monkeypatch):
    for name in (*ENVIRONMENT, "OMP_NUM_THREADS", "TMPDIR", ENGINES_FOLDER):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_engines_have_a_folder_for_temporary_files_that_the_command_removes(environment, tmp_path):
    folder = tempfile.mkdtemp(prefix="s", dir="/tmp") + "/f"
    os.environ[ENGINES_FOLDER] = folder
    prepare_process(builders.config(tmp_path))
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == folder and os.path.isdir(folder)
    os.removedirs(folder)


def test_where_its_name_is_too_long_for_sockets_the_machines_own_is_taken(environment, tmp_path):
    own = tempfile.gettempdir()
    os.environ[ENGINES_FOLDER] = str(tmp_path / ("x" * LONGEST_FOLDER))
    prepare_process(builders.config(tmp_path))
    assert tempfile.gettempdir() == own and not list(tmp_path.iterdir())
