"""What one trainer rank does from start to end: joins the others, builds its parts and runs the loop. What comes between two
steps is in milestones.py, what rank 0 has beside it (rollouts, rewards, records, evaluation) in controller.py. It starts no
process; processes.py does, and this file is imported in the rank's own process only.

A run's events come out as an iterator of small dictionaries: {"kind": "step" | "evaluation" | "note" | "done", ...}.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from engine.algorithms.nll import NllLoss
from engine.algorithms.registry import make_loss
from engine.bridge.setup import open_publisher
from engine.bridge.transports.rendezvous import join_store, listen, serve_store
from engine.config.options import LOSSES
from engine.data.ends import end_tokens
from engine.data.templates import model_tokenizer
from engine.inference.pool import EngineHandle
from engine.megatron.parallel_state import ParallelState, open_parallel_state
from engine.megatron.policy import Policy
from engine.observe.profiling.window import Window
from engine.observe.telling import activity
from engine.observe.writing import MetricsWriter
from engine.rewards.registry import Judges
from engine.rollouts.replay import SupervisedSource
from engine.run import loop
from engine.run.agreement import Agreement
from engine.run.controller import Controller
from engine.run.descriptors import require_room
from engine.run.milestones import Milestones, resume_policy, weights_in_turns
from engine.run.model_folder import check_shared, write_model
from engine.run.publishers import NoEngines, PoolPublisher
from engine.run.saving import Checkpoints
from engine.run.signals import Event
from engine.run.sources import DealtSource
from engine.run.spec import Spec

log = logging.getLogger(__name__)

DETERMINISTIC = {  # what GPU libraries read before their first work, with trainer.deterministic
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine: attention whose backward adds in a fixed order
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: products that repeat themselves on every stream
    "NCCL_ALGO": "Ring",  # sums of ranks in one order, whatever NCCL would find faster
}


class TrainerRank:
    """One trainer rank, in a process of its own."""

    def __init__(self, spec: Spec, rank: int, host: str) -> None:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if spec.config.trainer.deterministic and torch.cuda.is_available():
            os.environ |= DETERMINISTIC
            torch.use_deterministic_algorithms(True)
        torch.set_num_threads(spec.config.trainer.threads)
        self._spec, self._config = spec, spec.config
        self._rank, self._host = rank, host
        self._server: socket.socket | None = None

    def serve(self) -> int:
        """Opens the rendezvous of the trainer ranks on this rank's host; its port. ConfigError where those and the engines
        would be more connections than this process may have."""
        inference = self._config.inference
        num_engines = inference.engines * inference.tensor_parallel if self._spec.starts_engines else 0
        require_room(self._config.trainer.world_size, num_engines)
        self._server, port = listen(self._host)
        return port

    def train(self, port: int, engines: list[EngineHandle] | None, judges: Judges, resume: bool) -> Iterator[Event]:
        """Trains; engines and judges are rank 0's. Every rank must be told to train with the same arguments otherwise."""
        spec, config, parallel = self._spec, self._config, self._join(port)
        loss = make_loss(config.algorithm, sampled=spec.sampled)
        with activity("model"):
            sizes = spec.shape, spec.trainer
            shared = spec.colocated and spec.starts_engines
            policy = Policy(config, parallel, loss, config.model.path, *sizes, copies=spec.copies, shares_device=shared)
        checkpoints = Checkpoints(
            config.run_directory / "checkpoints",
            rank=parallel.rank,
            world_size=parallel.world_size,
            host=parallel.host,
            digests=spec.digests or None,
            patience_seconds=config.trainer.timeout_seconds,
        )
        parallel.host.barrier()  # all have read their weights, however long files took
        start, notes = 0, list[str]()
        if resume:
            with activity("resume"):
                start, notes = resume_policy(config, checkpoints, policy)
        controller: Controller | None = None
        if engines is not None:
            kept = checkpoints.records() if resume else None
            ahead = checkpoints.ahead() if resume else (None, None)
            controller = Controller(spec, engines, judges, start, kept, notes, *ahead)
        pool = controller.pool if controller is not None and spec.starts_engines else None
        publisher: loop.Publisher = NoEngines()
        if spec.starts_engines:
            with activity("connect"):
                bridge = open_publisher(spec, policy, parallel, self._host, pool)
                publisher = PoolPublisher(bridge, parallel, policy.make_room)
        agreement = Agreement(config, parallel)
        rollouts = controller.source if controller is not None else None
        cuts_groups = LOSSES.load(config.algorithm.loss).splits_groups()
        source = DealtSource(config, parallel, rollouts, agreement, spec.shape.attention_cost, cuts_groups=cuts_groups)
        milestones = Milestones(config, policy, parallel, checkpoints, controller, agreement, source)
        records = loop.train(
            config.schedule,
            policy,
            source,
            publisher,
            start=start,
            colocated=spec.colocated,
            observe=milestones.observe,
            checkpoint=milestones.checkpoint,
            evaluation_due=config.evaluation_due,
            evaluate=milestones.evaluate,
            window=Window(config.profile, config.run_directory, self._rank, pool, config.schedule),
        )
        for record in records:
            record |= milestones.told()
            for event in controller.finish_step(record) if controller is not None else ():  # Ray's `send` is not a list's
                yield event
        milestones.settle()
        for event in controller.finish() if controller is not None else ():
            yield event
        parallel.close()

    def fine_tune(self, port: int) -> Iterator[Event]:
        """Supervised training on worked solutions, then a Hugging Face checkpoint at sft.checkpoint_out. ConfigError before the
        first step where that is on a file system that not all nodes of the run share."""
        config, parallel, shape = self._config, self._join(port), self._spec.shape
        out = config.sft.checkpoint_out
        assert out is not None
        if config.cluster.nodes > 1:
            check_shared(Path(out), parallel.host)
        with activity("model"):
            policy = Policy(config, parallel, NllLoss(), config.model.path, shape, self._spec.trainer)
        parallel.host.barrier()  # all have read their weights
        solutions: SupervisedSource | None = None
        writer: MetricsWriter | None = None
        end_ids: tuple[int, ...] = ()
        if self._rank == 0:  # the others wait at their first step
            tokenizer = model_tokenizer(config, shape.vocab_size)
            with activity("prompts"):
                solutions = SupervisedSource(config, tokenizer, shape.max_positions)
            ends = end_tokens(config.model.path, tokenizer)
            for warning in (*solutions.warnings, *([ends.disagreement] if ends.disagreement else [])):
                log.warning(warning)
            end_ids, writer = tuple(ends.stop), MetricsWriter(config.run_directory)
            yield {"kind": "note", "text": f"data.train: {solutions}"}
        source = DealtSource(config, parallel, solutions, Agreement(config, parallel), shape.attention_cost)
        window = Window(config.profile, config.run_directory, self._rank)
        for record in loop.fine_tune(policy, source, num_steps=config.run.steps, window=window):
            if writer is not None:
                writer.write(record)
                yield {"kind": "step"} | record
        with activity("export"):
            write_model(Path(out), weights_in_turns(config, policy, parallel), policy.dtype, config, parallel.host, end_ids)
        if writer is not None:
            writer.close()
            yield {"kind": "done", "checkpoint": out}
        parallel.close()

    def _join(self, port: int) -> ParallelState:
        trainer = self._config.trainer
        with activity("ranks", total=trainer.world_size):
            if self._server is not None:
                store = serve_store(self._server, self._host, trainer.world_size, trainer.timeout_seconds)
                port = store.port
            else:
                store = join_store(self._host, port, trainer.world_size, trainer.timeout_seconds)
            words = join_store(self._host, port, trainer.world_size, trainer.timeout_seconds)
            return open_parallel_state(
                trainer,
                rank=self._rank,
                world_size=trainer.world_size,
                store=store,
                timeout=timedelta(seconds=trainer.timeout_seconds),
                seed=self._config.run.seed,
                words=words,
            )
