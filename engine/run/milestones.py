"""What comes between two steps of training: a checkpoint where one is due or the run ends early, and an evaluation. Every rank
takes part, although rank 0 alone has the records and the engines. When an evaluation is due is not decided here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.errors import NumericsError, PreemptedError, SemionError, StorageError
from engine.megatron.parallel_state import ParallelState
from engine.megatron.policy import Policy
from engine.megatron.reshard import SavedOptimizer, slots_of, whole_shards_only
from engine.models.export_plan import ExportFile, export_files, in_turns
from engine.models.sharding import tensors, trainer_layout
from engine.run.agreement import Agreement
from engine.run.checkpoint import LATEST, check_prolonged, reference_place, state_rank
from engine.run.controller import Controller
from engine.run.loop import Record, Source
from engine.run.metrics import FAILED_CHECKPOINTS, INTERVAL, STEP
from engine.run.model_folder import Weights
from engine.run.saving import Checkpoints, Snapshot

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # rank 0 waits so long for a checkpoint between two heartbeats


class Milestones:
    """The checkpoints and evaluations of a run, as one trainer rank takes part in them."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        parallel: ParallelState,
        checkpoints: Checkpoints,
        controller: Controller | None,
        agreement: Agreement,
        source: Source,
    ) -> None:
        """`controller` on rank 0, None on every other; `source`: of the loop's batches."""
        self._config, self._policy, self._parallel = config, policy, parallel
        self._checkpoints, self._controller, self._agreement = checkpoints, controller, agreement
        self._source = source
        self._num_failed = 0
        if controller is not None:
            checkpoints.select(controller.scores(), config)

    def observe(self, record: Record) -> Record:
        """Tells a regime that measures of a step that was trained, in rank 0's numbers, which are on record, so that all ranks
        decide alike; the length of the step's interval as a metric. Collective where the regime measures."""
        schedule = self._config.schedule
        if schedule.measures is None:
            return {}
        value = self._agreement.number(record.get(schedule.measures, math.nan))
        return {INTERVAL.name: float(schedule.observe(int(record[STEP.name]), value))}

    def checkpoint(self, step: int) -> None:
        """Saves the state after `step` steps where that is due. Raises what ends the run there: NumericsError for a collapse
        that the guard stops it for, PreemptedError where the command asked. Collective."""
        config, controller = self._config, self._controller
        collapse, stopped, resumable = None, False, config.schedule.resumable(step)
        if config.guard.action != "off" or resumable:  # nowhere else could a run that was asked to stop be continued
            own = controller.collapse if controller is not None and config.guard.action != "off" else None
            collapse, stopped = self._agreement.early_end(own, resumable=resumable)
        ends = collapse is not None or stopped
        saved = commits(config, step, ends=ends)
        with self._tolerant():
            self._checkpoints.check()
        if saved:
            with self._tolerant():
                self.settle()
            with self._tolerant() if step < config.run.steps and not ends else nullcontext():
                self._commit(step)
        if end := _early_end(config, step, collapse, stopped=stopped, saved=saved):
            self.settle()
            self._close()
            raise end

    def told(self) -> dict[str, float]:
        """What a step's record has of checkpoints: how many could not be written, where any could not."""
        return {FAILED_CHECKPOINTS.name: float(self._num_failed)} if self._num_failed else {}

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """With checkpoint.on_failure = "continue", a checkpoint that cannot be written is told here and the run goes on: the
        last whole one stands, and the next one that is due is tried again. An error on one rank alone is told by rank 0 too,
        which waited for it."""
        try:
            yield
        except StorageError as error:
            if self._config.checkpoint.on_failure == "end":
                raise
            self._num_failed += 1
            if self._controller is not None:
                log.warning("a checkpoint was not written, and the run goes on without it: %s", error)

    def _commit(self, step: int) -> None:
        """Begins to write the state after `step` steps, with the rollouts that were sampled ahead. The others wait for rank 0's
        records to be on disk. Collective."""
        opened = self._config.schedule.in_flight(step)
        self._source.drain(self._config.schedule.completes(step))
        records, end_ids, ahead = None, tuple[int, ...](), None
        if self._controller is not None:
            ahead = self._controller.ahead(opened) if opened else None
            records, end_ids = self._controller.kept(self._checkpoints.steps()), self._controller.end_ids
            self._agreement.done()
        else:
            self._agreement.listen()
        self._checkpoints.commit(step, self._snapshot(step), self._config, records, end_ids, ahead)

    def settle(self) -> None:
        """Returns when the checkpoint under way is named; raises what it failed with. Collective."""
        if self._controller is None:
            self._agreement.listen()
        else:
            while not self._checkpoints.finished(SETTLE_SECONDS):
                self._agreement.heartbeat()
            self._agreement.done()
        self._checkpoints.wait()

    def _snapshot(self, step: int) -> Snapshot:
        """This rank's part of the state after `step` steps, in host memory. Collective."""
        policy = self._policy
        place = reference_place(self._config, step, self._checkpoints.origin) if policy.has_reference else None
        reference = weights_in_files(self._config, policy, self._parallel, "reference") if place == "own" else None
        at = place if isinstance(place, int) else None
        mine = state_rank(self._config.trainer, self._parallel.rank) == self._parallel.rank
        state = policy.state.copy(weights=False) if mine else {}
        slots = slots_of(state) if self._config.trainer.distributed_optimizer else ()
        seed = place == "seed" or policy.holds_seed
        own = weights_in_files(self._config, policy, self._parallel)
        return Snapshot(state, policy.dtype, own, reference, at, seed, slots)

    def evaluate(self, step: int) -> None:
        """Judges the weights after `step` steps on rank 0 while the others wait. Collective."""
        if self._controller is None:
            self._agreement.listen()
            return
        self._controller.evaluate(step, self._agreement.heartbeat)
        self._checkpoints.select(self._controller.scores(), self._config)
        self._agreement.done()

    def _close(self) -> None:
        """Closes rank 0's records before any rank raises: the first that does has all of them ended. Collective."""
        if self._controller is None:
            self._agreement.listen()
            return
        self._controller.finish()
        self._agreement.done()


def weights_in_files(
    config: RunConfig, policy: Policy, parallel: ParallelState, which: Literal["policy", "reference"] = "policy"
) -> Weights:
    """The policy or its reference as the files of a Hugging Face folder, of which each rank has those that it writes in host
    memory. Collective over the tensor-parallel ranks of each stage and data-parallel replica."""
    plan, weights = _folder(config, policy, parallel)
    return replace(weights, own=policy.files(plan, of=which))


def weights_in_turns(config: RunConfig, policy: Policy, parallel: ParallelState) -> Iterator[Weights]:
    """The policy as `weights_in_files` has it, in turns: in each, this rank has one of its files, or none, and no other in host
    memory. All ranks have as many turns. Each is collective as `weights_in_files` is, when it is asked for."""
    plan, weights = _folder(config, policy, parallel)
    for turn in in_turns(plan):
        yield replace(weights, own=files_of_turn(policy, plan, turn))


def files_of_turn(policy: Policy, plan: Sequence[ExportFile], turn: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """`Policy.files` of some of a plan's files, by their place in the whole plan. As collective as that."""
    found = policy.files([plan[place] for place in turn])
    return {turn[index]: tensors for index, tensors in found.items()}


def _folder(config: RunConfig, policy: Policy, parallel: ParallelState) -> tuple[tuple[ExportFile, ...], Weights]:
    """The files of the model's Hugging Face folder, and the folder as long as no rank has any of its tensors."""
    plan = export_files(policy.shape, policy.layout, parallel.dp_size, policy.dtype, config.sync.bucket_mebibytes << 20)
    num_bytes = sum(math.prod(size) for size in tensors(policy.shape).values()) * policy.dtype.itemsize
    return plan, Weights(tuple(file.names for file in plan), {}, num_bytes)


def commits(config: RunConfig, step: int, *, ends: bool) -> bool:
    """Whether the state after `step` steps is saved: when due, and where the run `ends` and can go on from it."""
    return config.checkpoint_due(step) or (ends and config.schedule.resumable(step))


def _early_end(config: RunConfig, step: int, collapse: str | None, *, stopped: bool, saved: bool) -> SemionError | None:
    """Why the run ends after `step` steps although more are asked for; None where it goes on."""
    if collapse is not None:
        state = "saved in a checkpoint" if saved else "not at a sync boundary, so the newest checkpoint stands"
        return NumericsError(f"{collapse} after {step} steps, {state}")
    return PreemptedError(f"asked to stop: saved after {step} steps, --resume auto goes on") if stopped else None


def resume_policy(config: RunConfig, checkpoints: Checkpoints, policy: Policy) -> tuple[int, list[str]]:
    """Loads the newest checkpoint into the policy; the step to go on with, and what is to be known of it."""
    saved = checkpoints.load(config)
    check_prolonged(config, saved.step, saved.ahead)
    state, notes = saved.state, list[str]()
    pointer = config.run_directory / "checkpoints" / LATEST
    if not pointer.exists():
        notes.append(f"{pointer} is gone: goes on after {saved.step} steps, from the newest checkpoint that is whole")
    if state is None:
        writer = saved.trainer
        if writer.fp8 == "delayed" or config.optimizer.moment_dtype == "fp8":  # a rank that reads little may not meet a scale
            raise whole_shards_only(f"{writer.fp8!r} and {config.optimizer.moment_dtype!r}")
        axes, one_writer = trainer_layout(writer), not writer.distributed_optimizer
        former = SavedOptimizer(policy.shape, axes, writer.data_parallel, saved.open_rank, saved.slots, one_writer)
        state = policy.state.of_other_layout(former)
        change = f"{_axes(writer)} -> {_axes(config.trainer)}"
        notes.append(
            f"resumed after {saved.step} steps in another layout than before ({change}): what follows is equivalent, not bit "
            f"for bit what the former layout would have made"
        )
    policy.state.load_checkpoint(state, saved.policy, saved.reference)
    return saved.step, notes


def _axes(trainer: Trainer) -> str:
    return f"TP {trainer.tensor_parallel} PP {trainer.pipeline_parallel} DP {trainer.data_parallel}"
