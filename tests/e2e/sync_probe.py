"""A script, not a test: trains real ranks for a few steps, publishes after each into live engines, and prints how far the
engines' log-probs of a fixed batch are from the trainer's. `python sync_probe.py CONFIG SYNCS [KILL [WHAT]]`: before sync
number KILL, engine 0 is killed, or a worker of it where WHAT is "worker"."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil

from engine.config import load_config
from engine.worker import Event, TrainerRank

SEQUENCES, LONGEST, DIGITS = 5, 30, 200


class Probe(TrainerRank):
    """A trainer rank that trains on noise and asks, after every sync, whether engines and trainer agree."""

    def probe(self, port: int, engines: list[Any] | None, num_syncs: int, kill: int, what: str) -> Iterator[Event]:
        import torch
        import torch.distributed as dist

        if self._config.trainer.layers == "transformer_engine" and not torch.cuda.is_available():
            from tests import te_cpu

            te_cpu.install()
        from engine.algorithms.losses import NllObjective
        from engine.bridge.opening import open_publisher
        from engine.inference.pool import Pool
        from engine.megatron.handout import hand_out
        from engine.megatron.packing import pack
        from engine.megatron.policy import Policy
        from engine.types import Sequence

        config, topology = self._config, self._join(port)
        policy = Policy(config, topology, NllObjective(), config.model.path)
        pool = Pool(engines, config.inference.timeout_seconds) if engines is not None else None
        publisher = open_publisher(config, policy, topology, self._host, pool)
        draw = random.Random(3)
        rows = [[draw.randrange(DIGITS) for _ in range(draw.randrange(5, LONGEST))] for _ in range(SEQUENCES)]
        sequences = [Sequence(tuple(row[:1]), tuple(row[1:]), ()) for row in rows]
        for version in range(1, num_syncs + 1):
            batch = hand_out(sequences if topology.rank == 0 else None, len(rows), version, config.trainer, topology)
            metrics = policy.train_step(batch)
            if pool is not None and version == kill:
                end(int(pool.describe()[0]["pid"]), what)
            report = publisher.publish(version)
            (whole,) = pack(sequences, config.trainer.microbatch_tokens, topology.tp_size)
            mine = policy.log_probs(replace(batch, microbatches=(whole,)))
            flat = mine[0] if mine else torch.empty(whole.token_ids.numel())
            dist.broadcast(flat, topology.world_size - 1)
            if pool is None:
                continue
            expected, start = [], 0
            for row in rows:
                expected.append(flat[start : start + len(row) - 1].tolist())
                start += len(row)
            gap = max(
                abs(a - b)
                for engine in pool.log_probs(rows)
                for xs, ys in zip(engine, expected, strict=True)
                for a, b in zip(xs, ys, strict=True)
            )
            yield {
                "kind": "sync",
                "version": pool.version,
                "gap": gap,
                "loss": metrics["loss"],
                "messages": report.num_messages,
                "bytes": report.num_bytes,
                "seconds": report.seconds,
                "attempts": report.attempts,
            }
        topology.close()


def end(pid: int, what: str) -> None:
    """Kills an engine's process, or a worker of it: a worker's memory is larger than that of its helpers."""
    if what == "worker":
        pid = max(psutil.Process(pid).children(recursive=True), key=lambda process: process.memory_info().rss).pid
    os.kill(pid, signal.SIGKILL)


def main() -> None:
    from engine.cluster import Cluster

    config, num_syncs = load_config(sys.argv[1]), int(sys.argv[2])
    kill, what = [*sys.argv[3:], *("0", "engine")[len(sys.argv) - 3 :]]
    with Cluster(config) as cluster:
        engines = cluster.start_engines()
        events = cluster.run_ranks("probe", lambda rank: (engines if rank == 0 else None, num_syncs, int(kill), what), Probe)
        print("RESULT " + json.dumps(list(events)))


if __name__ == "__main__":
    main()
