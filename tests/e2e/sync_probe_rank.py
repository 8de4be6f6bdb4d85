"""What sync_probe.py has every trainer rank do; imported in the rank's process, where Transformer Engine's layers are answered
for on a CPU before megatron-core looks for them (`SEMION_TE_ON_CPU=1`)."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil

if os.environ.get("SEMION_TE_ON_CPU"):
    from tests import te_cpu

    te_cpu.install()
else:
    from engine.megatron.importing import import_trainer

    import_trainer()

import torch
import torch.distributed as dist

from engine.algorithms.nll import NllLoss
from engine.bridge.setup import open_publisher
from engine.inference.pool import Pool
from engine.megatron.packing import make_batch
from engine.megatron.policy import Policy
from engine.megatron.scatter import scatter_batch
from engine.run.rank import TrainerRank
from engine.run.signals import Event
from tests.rollouts import make_sequence

SEQUENCES, LONGEST, DIGITS = 5, 30, 200


class Probe(TrainerRank):
    """A trainer rank that trains on noise and asks, after every sync, whether engines and trainer agree."""

    def probe(self, port: int, engines: list[Any] | None, num_syncs: int, kill: int, what: str) -> Iterator[Event]:
        config, parallel = self._config, self._join(port)
        policy = Policy(config, parallel, NllLoss(), config.model.path, self._spec.shape, self._spec.trainer)
        pool = Pool(engines, config.inference.timeout_seconds) if engines is not None else None
        publisher = open_publisher(self._spec, policy, parallel, self._host, pool)
        draw = random.Random(3)
        rows = [[draw.randrange(DIGITS) for _ in range(draw.randrange(5, LONGEST))] for _ in range(SEQUENCES)]
        sequences = [make_sequence(tuple(row[:1]), tuple(row[1:]), ()) for row in rows]
        for version in range(1, num_syncs + 1):
            batch = scatter_batch(sequences if parallel.rank == 0 else None, len(rows), version, config.trainer, parallel)
            metrics = policy.train_step(batch)
            if pool is not None and version == kill:
                end(int(pool.describe()[0]["pid"]), what)
            report = publisher.publish(version)
            one_rank = config.trainer.model_copy(update={"data_parallel": 1, "share_prompts": False})
            (whole,) = make_batch(sequences, step=version, num_prompts=5, trainer=one_rank, dp_rank=0).microbatches
            mine = policy.log_probs(replace(batch, microbatches=(whole,)))
            flat = mine[0] if mine else torch.empty(whole.token_ids.numel())
            dist.broadcast(flat, parallel.world_size - 1)
            if pool is None:
                continue
            expected, start = [], 0
            for row in rows:
                expected.append(flat[start : start + len(row) - 1].tolist())
                start += len(row)
            gaps = [
                abs(a - b)
                for engine in pool.log_probs(rows)
                for xs, ys in zip(engine, expected, strict=True)
                for a, b in zip(xs, ys, strict=True)
            ]
            yield {
                "kind": "sync",
                "version": pool.version,
                "gap": max(gaps),
                "mean_gap": sum(gaps) / len(gaps),
                "loss": metrics["loss"],
                "messages": report.num_messages,
                "bytes": report.num_bytes,
                "seconds": report.seconds,
                "attempts": report.attempts,
            }
        parallel.close()


def end(pid: int, what: str) -> None:
    """Kills an engine's process, or a worker of it: a worker's memory is larger than that of its helpers."""
    if what == "worker":
        pid = max(psutil.Process(pid).children(recursive=True), key=lambda process: process.memory_info().rss).pid
    os.kill(pid, signal.SIGKILL)
