"""Shards filled from a checkpoint: only what a shard holds is read, padding is 0, and numbers that are none are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.core.errors import CheckpointError
from engine.megatron.build import read_slices
from engine.models.base import ModelShape
from engine.models.hf import HfCheckpoint
from engine.models.sharding import TrainerLayout, matrix_slice, shard_shapes, shard_slices, tensors
from engine.observe.telling import Doing

ODD = ModelShape(4, 8, 4, 2, 2, 12, 99, 1e4, None, 1e-5, False, 16)  # a vocabulary that two ranks do not share evenly
AXES = TrainerLayout(tp_size=2, pp_size=2)


class Counted(HfCheckpoint):
    """A checkpoint that counts the elements it reads."""

    num_read = 0

    def part(self, *arguments: Any) -> torch.Tensor:
        found = super().part(*arguments)
        self.num_read += found.numel()
        return found


def saved(folder: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(size, generator=draw) for name, size in tensors(ODD).items()}
    save_file(whole | changes, folder / "model.safetensors")
    return whole


def read(folder: Path, tp_rank: int, pp_rank: int) -> tuple[dict[str, torch.Tensor], int]:
    places = {name: torch.full(size, 7.0) for name, size in shard_shapes(ODD, AXES, tp_rank, pp_rank).items()}
    checkpoint = Counted(folder)
    read_slices(places, shard_slices(ODD, AXES, tp_rank, pp_rank), tensors(ODD), checkpoint, Doing("weights"))
    return places, checkpoint.num_read


def test_each_rank_reads_its_own_part_of_the_files(tmp_path):
    whole = saved(tmp_path)
    for pp_rank in range(2):
        for tp_rank in range(2):
            places, num_read = read(tmp_path, tp_rank, pp_rank)
            covered = {name: torch.zeros_like(place) for name, place in places.items()}
            for one in shard_slices(ODD, AXES, tp_rank, pp_rank):
                into = one.parameter, one.shard_row, one.shard_col
                held = matrix_slice(places[into[0]], into[1], into[2], one.rows, one.cols)
                assert torch.equal(held, matrix_slice(whole[one.name], one.row, one.col, one.rows, one.cols))
                matrix_slice(covered[into[0]], into[1], into[2], one.rows, one.cols).fill_(1)
            assert all(bool((places[name][mask == 0] == 0).all()) for name, mask in covered.items())
            assert num_read == sum(int(mask.sum()) for mask in covered.values())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_told_when_it_is_read(tmp_path, number):
    saved(tmp_path, **{"model.norm.weight": torch.tensor([1.0] * 7 + [number])})
    read(tmp_path, 0, 0)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight must hold finite numbers; found others"):
        read(tmp_path, 0, 1)
