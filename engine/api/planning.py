"""What a run will move and hold, before anything is launched; engine/capacity counts."""

from __future__ import annotations

from typing import Any

from engine.capacity.transfer import Machine, plan_run
from engine.config.load import RunConfig
from engine.run.spec import resolve


def plan(config: RunConfig, machine: Machine | None = None) -> dict[str, Any]:
    """The figures of a weight sync and, under "memory", the bytes of each kind of device (see `plan_run`, `weigh`). `machine`:
    bandwidths and the memory of a GPU, an H200's where not said. It needs the model's config.json and no other file."""
    return plan_run(resolve(config, digests=False), machine or Machine())
