"""A trainer rank as far as it can be looked at without others: how many CPU threads it computes with, and what it tells
libraries before their first work."""

import os

import pytest
import torch

from engine.run.rank import DETERMINISTIC, TrainerRank
from tests.builders import config, spec


def test_a_rank_computes_with_as_many_threads_as_the_option_says():
    """Whatever the machine has and OMP_NUM_THREADS says; one where nothing is said."""
    before = torch.get_num_threads()
    try:
        for options, expected in (({}, 1), ({"threads": 3}, 3), ({}, 1)):
            TrainerRank(spec(config(trainer=options)), 0, "127.0.0.1")
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("asked", "on_gpu"), [(True, True), (True, False), (False, True)])
def test_gpu_libraries_are_told_to_repeat_themselves_where_that_is_asked_for(asked, on_gpu, monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Tree"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    told: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", told.append)
    TrainerRank(spec(config(trainer={"deterministic": asked})), 0, "127.0.0.1")
    expected = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_ALGO": "Tree"}
    assert os.environ == (expected | DETERMINISTIC if asked and on_gpu else expected)
    assert told == ([True] if asked and on_gpu else [])
