"""The policy on this trainer rank: scores batches with the reference and takes optimizer steps through megatron's schedules. It
draws no data, samples nothing and writes no file. Log-probs of its output are made in target_log_probs.py, its tensors put
together for files in gathering.py, its state copied and taken up again in policy_state.py.

Shape legend: T tokens of a packed row, L of them with a target, V_local vocabulary columns of this rank, H hidden, K metrics of
the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from engine.algorithms.base import Loss, undivided
from engine.config.load import Copy, RunConfig
from engine.config.options import Trainer
from engine.core.errors import NumericsError
from engine.core.metrics import part_reductions
from engine.core.types import Batch, Microbatch
from engine.megatron import build
from engine.megatron.fp8.delayed_scaling import Fp8Memory
from engine.megatron.fp8.parameters import Weights, behind, copied, forget_initial
from engine.megatron.gathering import Gathering
from engine.megatron.libraries import check_libraries
from engine.megatron.metrics import GRAD_NORM, LEARNING_RATE, LOSS, NUM_TOKENS, SHARED, UPDATED
from engine.megatron.moving import Rows, with_scores
from engine.megatron.optimizer import PolicyOptimizer
from engine.megatron.overlap import open_buffers
from engine.megatron.packing import empty_microbatch
from engine.megatron.parallel_state import ParallelState
from engine.megatron.policy_state import PolicyState
from engine.megatron.reference import Reference
from engine.megatron.spread import precompute_spread_groups
from engine.megatron.target_log_probs import TargetLogProbs
from engine.megatron.timers import Timers
from engine.megatron.weight_gradients import add_by_torch
from engine.models.base import ModelShape
from engine.models.export_plan import ExportFile
from engine.models.hf import HfCheckpoint
from engine.models.registry import family_of
from engine.models.sharding import TrainerLayout
from engine.observe.profiling.phases import Phase, phase
from engine.ops import to_device

# What a microbatch gives back on the last stage: (scalar to differentiate, tensor to collect)
LossOf = Callable[[torch.Tensor, Microbatch], tuple[torch.Tensor, torch.Tensor]]


class Policy:
    """A model sharded over the trainer's ranks, its AdamW, and the reference as a second set of weights."""

    def __init__(
        self,
        config: RunConfig,
        parallel: ParallelState,
        loss: Loss,
        checkpoint_path: str | Path,
        shape: ModelShape,
        axes: TrainerLayout,
        *,
        copies: Collection[Copy] | None = None,
        shares_device: bool = False,
    ) -> None:
        """Builds this rank's chunks and fills them from a Hugging Face folder; the reference starts as a copy. `shape`, `axes`:
        of the model there and of the trainer, and `copies`: of its weights that it keeps, as the run's Spec has them; without
        `copies` the reference if the loss needs a pass with it (RunConfig.reference_source). `shares_device`: with engines,
        which may be there already: gradients have memory only from the first training step on.

        Collective over all ranks. Raises ConfigError for another model, an impossible layout or a missing library,
        CheckpointError for files that do not hold it.
        """
        check_libraries(config.trainer, config.optimizer)
        self.parallel = parallel
        self.loss = loss
        self._rows = Rows(parallel.device)
        self.shape, self.layout = shape, axes
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._config = build.megatron_config(shape, axes, config.trainer, self.dtype)
        self._config.finalize_model_grads_func = _finalize
        self._config.timers = Timers()
        self._row_multiple = config.trainer.row_multiple
        self._rows_together = config.trainer.pipeline_parallel if config.trainer.virtual_pipeline > 1 else 1
        if config.trainer.fuses_accumulation:
            add_by_torch()
        open_buffers(config.trainer, shape.hidden, self.dtype)
        models = build.build_chunks(shape, self._config, parallel, headless=config.trainer.fused_lm_head)
        build.load_all(models, shape, axes, HfCheckpoint(checkpoint_path), parallel)
        self.gathering = Gathering(shape, axes, parallel, self.dtype)
        self._chunks = _with_gradients(models, self._config, config.trainer)
        if shares_device:
            self.give_back_gradients()
        self._target_log_probs: TargetLogProbs | None = None
        if parallel.is_last_stage:
            weight, here = build.output_weight(models[-1]), parallel
            self._target_log_probs = TargetLogProbs(config, weight, shape.vocab_size, here.tp_rank, here.tp_group)
        self._fp8 = Fp8Memory(self._config, models)
        self._own = dict(pair for model in models for pair in build.named_parameters(model))
        self.parameters = Weights(self._own)
        family = family_of(shape)
        names = {parameter: family.local_name(name) for name, parameter in self._own.items()}
        recipe = self._config.fp8_recipe if self._config.fp8_param else None
        distributed = config.trainer.distributed_optimizer
        self._optimizer = PolicyOptimizer(
            config.optimizer, self._chunks, names, dtype=self.dtype, distributed=distributed, fp8_recipe=recipe
        )
        self._optimizer_makes_room = config.optimizer.memory_while_sampling == "host"
        if shares_device and self._optimizer_makes_room:
            self._optimizer.to_host()
        forget_initial(self._own.values())
        self._begun = False  # whether the gradient buffers hold a part of the step (add_gradient)
        self._parts: list[torch.Tensor] = []  # what that part's microbatches gave back
        on_host, mix = config.trainer.reference_memory == "host", config.sync.reference_mix
        self._reference = Reference(self._own, parallel.device, on_host=on_host, mix=mix)
        self._reference_source = config.reference_source
        needs_pass = loss.needs_reference and self._reference_source == "pass"
        if needs_pass if copies is None else "reference" in copies:
            self._reference.copy()
        self._seed = dict[str, torch.Tensor]()
        if copies is not None and "seed" in copies:
            self._seed = {name: copied(parameter) for name, parameter in self._own.items()}
        elif config.sync.reference == "never":  # a reference that never moves is the seed's weights too
            self._seed = self._reference.weights
        self._tables: dict[str, Mapping[str, torch.Tensor]] = {  # what its state has from the start
            "policy": self._own,
            "reference": self._reference.weights,
            "fp8": self._fp8.tensors,
        }
        self.state = PolicyState(self._tables, self._optimizer, shape, axes, parallel, self.dtype)

    @property
    def has_reference(self) -> bool:
        """Whether it keeps a reference beside the policy."""
        return bool(self._reference.weights)

    @property
    def holds_seed(self) -> bool:
        """Whether it keeps the seed model's weights, to be published again."""
        return bool(self._seed)

    def refresh_reference(self) -> None:
        """Has the reference, where one is kept, take the policy's weights as they are now (`Reference.refresh`)."""
        self._reference.refresh()

    def make_room(self) -> None:
        """Gives back, until the next training step, what engines on the same device can have: the gradients' memory, and with
        optimizer.memory_while_sampling = 'host' that of the optimizer's state."""
        self.give_back_gradients()
        if self._optimizer_makes_room:
            self._optimizer.to_host()

    def give_back_gradients(self) -> None:
        """Lets the memory of the gradient buffers go until the next training step, as for engines on the same device."""
        for chunk in self._chunks:
            chunk.offload_grad_buffers(synchronize=self.parallel.device.type == "cuda", empty_cache=False)

    def as_seed(self) -> AbstractContextManager[None]:
        """While entered, the parameters are the seed model's, which an offline run keeps that publishes them again."""
        assert self._seed, "the seed model's weights are kept only where they are to be published again"
        return self.serving(self._seed)

    def score(self, batch: Batch) -> Batch:
        """The batch with `reference_log_probs` [T] filled on the last stage where the loss needs them and they are not the
        policy's own, which `train_step` then takes. Where groups are split over several microbatches or data-parallel
        ranks, the policy scores these microbatches too, and they carry the precomputed gradients of those groups.

        Collective over the pipeline's ranks; where groups are split over data-parallel ranks, also over these.
        """
        microbatches = batch.microbatches
        reference: list[torch.Tensor] = []
        needs_reference = self.loss.needs_reference
        if needs_reference and self._reference_source == "pass":
            with self.serving(self._reference.on_device()), phase(Phase.REFERENCE):
                reference = self.log_probs(batch)
        elif needs_reference and self._reference_source == "rollouts":
            reference = [microbatch.rollout_log_probs for microbatch in microbatches]
        if reference:  # on the last stage
            pairs = zip(microbatches, reference, strict=True)
            microbatches = tuple(replace(microbatch, reference_log_probs=scored) for microbatch, scored in pairs)
        split = [index for index, microbatch in enumerate(microbatches) if any(microbatch.split.tolist())]
        if split or batch.num_spread_groups:
            with phase(Phase.SPREAD):
                found = self._with_split_groups(batch, [microbatches[index] for index in split])
            known = dict(zip(split, found, strict=False))  # none off the last stage
            microbatches = tuple(known.get(index, microbatch) for index, microbatch in enumerate(microbatches))
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize(self.parallel.device)  # so that its time is known
        return replace(batch, microbatches=microbatches)

    def _with_split_groups(self, batch: Batch, rows: list[Microbatch]) -> list[Microbatch]:
        """These rows of the batch, with all its split groups, with the gradients of those groups on the last stage; off it
        nothing."""
        own: list[torch.Tensor] = []
        if rows:
            padding = [empty_microbatch(self._row_multiple)] * (-len(rows) % self._rows_together)
            scored = replace(batch, microbatches=(*rows, *padding))
            own = self.log_probs(scored, with_squares=self.loss.needs_squares)[: len(rows)]
        if not self.parallel.is_last_stage:
            return []
        if self.loss.needs_squares:
            rows = [replace(row, log_square_probs=both[1]) for row, both in zip(rows, own, strict=True)]
            own = [both[0] for both in own]
        if self.loss.needs_reference and self._reference_source == "policy":
            rows = [replace(row, reference_log_probs=log_probs) for row, log_probs in zip(rows, own, strict=True)]
        spread, rows = rows[: batch.num_spread_rows], rows[batch.num_spread_rows :]
        there: list[Microbatch] = []
        if batch.num_spread_groups:
            here = self.parallel
            there = precompute_spread_groups(self.loss, spread, own[: len(spread)], here.device, here.dp_group)
        found = self.loss.precompute_split_groups([self._rows(row)[0] for row in rows], own[len(spread) :]) if rows else []
        return there + [with_scores(row, with_gradients) for row, with_gradients in zip(rows, found, strict=True)]

    @torch.no_grad()
    def log_probs(self, batch: Batch, *, with_squares: bool = False) -> list[torch.Tensor]:
        """Token log-probs [T] (float32, 0 where the target is IGNORED) of every microbatch, at the configuration's
        log_prob_temperature; empty off the last stage. `with_squares`: [2, T], with `log_square_probs` below them.

        Collective over the pipeline's ranks.
        """

        def collect(output: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
            log_probs_of = self._on_last_stage()
            log_probs, _ = log_probs_of(output, microbatch)
            if not with_squares:
                return log_probs.sum(), log_probs
            return log_probs.sum(), torch.stack([log_probs, log_probs_of.log_squares(output, microbatch)])

        return self.run(batch, collect, forward_only=True)

    def add_gradient(self, batch: Batch) -> None:
        """Adds the gradient of a part of the step, scored, which another part follows: of the loss before it is divided by what
        the whole step counts, and on this data-parallel rank alone. `train_step` of the last part reduces and divides the sum.

        Collective over the pipeline's and the tensor-parallel ranks.
        """
        self._begin()
        self._config.finalize_model_grads_func = None
        try:
            self._parts += self._backward(undivided(batch))
        finally:
            self._config.finalize_model_grads_func = _finalize
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize(self.parallel.device)  # so that its time is known

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on a scored batch, or on the last part of one whose other parts `add_gradient` was given, with the
        counts of the whole step; a gradient of 0 moves nothing. Returns loss, gradient norm before clipping, learning rate,
        whether the weights moved, tokens computed and saved, and the loss's metrics by name, over all microbatches and
        data-parallel ranks, equal on every rank.

        Collective over all ranks. NumericsError on every rank, with the weights untouched, when the loss or the
        gradient norm is not finite.
        """
        in_parts = self._begun
        self._begin()
        parts = self._parts + self._backward(undivided(batch) if in_parts else batch)
        self._begun, self._parts = False, []
        self._fp8.advance()
        loss, num_tokens, *totals = self._total(parts).tolist()
        if in_parts:
            scale = 1.0 / self.loss.denominator(batch)
            loss *= scale
            for chunk in self._chunks:
                chunk.scale_gradients(scale)
        if not math.isfinite(loss):
            raise NumericsError(
                f"step {batch.step}: the loss must be finite; found {loss}: lower optimizer.learning_rate or raise "
                f"optimizer.eps, and resume from the last checkpoint"
            )
        with phase(Phase.OPTIMIZER):
            grad_norm, learning_rate, updated = self._optimizer.apply(batch.step)
        metrics = {
            LOSS.name: loss,
            GRAD_NORM.name: grad_norm,
            LEARNING_RATE.name: learning_rate,
            UPDATED.name: float(updated),
            NUM_TOKENS.name: num_tokens,
            SHARED.name: batch.num_saved_tokens / max(1, batch.num_sequence_tokens),
        }
        names = part_reductions(self.loss.metrics)
        known = dict(zip(names, totals, strict=True)) | {"target_tokens": float(batch.num_target_tokens)}
        return metrics | {metric.name: metric.value(known[metric.name], known) for metric in self.loss.metrics}

    def _begin(self) -> None:
        """Gradient buffers of 0, unless a part of the step is in them."""
        if self._begun:
            return
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=False)  # where they were given back
            chunk.zero_grad_buffer()
        self._begun = True

    def _backward(self, batch: Batch) -> list[torch.Tensor]:
        """Adds the batch's gradient to the buffers. On the last stage of every microbatch its loss, its tokens, and its part of
        each metric [2 + K]."""
        names = list(part_reductions(self.loss.metrics))
        from_policy = self.loss.needs_reference and self._reference_source == "policy"

        def lose(output: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
            log_probs_of = self._on_last_stage()
            coefficients = self.loss.coefficients(microbatch) if log_probs_of.fused else None
            if self.loss.needs_squares:
                microbatch = replace(microbatch, log_square_probs=log_probs_of.log_squares(output, microbatch))
            log_probs, entropy = log_probs_of(output, microbatch, coefficients, with_entropy=self.loss.needs_entropy)
            if from_policy and microbatch.reference_log_probs is None:
                microbatch = replace(microbatch, reference_log_probs=log_probs.detach())
            loss, parts = self.loss(log_probs, microbatch, batch, entropy)
            num_tokens = loss.new_full((), float(microbatch.token_ids.numel()))
            return loss, torch.stack([loss.detach(), num_tokens, *(parts[name] for name in names)])

        return self.run(batch, lose, forward_only=False)

    def files(
        self, plan: Sequence[ExportFile], *, of: Literal["policy", "reference"] = "policy"
    ) -> dict[int, dict[str, torch.Tensor]]:
        """Host copies of a set's full tensors in those files of the plan that this rank writes (`Gathering.files`). As
        collective as that."""
        return self.gathering.files(plan, self._tables[of])

    @contextmanager
    def serving(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        """Runs the model on other weights of the same shapes, by pointer; the policy's own come back at the end."""
        own = {name: behind(parameter) for name, parameter in self._own.items()}
        for name, parameter in self._own.items():
            parameter.data = weights[name]
        try:
            yield
        finally:
            for name, parameter in self._own.items():
                parameter.data = own[name]

    def run(self, batch: Batch, loss_of: LossOf, *, forward_only: bool) -> list[torch.Tensor]:
        """Drives megatron's schedule over the microbatches; what `loss_of(output, microbatch)` collects comes back in
        order on the last stage, nothing elsewhere. The output is that of the microbatch's `target_positions`: logits
        [L, V_local], or with trainer.fused_lm_head hidden states [L, H]. Collective over the pipeline's ranks.

        The backward adds the gradient of each microbatch's scalar, undivided, into the chunks' gradient buffers.
        """

        def forward_step(microbatches: Iterator[Microbatch], chunk: Any) -> tuple[torch.Tensor, Any]:
            microbatch, row = self._rows(next(microbatches))
            token_ids, position_ids = microbatch.token_ids[None], microbatch.position_ids[None]
            output = chunk(token_ids, position_ids, None, packed_seq_params=row)
            return output, partial(finish, microbatch)

        def finish(microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            loss, collected = loss_of(output.squeeze(0), microbatch)
            return loss, torch.ones((), dtype=torch.int, device=loss.device), collected

        iterators = [iter(batch.microbatches) for _ in self._chunks]
        single = len(self._chunks) == 1
        with self._fp8.untouched() if forward_only else nullcontext():
            collected: list[torch.Tensor] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators[0] if single else iterators,
                model=self._chunks[0] if single else self._chunks,
                num_microbatches=len(batch.microbatches),
                seq_length=1,  # ignored: lengths vary
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return collected

    def _on_last_stage(self) -> TargetLogProbs:
        assert self._target_log_probs is not None, "log-probs off the last stage"
        return self._target_log_probs

    def _total(self, collected: list[torch.Tensor]) -> torch.Tensor:
        """Over microbatches, then over data-parallel ranks, the sum, or of a metric that says so the maximum; the last stage's
        reaches all stages. [2 + K]"""
        largest = [False, False, *(reduce == "max" for reduce in part_reductions(self.loss.metrics).values())]
        parts = torch.stack(collected) if collected else torch.zeros(0, len(largest), device=self.parallel.device)
        total = torch.zeros(len(largest), dtype=torch.float64, device=self.parallel.device)
        for part in collected:
            total += part
        dist.all_reduce(total, group=self.parallel.dp_group)
        dist.all_reduce(total, group=self.parallel.pp_group)  # zeros but for the last stage
        if any(largest):
            most = torch.cat([parts, torch.full_like(total, -math.inf).to(parts).unsqueeze(0)]).amax(0).double()
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.parallel.dp_group)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.parallel.pp_group)
            (of_largest,) = to_device([torch.tensor(largest)], total.device)
            total = torch.where(of_largest, most, total)
        return total


def _with_gradients(models: Sequence[Any], config: Any, trainer: Trainer) -> list[DistributedDataParallel]:
    """The chunks with their gradient buffers; with overlap_gradients their reductions begin in the backward."""
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=trainer.distributed_optimizer,
        grad_reduce_in_fp32=trainer.gradient_dtype == "float32",
        overlap_grad_reduce=trainer.overlap_gradients,
    )
    chunks = [DistributedDataParallel(config, options, model) for model in models]
    if trainer.overlap_gradients:
        (chunk,) = chunks
        config.no_sync_func, config.grad_sync_func = chunk.no_sync, chunk.start_grad_sync
    return chunks


def _finalize(chunks: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """megatron's gradient reductions without its division by tokens: the loss carries its own denominator."""
    finalize_model_grads(chunks, None, **options)
