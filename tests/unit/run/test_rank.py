"""A trainer rank as far as it can be looked at without others: how many CPU threads it computes with."""

import torch

from engine.run.rank import TrainerRank
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
