"""The policy on this trainer rank: scores batches with the reference, takes optimizer steps through megatron's
schedules, and hands out its weights and its state. It draws no data, samples nothing and writes no file.

Shape legend: T tokens of a packed row, L of them with a target, V_local vocabulary columns of this rank, H hidden, K metrics of
the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
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

from engine.algorithms.base import Loss, Slopes, undivided
from engine.config.load import Copy, RunConfig
from engine.core.errors import CheckpointError, NumericsError
from engine.core.metrics import part_reductions
from engine.core.types import Batch, Microbatch
from engine.megatron import build
from engine.megatron.fp8.delayed_scaling import Fp8Memory
from engine.megatron.fp8.parameters import Weights, behind, copied, forget_initial, in_fp8, load, scale
from engine.megatron.libraries import check_libraries
from engine.megatron.metrics import GRAD_NORM, LEARNING_RATE, LOSS, NUM_TOKENS, SHARED, UPDATED
from engine.megatron.moving import Rows, with_scores
from engine.megatron.optimizer import PolicyOptimizer
from engine.megatron.overlap import open_buffers
from engine.megatron.packing import empty_microbatch
from engine.megatron.parallel_state import ParallelState
from engine.megatron.reshard import SavedOptimizer
from engine.megatron.spread import precompute_spread_groups
from engine.megatron.timers import Timers
from engine.megatron.weight_gradients import add_by_torch
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.hf import HfCheckpoint
from engine.models.registry import family_of
from engine.observe.profiling.phases import Phase, phase
from engine.observe.telling import BYTES, activity
from engine.ops import Coefficients, lm_head_log_probs, log_square_probs, to_device, token_log_probs

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
        axes: layout.TrainerLayout,
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
        self._family = family_of(self.shape)
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._config = build.megatron_config(self.shape, self.layout, config.trainer, self.dtype)
        self._config.finalize_model_grads_func = _finalize
        self._config.timers = Timers()
        self._headless = config.trainer.fused_lm_head
        self._temperature = config.log_prob_temperature
        self._row_multiple = config.trainer.row_multiple
        self._rows_together = config.trainer.pipeline_parallel if config.trainer.virtual_pipeline > 1 else 1
        self._float32_head = config.model.head == "float32"
        if fuses := config.trainer.fuses_accumulation:
            add_by_torch()
        widest = config.trainer.gradient_dtype == "float32"
        self._head_adds = fuses and widest  # its weight's gradient to the gradient buffer itself, as the layers do
        open_buffers(config.trainer, self.shape.hidden, self.dtype)
        models = build.build_chunks(self.shape, self._config, parallel, headless=self._headless)
        checkpoint = HfCheckpoint(checkpoint_path)
        build.load_all(models, self.shape, self.layout, checkpoint, parallel)
        self._held = [self._slices_of(tp_rank) for tp_rank in range(parallel.tp_size)]
        distributed = config.trainer.distributed_optimizer
        options = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            grad_reduce_in_fp32=config.trainer.gradient_dtype == "float32",
            overlap_grad_reduce=config.trainer.overlap_gradients,
        )
        self._chunks = [DistributedDataParallel(self._config, options, model) for model in models]
        if shares_device:
            self.give_back_gradients()
        if config.trainer.overlap_gradients:
            (chunk,) = self._chunks
            self._config.no_sync_func, self._config.grad_sync_func = chunk.no_sync, chunk.start_grad_sync
        self._output_weight = build.output_weight(models[-1]) if parallel.is_last_stage else None
        self._fp8 = Fp8Memory(self._config, models)
        self._own = dict(pair for model in models for pair in build.named_parameters(model))
        self.parameters = Weights(self._own)
        names = {parameter: self._family.local_name(name) for name, parameter in self._own.items()}
        recipe = self._config.fp8_recipe if self._config.fp8_param else None
        self._optimizer = PolicyOptimizer(
            config.optimizer, self._chunks, names, dtype=self.dtype, distributed=distributed, fp8_recipe=recipe
        )
        self._optimizer_makes_room = config.optimizer.memory_while_sampling == "host"
        if shares_device and self._optimizer_makes_room:
            self._optimizer.to_host()
        forget_initial(self._own.values())
        self._begun = False  # whether the gradient buffers hold a part of the step (add_gradient)
        self._parts: list[torch.Tensor] = []  # what that part's microbatches gave back
        self._reference: dict[str, torch.Tensor] = {}
        self._reference_mix = config.sync.reference_mix
        self._reference_on_host = config.trainer.reference_memory == "host"
        self._reference_source = config.reference_source
        needs_pass = loss.needs_reference and self._reference_source == "pass"
        if needs_pass if copies is None else "reference" in copies:
            self._reference = self._reference_of_policy()
        still = self._reference if config.sync.reference == "never" else {}  # one that never moves is the seed's weights too
        self._seed = self._copy() if copies is not None and "seed" in copies else still

    @property
    def has_reference(self) -> bool:
        """Whether it keeps a reference beside the policy."""
        return bool(self._reference)

    @property
    def holds_seed(self) -> bool:
        """Whether it keeps the seed model's weights, to be published again."""
        return bool(self._seed)

    def refresh_reference(self) -> None:
        """Makes the reference, where one is kept, a copy of the policy as it is now, or with sync.reference_mix = m its own
        weights times 1 - m plus the policy's times m, in place, each number rounded once."""
        if not self._reference:
            return
        if self._reference_mix < 1:
            with torch.no_grad():
                for name, parameter in self._own.items():
                    reference = self._reference[name]
                    reference.lerp_(parameter.detach().to(reference.device), self._reference_mix)
        else:
            self._reference = self._reference_of_policy()

    def _reference_of_policy(self) -> dict[str, torch.Tensor]:
        """A copy of the policy where the reference stands; on the host in the memory of the one before."""
        if not self._reference_on_host:
            return self._copy()
        pinned = self.parallel.device.type == "cuda"
        places = dict(self._reference)
        for name, parameter in self._own.items():
            if name not in places:
                places[name] = torch.empty_like(parameter.data, device="cpu", pin_memory=pinned)
            places[name].copy_(parameter.data)
        return places

    def _reference_to_serve(self) -> dict[str, torch.Tensor]:
        """The reference on the device: itself, or a copy for as long as somebody has it."""
        if not self._reference_on_host:
            return self._reference
        return {name: tensor.to(self.parallel.device, copy=True) for name, tensor in self._reference.items()}

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

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: copied(parameter) for name, parameter in self._own.items()}

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
            with self.serving(self._reference_to_serve()), phase(Phase.REFERENCE):
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
            log_probs, _ = self._token_log_probs(output, microbatch)
            return log_probs.sum(), torch.stack(
                [log_probs, self._log_square_probs(output, microbatch)]
            ) if with_squares else log_probs

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
            coefficients = self.loss.coefficients(microbatch) if self._headless else None
            if self.loss.needs_squares:
                microbatch = replace(microbatch, log_square_probs=self._log_square_probs(output, microbatch))
            log_probs, entropy = self._token_log_probs(output, microbatch, coefficients, with_entropy=self.loss.needs_entropy)
            if from_policy and microbatch.reference_log_probs is None:
                microbatch = replace(microbatch, reference_log_probs=log_probs.detach())
            loss, parts = self.loss(log_probs, microbatch, batch, entropy)
            num_tokens = loss.new_full((), float(microbatch.token_ids.numel()))
            return loss, torch.stack([loss.detach(), num_tokens, *(parts[name] for name in names)])

        return self.run(batch, lose, forward_only=False)

    @torch.no_grad()
    def gather(
        self, bucket: layout.ExportBucket, weights: Mapping[str, torch.Tensor] | None = None
    ) -> list[tuple[str, torch.Tensor]] | None:
        """The bucket's full Hugging Face tensors, copied, on the rank of its stage that it names; None on every other rank.
        `weights`: this rank's shards of another set than the policy's.

        Collective over the tensor-parallel ranks of that stage in that data-parallel replica; others return at once.
        """
        here = self.parallel
        if here.pp_rank != bucket.stage or here.dp_rank != bucket.dp_rank:
            return None
        shards = self.parameters if weights is None else Weights(weights)
        slices = [[p for meta in bucket.tensors for p in held.get(meta.name, ())] for held in self._held]
        flat = torch.empty(max(sum(p.rows * p.cols for p in held) for held in slices), dtype=self.dtype, device=here.device)
        for name, group in groupby(_parts(slices[here.tp_rank], flat), key=lambda pair: pair[0].parameter):
            shard = shards[name]
            for p, part in group:
                part.copy_(layout.matrix_slice(shard, p.shard_row, p.shard_col, p.rows, p.cols))
        gathered = [flat]
        if here.tp_size > 1:
            receives = here.tp_rank == bucket.tp_rank
            gathered = [torch.empty_like(flat) for _ in range(here.tp_size)] if receives else []
            dist.gather(flat, gathered or None, group=here.tp_group, group_dst=bucket.tp_rank)
        if here.tp_rank != bucket.tp_rank:
            return None
        full = {meta.name: torch.empty(meta.shape, dtype=self.dtype, device=here.device) for meta in bucket.tensors}
        for held, received in zip(slices, gathered, strict=True):
            for p, part in _parts(held, received):
                layout.matrix_slice(full[p.name], p.row, p.col, p.rows, p.cols).copy_(part)
        return list(full.items())

    def files(
        self, plan: Sequence[layout.ExportFile], *, of: Literal["policy", "reference"] = "policy"
    ) -> dict[int, dict[str, torch.Tensor]]:
        """Host copies of the full tensors in those files of the plan that this rank writes, by the file's place in the plan.

        Collective over the tensor-parallel ranks of each stage and data-parallel replica.
        """
        weights = self._tables()[of]
        found: dict[int, dict[str, torch.Tensor]] = {}
        for index, file in enumerate(plan):
            for bucket in file.buckets:
                for name, full in self.gather(bucket, weights) or ():
                    found.setdefault(index, {})[name] = full.cpu()
        return found

    def state_from(self, saved: SavedOptimizer) -> dict[str, torch.Tensor]:
        """What `load_checkpoint` takes on this rank, of a state that ranks of another layout wrote."""
        return saved.state_of(self.layout, self.parallel.tp_rank, self.parallel.pp_rank, self._optimizer.slots)

    def _tables(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """The tensors of the state that are there from the start, by what the names in it begin with."""
        return {"policy": self._own, "reference": self._reference, "fp8": self._fp8.tensors}

    def state(self, *, weights: bool = True) -> dict[str, torch.Tensor]:
        """CPU copies of all this rank needs to continue bit for bit: weights, reference, optimizer, FP8 scales. Local shards,
        named as in megatron-core's local spec whatever trainer.layers is; in the model's dtype, with their scales beside them
        where they are kept in FP8. Without `weights`, what `load_checkpoint` needs beside files of the weights."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self._state(weights)}

    def _state(self, weights: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """One tensor at a time: one in FP8 is dequantized at every access."""
        for prefix, table in self._tables().items():
            held = Weights(table)
            for name, value in table.items():
                local = self._family.local_name(name)
                if weights or prefix == "fp8":
                    yield f"{prefix}.{local}", held[name]
                if in_fp8(value):
                    yield f"{prefix}_scale.{local}", scale(value)
        for name, value in self._optimizer.state().items():
            yield f"optimizer.{name}", value

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continues from what `state` returned on this rank of the same layout; CheckpointError names what differs."""
        for prefix, own in self._tables().items():
            self._load_table(prefix, own, tensors)
        self._load_optimizer(tensors)

    @torch.no_grad()
    def load_checkpoint(
        self, tensors: dict[str, torch.Tensor], policy: HfCheckpoint, reference: HfCheckpoint | None = None
    ) -> None:
        """Continues from what `state(weights=False)` returned on this rank of the same layout, and from the policy's and the
        reference's weights; without the latter the reference stays the model that this policy was made from.
        CheckpointError names what differs."""
        self._read("policy", policy, tensors)
        if reference is not None and self._reference:
            self._read("reference", reference, tensors)
        self._load_table("fp8", self._fp8.tensors, tensors)
        self._load_optimizer(tensors)

    def _read(self, prefix: str, checkpoint: HfCheckpoint, tensors: dict[str, torch.Tensor]) -> None:
        """Fills a set of weights from a Hugging Face folder; one in FP8 is put together in the host's memory."""
        table = self._tables()[prefix]
        places = {
            name: torch.empty(value.shape, dtype=self.dtype) if in_fp8(value) else value.data for name, value in table.items()
        }
        held = layout.shard_slices(self.shape, self.layout, self.parallel.tp_rank, self.parallel.pp_rank)
        num_bytes = sum(part.rows * part.cols for part in held) * self.dtype.itemsize
        with activity("weights", f"of the {prefix}", total=num_bytes, unit=BYTES) as reading:
            build.read_slices(places, held, layout.tensors(self.shape), checkpoint, reading)
        for name, value in table.items():
            if in_fp8(value):
                load(value, places[name], tensors.get(f"{prefix}_scale.{self._family.local_name(name)}"))

    def _load_table(self, prefix: str, table: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        for name, value in table.items():
            key = f"{prefix}.{self._family.local_name(name)}"
            saved = tensors.get(key)
            if saved is None or saved.shape != value.shape or saved.dtype != value.dtype:
                raise CheckpointError(
                    f"trainer state must hold {key} as {list(value.shape)} {value.dtype}; found "
                    f"{'nothing' if saved is None else f'{list(saved.shape)} {saved.dtype}'}: resume with the "
                    f"configuration that saved it"
                )
            load(value, saved, tensors.get(f"{prefix}_scale.{self._family.local_name(name)}"))

    def _load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        prefix = "optimizer."
        self._optimizer.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

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

    def _token_log_probs(
        self,
        output: torch.Tensor,
        microbatch: Microbatch,
        coefficients: torch.Tensor | Slopes | None = None,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(log-probs [T], 0 where the target is IGNORED, entropy [T] likewise) of the model's output at `target_positions`."""
        assert self._output_weight is not None, "log-probs off the last stage"
        vocabulary = self._vocabulary
        positions = microbatch.target_positions
        targets = microbatch.targets[positions]
        with phase(Phase.LOG_PROBS):
            if not self._headless:
                log_probs, entropy = token_log_probs(output, targets, with_entropy=with_entropy, **vocabulary)
                return _spread(log_probs, microbatch), None if entropy is None else _spread(entropy, microbatch)
            assert not with_entropy, "the configuration allows no entropy with trainer.fused_lm_head"
            log_probs = lm_head_log_probs(
                output,
                self._output_weight,
                targets,
                coefficients=_at(positions, coefficients),
                float32_logits=self._float32_head,
                into_main_grad=self._head_adds,
                **vocabulary,
            )
            return _spread(log_probs, microbatch), None

    def _log_square_probs(self, logits: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        assert not self._headless, "the configuration allows no weights of pairs with trainer.fused_lm_head"
        with phase(Phase.LOG_PROBS):
            return _spread(log_square_probs(logits, **self._vocabulary), microbatch)

    @property
    def _vocabulary(self) -> dict[str, Any]:
        """Which columns of the logits this rank has, and what they are divided by."""
        assert self._output_weight is not None, "log-probs off the last stage"
        return {
            "vocab_start": self.parallel.tp_rank * self._output_weight.size(0),
            "num_valid": self.shape.vocab_size,
            "group": self.parallel.tp_group,
            "temperature": self._temperature,
        }

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

    def _slices_of(self, tp_rank: int) -> dict[str, list[layout.ShardSlice]]:
        """What a tensor-parallel rank of this stage holds of each Hugging Face tensor."""
        held: dict[str, list[layout.ShardSlice]] = {}
        for part in layout.shard_slices(self.shape, self.layout, tp_rank, self.parallel.pp_rank):
            held.setdefault(part.name, []).append(part)
        return held


def _parts(slices: Iterable[layout.ShardSlice], flat: torch.Tensor) -> Iterator[tuple[layout.ShardSlice, torch.Tensor]]:
    """Each slice with its view [rows, cols] of a flat message that holds them one after another."""
    start = 0
    for part in slices:
        size = part.rows * part.cols
        yield part, flat[start : start + size].view(part.rows, part.cols)
        start += size


def _finalize(chunks: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """megatron's gradient reductions without its division by tokens: the loss carries its own denominator."""
    finalize_model_grads(chunks, None, **options)


def _at(positions: torch.Tensor, coefficients: torch.Tensor | Slopes | None) -> Coefficients | None:
    """What a loss says of all tokens, of those at these positions [L]."""
    if coefficients is None:
        return None
    if isinstance(coefficients, torch.Tensor):
        return coefficients[positions]
    slopes = coefficients
    return lambda rows, log_probs: slopes(positions[rows], log_probs)


def _spread(values: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """Values [L] at the positions with a target, 0 at all others: [T]."""
    row = torch.zeros(microbatch.targets.shape, dtype=values.dtype, device=values.device)
    return row.index_copy(0, microbatch.target_positions, values)
