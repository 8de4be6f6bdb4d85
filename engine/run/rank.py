"""What one trainer rank does from start to end: joins the others, builds its parts and runs the loop; what
rank 0 has beside it (rollouts, rewards, records, evaluation) is in controller.py. It starts no process; processes.py does,
and imports this file in the rank's own process only.

A run's events come out as an iterator of small dictionaries: {"kind": "step" | "evaluation" | "note" | "done", ...}.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.algorithms.nll import NllLoss
from engine.algorithms.registry import make_loss
from engine.bridge.sender import stream_to_first_rank
from engine.bridge.setup import open_publisher
from engine.bridge.transports.rendezvous import join_store, listen, serve_store
from engine.config.load import RunConfig
from engine.core.errors import NumericsError, PreemptedError, SemionError
from engine.data.ends import end_tokens
from engine.data.templates import load_tokenizer
from engine.inference.pool import EngineHandle
from engine.megatron.broadcast import broadcast_bytes
from engine.megatron.policy import Policy
from engine.megatron.topology import Topology, open_topology
from engine.models.hf import write_hf_checkpoint
from engine.models.sharding import export_plan
from engine.observe.profiling.window import Window
from engine.observe.sinks import MetricsWriter
from engine.rewards.model import ScoringEngine
from engine.run import loop
from engine.run.checkpoint import Checkpoints, check_prolonged
from engine.run.controller import Controller
from engine.run.publishers import NoEngines, PoolPublisher
from engine.run.signals import Event, sign_of_life, stop_request
from engine.run.sources import BroadcastSource, SupervisedSource
from engine.run.spec import Spec

log = logging.getLogger(__name__)


class TrainerRank:
    """One trainer rank, in a process of its own."""

    def __init__(self, spec: Spec, rank: int, host: str) -> None:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.set_num_threads(1)
        self._spec, self._config = spec, spec.config
        self._rank, self._host = rank, host
        self._server: socket.socket | None = None

    def serve(self) -> int:
        """Opens the rendezvous of the trainer ranks on this rank's host; its port."""
        self._server, port = listen(self._host)
        return port

    def train(
        self, port: int, engines: list[EngineHandle] | None, reward_engine: ScoringEngine | None, resume: bool
    ) -> Iterator[Event]:
        """Trains; the engines are rank 0's. Every rank must be told to train with the same arguments otherwise."""
        config, topology = self._config, self._join(port)
        loss = make_loss(config.algorithm, sampled=self._spec.source != "preferences")
        policy = Policy(config, topology, loss, config.model.path)
        folder = config.run_directory / "checkpoints"
        digests = self._spec.digests or None
        checkpoints = Checkpoints(
            folder, rank=topology.rank, world_size=topology.world_size, barrier=dist.barrier, digests=digests
        )
        start = resume_policy(config, checkpoints, policy) if resume else 0
        controller: Controller | None = None
        if engines is not None:
            kept = checkpoints.records() if resume else None
            controller = Controller(config, engines, reward_engine, start, kept)
        pool = controller.pool if controller and self._spec.starts_engines else None
        publisher: loop.Publisher = NoEngines()
        if self._spec.starts_engines:
            publisher = PoolPublisher(open_publisher(config, policy, topology, self._host, pool), topology)
        source = BroadcastSource(config, topology, controller.source if controller else None)

        def checkpoint(step: int) -> None:
            collapse = self._collapse(topology, controller)
            stopped = self._stopped(topology, step)
            saved = commits(config, step, ends=collapse is not None or stopped)
            if saved:
                records = controller.kept(checkpoints.steps()) if controller else None
                ends = controller.end_ids if controller else ()
                checkpoints.commit(step, policy.state(), _weights(config, policy, topology), config, records, ends)
            if end := _early_end(config, step, collapse, stopped=stopped, saved=saved):
                self._close(topology, controller)
                raise end

        def evaluate(step: int) -> None:
            if controller is not None:
                controller.evaluate(step, lambda: self._beat(topology))
                checkpoints.select(controller.scores(), config)
                self._beat(topology, over=True)
            else:
                while not self._beat(topology):
                    pass

        if controller is not None:
            checkpoints.select(controller.scores(), config)
        for record in loop.train(
            config.schedule,
            policy,
            source,
            publisher,
            start=start,
            colocated=config.colocated,
            checkpoint=checkpoint,
            evaluation_due=config.evaluation_due,
            evaluate=evaluate,
            window=Window(config.profile, config.run_directory, self._rank, pool, config.schedule),
        ):
            for event in controller.finish_step(record) if controller else ():
                yield event
        for event in controller.finish() if controller else ():
            yield event
        topology.close()

    def fine_tune(self, port: int) -> Iterator[Event]:
        """Supervised training on worked solutions, then a Hugging Face checkpoint at sft.checkpoint_out."""
        config, topology = self._config, self._join(port)
        source = SupervisedSource(config, topology)
        policy = Policy(config, topology, NllLoss(), config.model.path)
        writer = MetricsWriter(config.run_directory) if self._rank == 0 else None
        window = Window(config.profile, config.run_directory, self._rank)
        for record in loop.fine_tune(policy, source, num_steps=config.run.steps, window=window):
            if writer is not None:
                writer.write(record)
                yield {"kind": "step"} | record
        weights = _weights(config, policy, topology)
        if writer is None:
            for _ in weights:
                pass
        else:
            assert config.sft.checkpoint_out is not None
            ends = end_tokens(config.model.path, load_tokenizer(config.model.path))
            if ends.disagreement:
                log.warning(ends.disagreement)
            write_hf_checkpoint(config.sft.checkpoint_out, weights, template=config.model.path, end_ids=ends.stop)
            writer.close()
            yield {"kind": "done", "checkpoint": config.sft.checkpoint_out}
        topology.close()

    def _beat(self, topology: Topology, over: bool = False) -> bool:
        """Heartbeat: rank 0 broadcasts that it has finished a part of what it alone does, so that the other ranks' collectives
        and the watching command do not time out; True when rank 0 has finished all of it. Collective."""
        if topology.rank == 0:
            sign_of_life(self._config).touch()
        return broadcast_bytes(b"over" if over else b"more", topology.device) == b"over"

    def _close(self, topology: Topology, controller: Controller | None) -> None:
        """Closes rank 0's records before any rank raises: the first that does has all of them ended. Collective."""
        if controller is not None:
            controller.finish()
        self._beat(topology)

    def _collapse(self, topology: Topology, controller: Controller | None) -> str | None:
        """Broadcasts the guard's reason to stop the run; None to go on. Collective."""
        if self._config.guard.action != "stop":
            return None
        reason = controller.collapse if controller else None
        return broadcast_bytes((reason or "").encode(), topology.device).decode() or None

    def _stopped(self, topology: Topology, step: int) -> bool:
        """Broadcasts whether the command has asked the run to stop. Collective where a run that ended after `step` steps could
        be continued: nowhere else is it looked at."""
        if not self._config.schedule.resumable(step):
            return False
        asked = topology.rank == 0 and stop_request(self._config).exists()
        return broadcast_bytes(b"stop" if asked else b"", topology.device) == b"stop"

    def _join(self, port: int) -> Topology:
        trainer, reward_patience = self._config.trainer, self._config.reward_model.patience_seconds
        if self._server is not None:
            store = serve_store(self._server, self._host, trainer.world_size, trainer.timeout_seconds)
        else:
            store = join_store(self._host, port, trainer.world_size, trainer.timeout_seconds)
        return open_topology(
            trainer,
            rank=self._rank,
            world_size=trainer.world_size,
            store=store,
            # Ranks wait for each other, and while rank 0 waits for an engine they wait for that too.
            timeout=timedelta(seconds=trainer.timeout_seconds + self._config.inference.timeout_seconds + reward_patience),
            seed=self._config.run.seed,
        )


def _weights(config: RunConfig, policy: Policy, topology: Topology) -> Iterator[tuple[str, torch.Tensor]]:
    """The full policy by Hugging Face names, on rank 0; collective, and empty elsewhere."""
    plan = export_plan(policy.shape, policy.layout, policy.dtype, config.sync.bucket_mebibytes << 20)
    return stream_to_first_rank(policy, topology, plan, policy.dtype)


def commits(config: RunConfig, step: int, *, ends: bool) -> bool:
    """Whether the state after `step` steps is saved: when due, and where the run `ends` and can go on from it."""
    return config.checkpoint_due(step) or (ends and config.schedule.resumable(step))


def _early_end(config: RunConfig, step: int, collapse: str | None, *, stopped: bool, saved: bool) -> SemionError | None:
    """Why the run ends after `step` steps although more are asked for; None where it goes on."""
    if collapse is not None and step < config.run.steps:
        state = "saved in a checkpoint" if saved else "not at a sync boundary, so the newest checkpoint stands"
        return NumericsError(f"{collapse}; guard.action = 'stop' ended the run after {step} steps, {state}")
    return PreemptedError(f"asked to stop: saved after {step} steps, --resume auto goes on") if stopped else None


def resume_policy(config: RunConfig, checkpoints: Checkpoints, policy: Policy) -> int:
    """Loads the newest checkpoint into the policy; the step to go on with."""
    step, state = checkpoints.load(config)
    check_prolonged(config, step)
    policy.load_state(state)
    return step
