"""What one trainer rank does from start to end: joins the others, builds its parts and runs the loop; what
rank 0 has beside it (rollouts, rewards, records, evaluation) is in desk.py. It starts no process; cluster.py does.

A run's events come out as an iterator of small dictionaries: {"kind": "step" | "evaluation" | "note" | "done", ...}.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import RunConfig
from engine.errors import CheckpointError, ConfigError, NumericsError, PreemptedError, SemionError
from engine.observe.sinks import MetricsWriter
from engine.observe.window import Window

if TYPE_CHECKING:
    from engine.bridge.publish import Publisher
    from engine.checkpoint import Checkpoints
    from engine.desk import Desk
    from engine.inference.pool import EngineHandle
    from engine.megatron.policy import Policy
    from engine.megatron.topology import Topology
    from engine.rewards.model import ScoringEngine
    from engine.rollouts import StepSource
    from engine.types import Batch

Event = dict[str, Any]


def sign_of_life(config: RunConfig) -> Path:
    """The file that rank 0 touches when it has waited for something, between two of its events."""
    return config.run_directory / "alive"


def stop_request(config: RunConfig) -> Path:
    """The file by which the command asks rank 0 to save and end; rank 0 is on the command's machine."""
    return config.run_directory / "stop"


class TrainerRank:
    """One trainer rank. Everything heavy is imported in here, on the thread that then calls megatron."""

    def __init__(self, config_json: str, rank: int, host: str) -> None:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        import torch

        torch.set_num_threads(1)
        self._config = RunConfig.model_validate_json(config_json)
        self._rank, self._host = rank, host
        self._server: socket.socket | None = None

    def serve(self) -> int:
        """Opens the rendezvous of the trainer ranks on this rank's host; its port."""
        from engine.bridge.transport import listen

        self._server, port = listen(self._host)
        return port

    def train(
        self, port: int, engines: list[EngineHandle] | None, reward_engine: ScoringEngine | None, resume: bool
    ) -> Iterator[Event]:
        """Trains; the engines are rank 0's. Every rank must be told to train with the same arguments otherwise."""
        from engine import loop
        from engine.algorithms.losses import make_objective
        from engine.bridge.opening import open_publisher
        from engine.desk import Desk
        from engine.megatron.policy import Policy
        from engine.replay import replay_kind

        config, topology = self._config, self._join(port)
        objective = make_objective(config.algorithm, sampled=replay_kind(config) != "preferences")
        policy = Policy(config, topology, objective, config.model.path)
        checkpoints = _checkpoints(config, topology)
        start = _resume(config, checkpoints, policy) if resume else 0
        desk = Desk(config, engines, reward_engine, start) if engines is not None else None
        pool = desk.pool if desk and config.uses_engines else None
        publisher: loop.Publisher = _NoEngines()
        if config.uses_engines:
            publisher = _Publisher(open_publisher(config, policy, topology, self._host, pool), topology)
        source = _Source(config, topology, desk.source if desk else None)

        def checkpoint(step: int) -> None:
            collapse, stopped = self._collapse(topology, desk), self._stopped(topology, step)
            saved = _commits(config, step, collapse or stopped)
            if saved:
                checkpoints.commit(step, policy.state(), _weights(config, policy, topology), config)
            if end := _early_end(config, step, collapse, stopped, saved):
                self._close(topology, desk)
                raise end

        def evaluate(step: int) -> None:
            if desk is not None:
                desk.evaluate(step, lambda: self._beat(topology))
                checkpoints.select(desk.scores(), config)
                self._beat(topology, over=True)
            else:
                while not self._beat(topology):
                    pass

        if desk is not None:
            checkpoints.select(desk.scores(), config)
        for record in loop.train(
            config.schedule,
            policy,
            source,
            publisher,
            start=start,
            taking_turns=config.takes_turns,
            checkpoint=checkpoint,
            evaluation_due=config.evaluation_due,
            evaluate=evaluate,
            window=Window(config.profile, config.run_directory, self._rank, pool, config.schedule),
        ):
            for event in desk.finish_step(record) if desk else ():
                yield event
        for event in desk.finish() if desk else ():
            yield event
        topology.close()

    def _beat(self, topology: Topology, over: bool = False) -> bool:
        """One part of what rank 0 alone does is done: all ranks hear of it, and whether it was the last. The others would
        else wait for the whole in one collective, and the cluster would take rank 0 for dead."""
        from engine.megatron.handout import broadcast_bytes

        if topology.rank == 0:
            sign_of_life(self._config).touch()
        return broadcast_bytes(b"over" if over else b"more", topology.device) == b"over"

    def _close(self, topology: Topology, desk: Desk | None) -> None:
        """Closes rank 0's records before any rank raises: the first that does has all of them ended. Collective."""
        if desk is not None:
            desk.finish()
        self._beat(topology)

    def _collapse(self, topology: Topology, desk: Desk | None) -> str:
        """What rank 0's guard wants the run stopped for, on every rank; empty where nothing. Collective."""
        if self._config.guard.action != "stop":
            return ""
        from engine.megatron.handout import broadcast_bytes

        return broadcast_bytes(desk.collapse.encode() if desk else b"", topology.device).decode()

    def _stopped(self, topology: Topology, step: int) -> str:
        """What to do about a run that is asked to stop, on every rank; empty where it goes on. Collective where a run that
        ended after `step` steps could be continued: nowhere else is it looked at."""
        if not self._config.schedule.opens(step):
            return ""
        from engine.megatron.handout import broadcast_bytes

        asked = topology.rank == 0 and stop_request(self._config).exists()
        return broadcast_bytes(b"--resume auto goes on" if asked else b"", topology.device).decode()

    def fine_tune(self, port: int) -> Iterator[Event]:
        """Supervised training on worked solutions, then a Hugging Face checkpoint at sft.checkpoint_out."""
        from engine import loop
        from engine.algorithms.losses import NllObjective
        from engine.llama.hf import write_hf_checkpoint
        from engine.megatron.policy import Policy

        config, topology = self._config, self._join(port)
        source = _SupervisedSource(config, topology)
        policy = Policy(config, topology, NllObjective(), config.model.path)
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
            write_hf_checkpoint(config.sft.checkpoint_out, weights, template=config.model.path)
            writer.close()
            yield {"kind": "done", "checkpoint": config.sft.checkpoint_out}
        topology.close()

    def _join(self, port: int) -> Topology:
        from engine.bridge.transport import join_store, serve_store
        from engine.megatron.topology import open_topology

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


class _Source:
    """The loop's source on every rank: rank 0 asks its rollouts, the others receive their part."""

    def __init__(self, config: RunConfig, topology: Topology, rollouts: StepSource | None) -> None:
        self._config, self._topology, self._rollouts = config, topology, rollouts

    def open(self, steps: range) -> None:
        if self._rollouts is not None:
            self._rollouts.open(steps)

    def settle(self, steps: range) -> None:
        import torch.distributed as dist

        for step in steps:
            if self._rollouts is not None:
                self._rollouts.settle(step)
                sign_of_life(self._config).touch()
            dist.barrier()  # the others wait for one step's rollouts at a time, as in `next`

    def next(self, step: int) -> tuple[Batch, dict[str, float]]:
        from engine.megatron.handout import hand_out

        data = self._rollouts.next(step) if self._rollouts is not None else None
        sequences, num_prompts, metrics = (data.sequences, data.num_prompts, data.metrics) if data else (None, 0, {})
        batch = hand_out(sequences, num_prompts, step, self._config.trainer, self._topology)
        return batch, metrics | {"target_tokens": float(batch.num_target_tokens)}


class _SupervisedSource:
    """Worked solutions in the seeded order; every rank reads the file and packs its own part."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        from engine.data.mixture import load_prompts
        from engine.data.prompts import PromptOrder
        from engine.data.supervised import supervised_sequence
        from engine.data.templates import load_tokenizer
        from engine.llama.hf import read_shape

        self._config, self._topology = config, topology
        tokenizer = load_tokenizer(config.model.path)
        prompts = load_prompts(config, config.data, config.data.train).prompts
        self._sequences = [supervised_sequence(prompt, tokenizer) for prompt in prompts]
        limit = min(config.trainer.microbatch_tokens, read_shape(config.model.path).max_positions)
        for prompt, sequence in zip(prompts, self._sequences, strict=True):
            if sequence.num_tokens > limit:
                raise ConfigError(
                    f"trainer.microbatch_tokens and the model's positions must hold every prompt with its solution; found "
                    f"{sequence.num_tokens} tokens in {prompt.id} and a limit of {limit}: raise trainer.microbatch_tokens, or "
                    f"shorten or remove the row"
                )
        self._order = PromptOrder(len(prompts), config.run.seed)

    def open(self, steps: range) -> None:
        """Nothing to open."""

    def settle(self, steps: range) -> None:
        """Nothing to wait for."""

    def next(self, step: int) -> tuple[Batch, dict[str, float]]:
        from engine.megatron.packing import make_batches

        sequences = [self._sequences[i] for i in self._order.at(step, self._config.sft.sequences_per_step)]
        batches = make_batches(sequences, step=step, num_prompts=len(sequences), trainer=self._config.trainer)
        batch = batches[self._topology.dp_rank]
        return batch, {"target_tokens": float(batch.num_target_tokens)}


class _Publisher:
    """The bridge's publisher, saying what a sync cost in the loop's words."""

    def __init__(self, publisher: Publisher, topology: Topology) -> None:
        self._publisher, self._topology = publisher, topology
        self.serves: int | None = 0  # engines load the seed model

    def publish(self, version: int) -> dict[str, float]:
        if self.serves is None and self._topology.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()  # what the trainer's allocator keeps, the engines need to wake
        report = self._publisher.publish(version)
        self.serves = version
        repeated = {"sync_attempts": float(report.attempts)} if report.attempts > 1 else {}
        return {"sync_seconds": report.seconds, "sync_mebibytes": report.num_bytes / 2**20} | repeated

    def rest(self) -> None:
        if self.serves is not None:
            self._publisher.rest()
            self.serves = None


class _NoEngines:
    """A publisher for a run that samples nothing."""

    serves: int | None = 0

    def publish(self, version: int) -> dict[str, float]:
        return {}

    def rest(self) -> None:
        """Nobody is there."""


def _plan(config: RunConfig, policy: Policy) -> Any:
    from engine.llama.layout import export_plan

    return export_plan(policy.shape, policy.layout, policy.dtype, config.sync.bucket_mebibytes << 20)


def _weights(config: RunConfig, policy: Policy, topology: Topology) -> Iterator[Any]:
    from engine.bridge.publish import stream_to_first_rank

    return stream_to_first_rank(policy, topology, _plan(config, policy), policy.dtype)


def _checkpoints(config: RunConfig, topology: Topology) -> Checkpoints:
    import torch.distributed as dist

    from engine.checkpoint import Checkpoints

    folder = config.run_directory / "checkpoints"
    return Checkpoints(folder, rank=topology.rank, world_size=topology.world_size, barrier=dist.barrier)


def _commits(config: RunConfig, step: int, collapse: str) -> bool:
    """Whether the state after `step` steps is saved: when due, and before a stop where a run can go on from it."""
    return config.checkpoint_due(step) or bool(collapse and config.schedule.opens(step))


def _early_end(config: RunConfig, step: int, collapse: str, stopped: str, saved: bool) -> SemionError | None:
    """Why the run ends after `step` steps although more are asked for; None where it goes on."""
    if collapse and step < config.run.steps:
        state = "saved in a checkpoint" if saved else "not at a sync boundary, so the newest checkpoint stands"
        return NumericsError(f"{collapse}; guard.action = 'stop' ended the run after {step} steps, {state}")
    return PreemptedError(f"asked to stop: saved after {step} steps, {stopped}") if stopped else None


def _resume(config: RunConfig, checkpoints: Checkpoints, policy: Policy) -> int:
    """Loads the newest checkpoint into the policy; the step to go on with."""
    step, state = checkpoints.load(config)
    if step > config.run.steps:
        raise CheckpointError(
            f"run.steps must not be less than the {step} steps already done; found {config.run.steps}: raise it"
        )
    schedule = config.schedule
    if step < config.run.steps and not schedule.opens(step):
        less = f" less {schedule.shift}" if schedule.shift else ""
        raise CheckpointError(
            f"run.steps cannot be raised from {step}, where the checkpoint ends a run between two points at which rollouts "
            f"are submitted; found {config.run.steps}: a run can be prolonged from a multiple of {schedule.width} steps{less}"
        )
    policy.load_state(state)
    return step
