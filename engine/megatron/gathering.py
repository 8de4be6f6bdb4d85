"""Full Hugging Face tensors on one rank, gathered from the shards of the tensor-parallel ranks of a stage, for files. A weight
sync does not come by here: it goes from shard to shard (engine/bridge).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from engine.megatron.fp8.parameters import Weights
from engine.megatron.parallel_state import ParallelState
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.export_plan import ExportBucket, ExportFile


class Gathering:
    """Gathers the model's tensors as an export plan has them in buckets and files."""

    def __init__(self, shape: ModelShape, axes: layout.TrainerLayout, parallel: ParallelState, dtype: torch.dtype) -> None:
        self._parallel, self._dtype = parallel, dtype
        self._held = [_by_tensor(layout.shard_slices(shape, axes, rank, parallel.pp_rank)) for rank in range(parallel.tp_size)]

    @torch.no_grad()
    def bucket(self, bucket: ExportBucket, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]] | None:
        """The bucket's full Hugging Face tensors, copied, on the rank of its stage that it names; None on every other rank.
        `weights`: this rank's shards, by megatron's names.

        Collective over the tensor-parallel ranks of that stage in that data-parallel replica; others return at once.
        """
        here = self._parallel
        if here.pp_rank != bucket.stage or here.dp_rank != bucket.dp_rank:
            return None
        shards = Weights(weights)
        slices = [[p for meta in bucket.tensors for p in held.get(meta.name, ())] for held in self._held]
        flat = torch.empty(max(sum(p.rows * p.cols for p in held) for held in slices), dtype=self._dtype, device=here.device)
        for name, group in groupby(_parts(slices[here.tp_rank], flat), key=lambda pair: pair[0].parameter):
            shard = shards[name]
            for p, part in group:
                part.copy_(layout.matrix_slice(shard, p.shard_row, p.shard_col, p.rows, p.cols))
        gathered = [flat]
        if here.tp_size > 1:
            receives = here.tp_rank == bucket.tp_rank
            gathered = [torch.empty_like(flat) for _ in range(here.tp_size)] if receives else []
            dist.gather(flat, gathered or None, group=here.tp_group, group_dst=bucket.tp_rank)
        if here.tp_rank != bucket.tp_rank:
            return None
        full = {meta.name: torch.empty(meta.shape, dtype=self._dtype, device=here.device) for meta in bucket.tensors}
        for held, received in zip(slices, gathered, strict=True):
            for p, part in _parts(held, received):
                layout.matrix_slice(full[p.name], p.row, p.col, p.rows, p.cols).copy_(part)
        return list(full.items())

    def files(self, plan: Sequence[ExportFile], weights: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
        """Host copies of the full tensors in those files of the plan that this rank writes, by the file's place in the plan.

        Collective over the tensor-parallel ranks of each stage and data-parallel replica.
        """
        found: dict[int, dict[str, torch.Tensor]] = {}
        for index, file in enumerate(plan):
            for bucket in file.buckets:
                for name, full in self.bucket(bucket, weights) or ():
                    found.setdefault(index, {})[name] = full.cpu()
        return found


def _by_tensor(slices: Iterable[layout.ShardSlice]) -> dict[str, list[layout.ShardSlice]]:
    """What a rank holds of each Hugging Face tensor."""
    held: dict[str, list[layout.ShardSlice]] = {}
    for part in slices:
        held.setdefault(part.name, []).append(part)
    return held


def _parts(slices: Iterable[layout.ShardSlice], flat: torch.Tensor) -> Iterator[tuple[layout.ShardSlice, torch.Tensor]]:
    """Each slice with its view [rows, cols] of a flat message that holds them one after another."""
    start = 0
    for part in slices:
        size = part.rows * part.cols
        yield part, flat[start : start + size].view(part.rows, part.cols)
        start += size
