"""What an engine's process is given before vLLM is imported in it."""

from __future__ import annotations

import os
import tempfile

import pytest

from engine.inference.nvcc import SWITCHED_OFF
from engine.inference.process import ENGINES_FOLDER, ENVIRONMENT, LONGEST_FOLDER, prepare_process
from tests import builders


@pytest.fixture
def environment(monkeypatch):
    for name in (*ENVIRONMENT, "OMP_NUM_THREADS", "TMPDIR", ENGINES_FOLDER):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored
    for name in SWITCHED_OFF:
        monkeypatch.setenv(name, "")  # restored
        del os.environ[name]
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


def test_what_vllm_would_compile_is_off_unless_the_environment_says_otherwise(environment, tmp_path):
    os.environ["VLLM_USE_DEEP_GEMM"] = "1"
    prepare_process(builders.config(tmp_path))
    assert os.environ["VLLM_USE_DEEP_GEMM"] == "1" and os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def test_the_installed_vllm_has_what_is_switched_off():
    import vllm.envs

    assert all(name in vllm.envs.environment_variables for name in SWITCHED_OFF)
