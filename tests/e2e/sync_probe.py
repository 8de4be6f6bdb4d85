"""Trains real ranks for a few steps, publishes after each into live engines, and tells how far the engines' log-probs of a
fixed batch are from the trainer's. What the ranks do is in sync_probe_rank.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.config.load import RunConfig
from engine.run.processes import Cluster
from engine.run.spec import resolve
from tests.e2e import in_process

PROBE = "tests.e2e.sync_probe_rank:Probe"
ROOT = Path(__file__).resolve().parents[2]


def probe(config: RunConfig, num_syncs: int, kill: int = 0, what: str = "engine") -> list[dict[str, Any]]:
    """What was seen at each sync. Before sync number `kill`, engine 0 is killed, or a worker of it where `what` is "worker"."""
    environment = {"PYTHONPATH": str(ROOT)}  # of the ranks, which import this folder
    if config.trainer.layers == "transformer_engine" and not torch.cuda.is_available():
        environment["SEMION_TE_ON_CPU"] = "1"
    with in_process.environment(**environment), Cluster(resolve(config)) as cluster:
        engines = cluster.start_engines()
        events = cluster.run_ranks("probe", lambda rank: (engines if rank == 0 else None, num_syncs, kill, what), PROBE)
        return [event for event in events if "version" in event]  # and not what they warn of
