"""An optimizer's state cut for one layout, read for another, is the one that the other would have cut from the whole: for any
two layouts, parts of data-parallel ranks at any place, padding of the vocabulary and heads that are cut between ranks."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from engine.core.errors import CheckpointError
from engine.megatron.reshard import SavedOptimizer, slots_of
from engine.models.base import ModelShape
from engine.models.registry import family_of
from engine.models.sharding import TrainerLayout, matrix_slice, shard_shapes, shard_slices, tensors
from tests.builders import SMALL

KINDS = ("exp_avg", "exp_avg_sq", "main")
LAYOUTS = [
    TrainerLayout(),
    TrainerLayout(tp_size=2),
    TrainerLayout(pp_size=2),
    TrainerLayout(tp_size=2, pp_size=2),
    TrainerLayout(pp_size=2, vpp_size=2),
    TrainerLayout(tp_size=2, pp_size=2, first_stage_layers=1),
    TrainerLayout(tp_size=2, spec="transformer_engine"),
]
ODD = ModelShape(4, 8, 4, 2, 2, 12, 99, 1e4, None, 1e-5, False, 16)  # a vocabulary that two ranks do not share evenly
TIED = ModelShape(4, 8, 4, 2, 2, 12, 100, 1e4, None, 1e-5, True, 16)


class Opened:
    """A file as safetensors opens it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> Sliced:
        return Sliced(self._tensors[name])


class Sliced:
    """A tensor of which safetensors reads what is asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self._tensor[part].clone()


def whole_model(shape: ModelShape) -> dict[str, dict[str, torch.Tensor]]:
    """Another number for each element of each kind of each Hugging Face tensor."""
    draw = torch.Generator().manual_seed(0)
    return {kind: {name: torch.randn(size, generator=draw) for name, size in tensors(shape).items()} for kind in KINDS}


def shards(
    shape: ModelShape, layout: TrainerLayout, whole: dict[str, dict[str, torch.Tensor]], tp_rank: int, pp_rank: int
) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, kind) of one rank, cut from the whole."""
    local = family_of(shape).local_name
    found = {
        (local(name), kind): torch.zeros(size)
        for name, size in shard_shapes(shape, layout, tp_rank, pp_rank).items()
        for kind in KINDS
    }
    for one in shard_slices(shape, layout, tp_rank, pp_rank):
        for kind in KINDS:
            into = matrix_slice(found[local(one.parameter), kind], one.shard_row, one.shard_col, one.rows, one.cols)
            into.copy_(matrix_slice(whole[kind][one.name], one.row, one.col, one.rows, one.cols))
    return found


def saved(
    shape: ModelShape, layout: TrainerLayout, dp_size: int, whole: dict[str, dict[str, torch.Tensor]], *, distributed: bool
) -> list[dict[str, torch.Tensor]]:
    """What the ranks write, each parameter cut over the data-parallel ranks at random, some of which have nothing of it."""
    draw = random.Random(1)
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(layout.tp_size * layout.pp_size * dp_size)]
    for pp_rank in range(layout.pp_size):
        for tp_rank in range(layout.tp_size):
            held = shards(shape, layout, whole, tp_rank, pp_rank)
            for name in {name for name, _ in held}:
                size = held[name, "main"].numel()
                cuts = [0, *sorted(draw.randint(0, size) for _ in range(dp_size - 1)), size] if distributed else [0, size]
                for dp_rank, (start, end) in enumerate(pairwise(cuts)):
                    if start == end:
                        continue
                    state = ranks[(pp_rank * dp_size + dp_rank) * layout.tp_size + tp_rank]
                    part = f"[{start}:{end}]" if end - start < size else ""
                    for kind in KINDS:
                        value = held[name, kind]
                        state[f"optimizer.{name}{part}.{kind}"] = value.flatten()[start:end].clone() if part else value
                    state[f"optimizer.{name}{part}.step"] = torch.tensor(7.0)
                    state["optimizer.schedule.step"] = torch.tensor(9)
    return ranks


@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([SMALL, ODD, TIED]),
)
@settings(max_examples=40, deadline=None)
def test_any_layout_goes_on_from_any_other(before, after, dp_size, distributed, told, shape):
    """Whether or not the checkpoint tells which rank has what."""
    whole = whole_model(shape)
    files = saved(shape, before, dp_size, whole, distributed=distributed)
    who = {rank: slots_of(file) for rank, file in enumerate(files)} if told and distributed else None
    one_writer = told and not distributed
    source = SavedOptimizer(shape, before, dp_size, lambda rank: Opened(files[rank]), who, one_writer)
    for pp_rank in range(after.pp_size):
        for tp_rank in range(after.tp_size):
            wanted = shards(shape, after, whole, tp_rank, pp_rank)
            names = sorted({name for name, _ in wanted})
            slots = {names[0] + "[1:3]": (2,)} | {name: tuple(wanted[name, "main"].shape) for name in names[1:]}
            found = source.state_of(after, tp_rank, pp_rank, slots)
            assert int(found.pop("optimizer.schedule.step")) == 9
            for slot in slots:
                name, part = slot.partition("[")[0], "[" in slot
                assert float(found.pop(f"optimizer.{slot}.step")) == 7.0
                for kind in KINDS:
                    expected = wanted[name, kind].flatten()[1:3] if part else wanted[name, kind]
                    assert torch.equal(found.pop(f"optimizer.{slot}.{kind}"), expected), (slot, kind)
            assert not found


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dp_size", [2, 8, 64])
@pytest.mark.parametrize("before", [TrainerLayout(), TrainerLayout(tp_size=2, pp_size=2)])
def test_a_rank_opens_the_files_of_those_that_hold_what_it_needs(tmp_path, before, dp_size, distributed):
    """Four elements: the file with the place in the schedule and four at most with those, however many ranks wrote. Read by
    safetensors itself."""
    whole = whole_model(SMALL)
    files = saved(SMALL, before, dp_size, whole, distributed=distributed)
    for rank, file in enumerate(files):
        save_file({name: value.contiguous() for name, value in file.items()}, tmp_path / f"{rank}")
    opened: list[int] = []

    def open_rank(rank: int) -> Any:
        opened.append(rank)
        return safe_open(tmp_path / f"{rank}", framework="pt")

    slots = {rank: slots_of(file) for rank, file in enumerate(files)} if distributed else None
    source = SavedOptimizer(SMALL, before, dp_size, open_rank, slots, one_writer=not distributed)
    wanted = shards(SMALL, TrainerLayout(), whole, 0, 0)
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    width = wanted[name, "main"].shape[1]
    start = 3 * width + 2
    found = source.state_of(TrainerLayout(), 0, 0, {f"{name}[{start}:{start + 4}]": (4,)})
    for kind in KINDS:
        expected = wanted[name, kind].flatten()[start : start + 4]
        assert torch.equal(found[f"optimizer.{name}[{start}:{start + 4}].{kind}"], expected)
    assert float(found[f"optimizer.{name}[{start}:{start + 4}].step"]) == 7.0
    assert len(opened) == len(set(opened))
    holding = {
        rank
        for rank, file in enumerate(files)
        for slot in slots_of(file)
        if slot.partition("[")[0].endswith("self_attention.linear_proj.weight")
    }
    assert len(opened) <= 1 + 4 and set(opened) <= holding | {0}, (opened, holding)


@pytest.mark.parametrize("key", ["fp8.0.layer.scaling_fwd.scale", "optimizer.decoder.w[3:9].exp_avg.scale_inv"])
def test_what_is_kept_for_a_whole_shard_cannot_be_cut_anew(key):
    files: list[dict[str, Any]] = [{"optimizer.schedule.step": torch.tensor(1), key: torch.ones(1)}]
    source = SavedOptimizer(SMALL, TrainerLayout(), 1, lambda rank: Opened(files[rank]))
    with pytest.raises(CheckpointError, match=r"trainer's layout must be the one that wrote the checkpoint .* found"):
        source.state_of(TrainerLayout(tp_size=2), 0, 0, {})
