"""How long an optimizer step takes: floating-point operations of the rows as they are packed, through the pipeline's schedule,
and what all ranks do together after the last backward. Nothing runs; the model's sizes, the layout and the constants decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields

from engine.capacity.kv_cache import item_bytes
from engine.capacity.memory import TrainerState
from engine.capacity.resolved import Resolved
from engine.config.options import LOSSES
from engine.forecast.constants import Constants
from engine.forecast.rows import RankRows, Rows, RowSize
from engine.megatron.outlines import Outline
from engine.megatron.pipeline import Operation, replay, replay_forward
from engine.models.headers import num_elements
from engine.models.sharding import stage_layers

FORWARD_AND_BACKWARD = 3  # forwards: a backward is two
REPLAYED_RANKS = 4  # of most work, of which the slowest is sought
FUSED_HEAD_BYTES = {
    "float32": 4
}  # spared of a parameter of the output layer by trainer.fused_lm_head, or more: docs/kernels.md
COLLECTIVES = 2  # sums of a layer's forward over tensor-parallel ranks


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """What an optimizer step is made of; seconds that add up to the step. Compute is what the mean rank computes."""

    reference: float = 0.0  # the reference's forward
    again: float = 0.0  # the policy's own forward first of groups that are split over rows or ranks
    compute: float = 0.0  # forward and backward
    imbalance: float = 0.0  # by which the fullest data-parallel rank computes longer than the mean
    pipeline: float = 0.0  # stages wait for each other
    tensor_parallel: float = 0.0  # sums over tensor-parallel ranks that nothing hides
    gradients: float = 0.0  # reduced as far as no backward hides it, and parameters gathered
    optimizer: float = 0.0
    fixed: float = 0.0  # what a step costs whatever its rows

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A step as replayed."""

    seconds: StepSeconds
    model_flops: float  # of forward and backward of its tokens, over all ranks, nothing computed twice
    row_fill: float  # tokens of the rows over what they would hold
    num_rows: int  # of each rank, empty ones too
    empty_rows: float  # share of all rows
    imbalance: float  # work of the fullest data-parallel rank over the mean


class Training:
    """The trainer of a run, for any step of it."""

    def __init__(self, spec: Resolved, constants: Constants, rows: Rows | None = None) -> None:
        """`rows`: laid out before."""
        self._spec, self._constants, self._rows = spec, constants, rows or Rows()
        self._trainer = t = spec.config.trainer
        shape, self._layers = spec.shape, stage_layers(spec.shape, spec.trainer)
        self._head = shape.vocab_size * shape.hidden
        embedding = 0 if shape.tied else self._head
        self._per_layer = (num_elements(shape) - embedding - self._head) / shape.num_layers
        self._peak = constants.peak_teraflops * 1e12 * constants.train_peak_share * t.tensor_parallel
        self._fp8 = constants.fp8_factor if t.fp8 != "none" else 1.0
        self._item = item_bytes(spec.config.model.dtype)
        self._num_stages, self._num_chunks = t.pipeline_parallel, t.virtual_pipeline
        self._needs_reference = "reference" in spec.copies
        self._cuts_groups = LOSSES.load(spec.config.algorithm.loss).splits_groups()

    def step(self, outlines: Many[Outline]) -> TrainingStep:
        """Of these training sequences. ConfigError when one exceeds trainer.microbatch_tokens."""
        ranks = self._rows.of_step(outlines, self._trainer, self._spec.shape.attention_cost, cuts_groups=self._cuts_groups)
        work = [self._work(rank) for rank in ranks]
        mean = sum(work) / len(work)
        fullest = sorted(range(len(ranks)), key=lambda rank: -work[rank])[:REPLAYED_RANKS]
        found = {rank: self._of_rank(ranks[rank]) for rank in fullest}
        place = max(found, key=lambda rank: found[rank].total)
        slowest, passes = found[place], FORWARD_AND_BACKWARD + self._trainer.recompute
        rows = [row for rank in ranks for row in rank.rows]
        own = passes * self._busy(ranks[place].rows) - self._spared_of(ranks[place].rows)
        mean_ideal = (passes * self._busy(rows) - self._spared_of(rows)) / len(ranks)
        held, targets, looks = (sum(getattr(row, name) for row in rows) for name in ("held", "targets", "looks"))
        seconds = StepSeconds(
            reference=slowest.reference,
            again=slowest.again,
            compute=mean_ideal,
            imbalance=own - mean_ideal,
            pipeline=slowest.both - own - slowest.collectives,
            tensor_parallel=slowest.collectives,
            gradients=self._gradients(ranks[place].rows[-1]),
            optimizer=self._optimizer(),
            fixed=self._constants.step_seconds,
        )
        return TrainingStep(
            seconds=seconds,
            model_flops=FORWARD_AND_BACKWARD * self._flops(held, targets, looks),
            row_fill=held / (len(rows) * self._trainer.microbatch_tokens),
            num_rows=len(ranks[0].rows),
            empty_rows=sum(row.is_empty for row in rows) / len(rows),
            imbalance=max(work) / mean if mean else 1.0,
        )

    # -- of a data-parallel rank

    def _of_rank(self, rank: RankRows) -> _RankSeconds:
        """Its passes through the pipeline."""
        hop, recompute = self._hop(rank.rows), 1.0 if self._trainer.recompute else 0.0

        def replayed(rows: Many[RowSize], of: Callable[..., float]) -> float:
            forward = [[[self._seconds(row, s, c) for c in range(self._num_chunks)] for s in self._stages] for row in rows]

            def seconds(stage: int, operation: Operation) -> float:
                one = forward[operation.row][stage][operation.chunk]
                together = self._collective(rows[operation.row], stage, operation.chunk)
                if not operation.backward:
                    return one + together
                spared = self._spared(rows[operation.row], stage, operation.chunk)
                return (2.0 + recompute) * one + (1.0 + recompute) * together - spared

            return of(self._num_stages, len(rows), self._num_chunks, seconds, hop)

        chunks = [(row, s, c) for row in rank.rows for s in self._stages for c in range(self._num_chunks)]
        mean_sums = sum(self._collective(*chunk) for chunk in chunks) / self._num_stages
        return _RankSeconds(
            reference=replayed(rank.rows, replay_forward) if self._needs_reference else 0.0,
            again=replayed(self._in_groups(rank.scored), replay_forward) if rank.scored else 0.0,
            both=replayed(rank.rows, replay),
            collectives=(2.0 + recompute) * mean_sums,
        )

    def _in_groups(self, rows: Many[RowSize]) -> list[RowSize]:
        """With empty rows behind, where virtual stages take rows in groups of as many as there are stages."""
        missing = -len(rows) % self._num_stages if self._num_chunks > 1 else 0
        return [*rows, *[RowSize(self._trainer.row_multiple, 0, 0, 0.0)] * missing]

    @property
    def _stages(self) -> range:
        return range(self._num_stages)

    def _busy(self, rows: Many[RowSize]) -> float:
        """Seconds of a forward of these rows on the mean stage."""
        tokens, targets, looks = (sum(getattr(row, name) for row in rows) for name in ("tokens", "targets", "looks"))
        shape = self._spec.shape
        return self._through(shape.num_layers, len(rows), tokens, targets, looks) / self._num_stages

    def _work(self, rank: RankRows) -> float:
        """Operations of a forward of its rows, and of a step's part of that for those scored first."""
        passes = FORWARD_AND_BACKWARD + self._trainer.recompute
        return sum(map(self._forward_flops, rank.rows)) + sum(map(self._forward_flops, rank.scored)) / passes

    def _forward_flops(self, row: RowSize) -> float:
        return self._flops(row.tokens, row.targets, row.looks)

    def _flops(self, tokens: float, targets: float, looks: float) -> float:
        """Of a forward: two for each parameter of a product and token, of the output layer for each target only; four for each
        pair of tokens and element of a head."""
        shape = self._spec.shape
        products = 2 * (self._per_layer * shape.num_layers * tokens + self._head * targets)
        return products + 4 * shape.num_layers * shape.num_heads * shape.head_dim * looks

    def _seconds(self, row: RowSize, stage: int, chunk: int) -> float:
        """Of a row's forward through a model chunk, on each of its tensor-parallel ranks."""
        is_last = stage == self._num_stages - 1 and chunk == self._num_chunks - 1
        return self._through(len(self._layers[stage][chunk]), 1, row.tokens, row.targets if is_last else 0, row.looks)

    def _through(self, num_layers: int, num_rows: int, tokens: float, targets: float, looks: float) -> float:
        """Of a forward of rows with so many tokens, looks, and targets of the output layer, through so many layers."""
        shape = self._spec.shape
        flops = 2 * self._per_layer * num_layers * tokens / self._fp8 + 2 * self._head * targets
        flops += 4 * num_layers * shape.num_heads * shape.head_dim * looks
        return flops / self._peak + num_rows * num_layers * self._constants.layer_row_seconds

    def _spared(self, row: RowSize, stage: int, chunk: int) -> float:
        """Of a row's backward through a model chunk, with trainer.fuse_gradient_accumulation: the passes over its matrices'
        gradients, which the product adds up itself. Without it, which is how the constants are measured, the product writes
        them in the model's type, and megatron-core's hook reads them and adds them to its buffer: the type's bytes, and the
        buffer's twice, at the memory's bandwidth. What the products themselves write is taken to hide behind them either way,
        and launches are not counted. At most half of the backward: short rows are not bound by their products."""
        t = self._trainer
        if not t.fuses_accumulation:
            return 0.0
        buffer = 2 if t.gradient_dtype == "bfloat16" else 4
        each = self._item + 2 * buffer
        spared = each * self._per_layer * len(self._layers[stage][chunk])
        if stage == self._num_stages - 1 and chunk == self._num_chunks - 1:
            spared += self._head * (FUSED_HEAD_BYTES.get(t.gradient_dtype, 0) if t.fused_lm_head else each)
        rate = self._constants.memory_gigabytes_per_second * 1e9 * t.tensor_parallel
        return min(spared / rate, self._seconds(row, stage, chunk))

    def _spared_of(self, rows: Many[RowSize]) -> float:
        """Of the backwards of these rows on the mean stage."""
        if not self._trainer.fuses_accumulation:
            return 0.0
        spared = (self._spared(row, s, c) for row in rows for s in self._stages for c in range(self._num_chunks))
        return math.fsum(spared) / self._num_stages

    def _collective(self, row: RowSize, stage: int, chunk: int) -> float:
        """Of the sums over tensor-parallel ranks in it, that computing does not hide."""
        t, count = self._trainer, len(self._layers[stage][chunk])
        if t.tensor_parallel == 1:
            return 0.0
        moved = 2 * (t.tensor_parallel - 1) / t.tensor_parallel * row.tokens * self._spec.shape.hidden * self._item
        hidden = self._constants.overlap_share if t.overlap_tensor_parallel else 0.0
        each = moved / (self._constants.nvlink_gigabytes_per_second * 1e9) + self._constants.sum_seconds
        return COLLECTIVES * count * each * (1 - hidden)

    def _hop(self, rows: Many[RowSize]) -> float:
        """Of a row's hidden states from stage to stage; of rows of unequal length the mean."""
        if self._num_stages == 1:
            return 0.0
        t, c = self._trainer, self._constants
        within = t.world_size <= self._spec.config.cluster.gpus_per_node
        link = c.nvlink_gigabytes_per_second if within else c.network_gigabytes_per_second
        tokens = sum(row.tokens for row in rows) / len(rows) / (t.tensor_parallel if t.sequence_parallel else 1)
        return c.hop_seconds + tokens * self._spec.shape.hidden * self._item / (link * 1e9)

    # -- of all ranks together

    def _gradients(self, last: RowSize) -> float:
        """Gradients summed over data-parallel ranks, then parameters gathered, of the fullest stage, at the bandwidth that a
        group's members on one node have together. With trainer.overlap_gradients the sum goes on beside the backward of the
        last row, which hides at most a share of it."""
        t, c = self._trainer, self._constants
        if t.data_parallel == 1:
            return 0.0
        held = max(TrainerState(self._spec, stage).num_parameters for stage in self._stages)
        part = (t.data_parallel - 1) / t.data_parallel
        gradient = 2 if t.gradient_dtype == "bfloat16" else 4
        item = 1 if t.fp8_parameters else self._item
        ring = part * held / (self._bus() * 1e9)  # a byte of every parameter once round
        summed = ring * gradient * (1 if t.distributed_optimizer else 2)
        gathered = ring * item if t.distributed_optimizer else 0.0
        if t.overlap_gradients:
            backward = 2 * max(self._seconds(last, stage, 0) for stage in self._stages)
            summed = max(summed * (1 - c.overlap_share), summed - backward)
        return summed + gathered + c.sum_seconds

    def _bus(self) -> float:
        """GB/s of a data-parallel group's ring: NVLink inside a node; between nodes the network cards of its members on one."""
        t, c, gpus = self._trainer, self._constants, self._spec.config.cluster.gpus_per_node
        spread_out = t.tensor_parallel * t.data_parallel > gpus
        if not spread_out:
            return c.nvlink_gigabytes_per_second
        members = max(1, gpus // t.tensor_parallel)
        return min(c.nvlink_gigabytes_per_second, members * c.network_gigabytes_per_second)

    def _optimizer(self) -> float:
        """AdamW reads and writes its state, the gradients and the weights once; what is offloaded on the host."""
        c, share = self._constants, self._spec.config.optimizer.offload_share
        states = [TrainerState(self._spec, stage) for stage in self._stages]
        on_device = max(2 * state.optimizer + (4 + 2 * self._item) * state.on_device for state in states)
        seconds = on_device / (c.memory_gigabytes_per_second * 1e9)
        if share:
            devices = min(self._trainer.world_size, self._spec.config.cluster.gpus_per_node)
            hosted = max(state.host_bytes for state in states) * devices
            seconds += 2 * hosted / (c.host_memory_gigabytes_per_second * 1e9)
        return seconds


@dataclass(frozen=True, slots=True)
class _RankSeconds:
    reference: float
    again: float
    both: float  # forward and backward
    collectives: float

    @property
    def total(self) -> float:
        return self.reference + self.again + self.both


def mean_step(steps: Many[TrainingStep]) -> TrainingStep:
    """Of several steps."""
    count = len(steps)

    def mean(name: str) -> float:
        return math.fsum(getattr(step, name) for step in steps) / count

    parts = {part.name: math.fsum(getattr(step.seconds, part.name) for step in steps) / count for part in fields(StepSeconds)}
    return TrainingStep(
        StepSeconds(**parts),
        mean("model_flops"),
        mean("row_fill"),
        max(step.num_rows for step in steps),
        mean("empty_rows"),
        mean("imbalance"),
    )
