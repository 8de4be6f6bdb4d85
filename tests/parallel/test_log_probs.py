"""The vocab-parallel operators on real gloo ranks against one rank that holds the whole vocabulary."""

from __future__ import annotations

import pytest

from tests.parallel.pool import WorkerPool


@pytest.mark.parametrize(("ranks", "num_valid"), [(2, 67), (4, 67), (4, 5)], ids=["tp2", "tp4", "tp4_rank_of_padding"])
def test_vocabulary_over_ranks_equals_one_rank(ranks: int, num_valid: int, pool: WorkerPool) -> None:
    """Values, entropies and gradients within 4e-6 (logits of size 10), one collective of 16 bytes a row.

    A vocabulary of 5 on 4 ranks leaves the last rank with nothing but padding.
    """
    for rank in pool.run("log_probs", ranks, trainer={"tensor_parallel": ranks}, num_valid=num_valid):
        assert rank["bytes_a_row"] == [16]
        assert rank["token"] <= 4e-6
        assert rank["squares"] <= 4e-5
        assert rank["single_pass"] <= 4e-5  # sums over the vocabulary in another order
        assert rank["recomputed"] <= 4e-5
