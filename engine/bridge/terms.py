"""What trainer ranks and engines must agree on before a weight is moved: the layouts, from which each computes the same
plan, and its form that crosses a process boundary, JSON."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import TypeAdapter

from engine.bridge.plan import plan
from engine.bridge.shard_plan import ShardPlan
from engine.models.base import ModelShape
from engine.models.sharding import EngineLayout, TrainerLayout


@dataclass(frozen=True, slots=True)
class SyncTerms:
    """Everything that a plan depends on, and what carries it out."""

    shape: ModelShape
    dtype: str  # of the weights, a torch dtype's name
    trainer: TrainerLayout
    dp_size: int
    engine: EngineLayout
    nodes: tuple[tuple[int, ...], ...]  # engines by machine
    bucket_bytes: int
    transport: str  # by name
    senders: tuple[tuple[int, ...], ...] = ()  # trainer ranks that may send to each of `nodes`; empty: all to all

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype

    def plan(self) -> ShardPlan:
        """The plan of every sync under these terms; equal wherever it is computed."""
        size = self.torch_dtype.itemsize
        layouts = (self.shape, size, self.trainer, self.dp_size, self.engine)
        return plan(*layouts, self.nodes, self.bucket_bytes, self.senders)

    def to_json(self) -> str:
        """For another process."""
        return _ADAPTER.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> SyncTerms:
        """The terms that `to_json` wrote; pydantic's ValidationError for any other text."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(SyncTerms)
