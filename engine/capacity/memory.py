"""How many bytes each device of a run will hold at its fullest moment, by component, before anything is launched: a pure
function of the model's sizes and the configuration. It counts what the code keeps, tensor by tensor, as measured on the CPU
(tests/parallel/test_memory.py); what a GPU's libraries take beside torch's tensors are the stated constants below.

Shape legend: T tokens of a full microbatch, H hidden, F feed-forward, Q and K rows of queries and of keys, D head dim, V
vocabulary rows. All sizes are per tensor-parallel rank except T, H and D; under sequence parallelism T is divided by the
tensor-parallel size where noted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from engine.capacity.dealing import dealt_bytes
from engine.capacity.kv_cache import GIB, KvCache, item_bytes, kv_bytes_per_token, reward_cache
from engine.capacity.resolved import Resolved
from engine.config.options import RewardModel, size_bytes
from engine.core.errors import ConfigError
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.checks import check_engine_layout, check_layout
from engine.models.registry import family_of

FP32 = 4
MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}
# Of a process on a GPU, beside torch's tensors. Stated, not measured: 1 GiB for the CUDA context, cuBLAS, cuDNN and the code
# of all kernels, 2 GiB for NCCL's buffers and for what torch's allocator cannot use of its blocks; of vLLM, which keeps it
# while it sleeps, 1 GiB of CUDA graphs.
CONTEXT_BYTES, NCCL_BYTES, GRAPH_BYTES = GIB, 2 * GIB, GIB
SAMPLER_COPIES = 5  # vLLM's float32 rows of the whole vocabulary: logits, log-probs, their sort, probabilities, noise
STAGING_BUCKETS = 2  # that a weight sync keeps of sync.bucket_mebibytes at most
H200_BYTES = 139 * GIB  # what torch calls its memory
ROUNDING_COPIES = 8  # float32, of the elements that an engine rounds to FP8 at once
OVERLAP_BUFFERS = 8  # Transformer Engine's, [T, H] each: of four linear layers, forward and backward

Turn = Literal["training", "sampling"]
Components = dict[str, int]


@dataclass(frozen=True, slots=True)
class Channel:
    """What a weight sync keeps on the fullest trainer rank and engine rank: staging buckets, windows of `ipc`. `contexts`: how
    many engine ranks of other GPUs open memory on the GPU where most do, by its plan; None: not known, as many as may."""

    trainer_bytes: int = 0
    engine_bytes: int = 0
    contexts: int | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device at its fullest moment: bytes by component."""

    name: str
    components: Components

    @property
    def num_bytes(self) -> int:
        """All of them."""
        return sum(self.components.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """The devices of a run. Colocated, the first two of `devices` are the turns of the fullest one."""

    devices: tuple[Device, ...]
    stages: tuple[int, ...]  # bytes of a rank of each pipeline stage while it trains
    host_bytes_per_node: int  # optimizer state and reference kept in the host's memory

    @property
    def fullest(self) -> Device:
        """What decides whether the run fits."""
        return max(self.devices, key=lambda device: device.num_bytes)


def estimate(spec: Resolved, channel: Channel, gpu_bytes: int = H200_BYTES) -> Memory:
    """The memory of a run on GPUs of `gpu_bytes` each, which a KV cache of its own size ('auto') follows. The layouts must fit
    the model (`check_layout`, `check_engine_layout`). A reward model is counted where its sizes are known."""
    config = spec.config
    stages = [trainer_rank(spec, stage, channel) for stage in range(spec.trainer.pp_size)]
    totals = [sum(components.values()) for components in stages]
    worst = max(range(len(stages)), key=totals.__getitem__)
    named = f"stage {worst} of {len(stages)}" if len(stages) > 1 else "trainer rank"
    engine = engine_rank(spec, channel, gpu_bytes) if spec.starts_engines else {}
    devices: tuple[Device, ...] = (Device(f"{named}, training", stages[worst]),)
    if spec.starts_engines and config.inference.placement == "disaggregated":
        devices += (Device("engine rank", engine),)
    elif spec.starts_engines:
        sampling = while_sampling(spec, worst, stages[worst])
        devices = (Device(f"{named}, training", shared(stages[worst], engine, "training")),)
        devices += (Device(f"{named}, sampling", shared(sampling, engine, "sampling")),)
    if spec.reward_shape is not None:
        devices += (Device("reward engine", reward_engine(spec.reward_shape, config.reward_model)),)  # each of them
    if spec.starts_engines and config.inference.quantization != "none":
        devices += (Device("engine rank, loading", _loading(spec, engine)),)
    return Memory(devices, tuple(totals), host_bytes_per_node(spec))


# What an engine keeps while the trainer has its turn.
ASLEEP = ("engine: staging", "engine: CUDA graphs", "engine: context", "other engines: contexts")
LARGEST_FLASH_HEAD = 256  # head dim of torch's flash attention on GPUs
TRANSIENT = ("activations", "recomputed layer", "logits", "workspace")  # what a trainer keeps only in its own turn


def shared(trainer: Components, engine: Components, turn: Turn) -> Components:
    """Trainer and engine on one device. In the training turn the engine sleeps: its weights and KV cache are gone. In the
    sampling turn the trainer, `while_sampling`, holds all but what a step makes and frees."""
    if turn == "training":
        return trainer | {name: size for name, size in engine.items() if name in ASLEEP}
    return {name: size for name, size in trainer.items() if name not in TRANSIENT} | engine


def while_sampling(spec: Resolved, stage: int, trainer: Components) -> Components:
    """What a trainer on an engine's device holds while that samples. Its gradients have no memory then. But they are made, and
    given back, before optimizer and reference are, when an engine may be there already: what they exceed those by counts. With
    optimizer.memory_while_sampling = 'host' the same is true of the optimizer, of which there are the fp32 weights then."""
    gone = {"gradients": trainer["gradients"]}
    if spec.config.optimizer.memory_while_sampling == "host":
        gone["optimizer"] = TrainerState(spec, stage).originals
    later = sum(trainer[name] for name in ("FP8 copies", "reference", "optimizer") if name not in gone)
    return trainer | dict.fromkeys(gone, 0) | {"gradients": max(0, max(gone.values()) - later)}


def trainer_rank(spec: Resolved, stage: int, channel: Channel) -> Components:
    """A trainer rank of a stage at the fullest moment of a step."""
    kept = trainer_kept(spec, stage, channel)
    between = ("weights", "FP8 copies", "reference", "gradients", "optimizer")
    first = {name: kept.pop(name) for name in between}
    return {**first, **Step(spec, stage).fullest, **kept}


def trainer_kept(spec: Resolved, stage: int, channel: Channel) -> Components:
    """What a trainer rank of a stage holds from step to step."""
    held = TrainerState(spec, stage)
    return {
        "weights": held.weights,
        "FP8 copies": held.fp8_copies,
        "reference": held.copies,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "gradient stand-ins": Step(spec, stage).stand_ins,
        "staging": channel.trainer_bytes,
        "context": CONTEXT_BYTES + NCCL_BYTES,
    }


@lru_cache(maxsize=1024)
def _stage_sizes(shape: ModelShape, axes: layout.TrainerLayout, stage: int) -> tuple[int, int]:
    """(elements of a rank of a stage, those of its layers' matrices), asked for again and again in a search."""
    shards = layout.shard_shapes(shape, axes, 0, stage)
    sizes = {name: math.prod(size) for name, size in shards.items()}
    in_layers = sum(size for name, size in sizes.items() if len(shards[name]) == 2 and ".layers." in name)
    return sum(sizes.values()), in_layers


class TrainerState:
    """What a rank keeps from step to step. Tensor ranks of a stage hold equal shapes."""

    def __init__(self, spec: Resolved, stage: int) -> None:
        self._config = spec.config
        self._reference_on_host = spec.config.trainer.reference_memory == "host" and "reference" in spec.copies
        self._num_copies = len(spec.copies) - self._reference_on_host
        self._item = item_bytes(spec.config.model.dtype)
        t = spec.config.trainer
        self.num_parameters, in_layers = _stage_sizes(spec.shape, spec.trainer, stage)
        self._in_fp8 = in_layers if t.fp8 != "none" else 0
        self._shares_device = spec.colocated and "trainer" in spec.parts
        self._shard = -(-self.num_parameters // (t.data_parallel if t.distributed_optimizer else 1))

    @property
    def weights(self) -> int:
        """The model's parameters; where they are kept in FP8, the layers' matrices are a byte each."""
        kept_in_fp8 = self._in_fp8 if self._config.trainer.fp8_parameters else 0
        return (self.num_parameters - kept_in_fp8) * self._item + kept_in_fp8

    @property
    def fp8_copies(self) -> int:
        """Transformer Engine's of the layers' matrices, for both directions that products read them in, kept over a step; one
        of them is the parameters themselves where they are kept in FP8."""
        return (1 if self._config.trainer.fp8_parameters else 2) * self._in_fp8

    @property
    def cast(self) -> int:
        """This rank's share of the layers' matrices in bfloat16, all of which are there until the last is cast after a step."""
        t = self._config.trainer
        return self._item * -(-self._in_fp8 // t.data_parallel) if t.fp8_parameters else 0

    @property
    def copies(self) -> int:
        """The reference, and the seed model's weights where they are kept apart (`Spec.copies`)."""
        return self.weights * self._num_copies

    @property
    def gradients(self) -> int:
        """megatron's buffer, whole on every data-parallel rank."""
        return (FP32 if self._config.trainer.gradient_dtype == "float32" else self._item) * self.num_parameters

    @property
    def widened_gradients(self) -> int:
        """In float32, of what this rank updates: made for the update where they are summed in less."""
        return FP32 * self._shard if self._config.trainer.gradient_dtype != "float32" else 0

    @property
    def scored_with(self) -> int:
        """The reference on the device while it scores, where it is kept in the host's memory."""
        return self.weights if self._reference_on_host else 0

    @property
    def optimizer(self) -> int:
        """What is not offloaded of the share of this data-parallel rank."""
        return self.on_device * self._state_bytes

    @property
    def originals(self) -> int:
        """Of `optimizer`, the float32 weights apart from the model's, which are there before the first step."""
        return self.on_device * (self._state_bytes - 2 * MOMENT_BYTES[self._config.optimizer.moment_dtype])

    @property
    def saved_bytes(self) -> int:
        """What a rank writes into a checkpoint beside weights: its share of the optimizer's state."""
        return self._shard * self._state_bytes

    @property
    def on_device(self) -> int:
        """Parameters whose state this rank keeps on its device."""
        return round(self._shard * (1 - self._config.optimizer.offload_share))

    @property
    def host_bytes(self) -> int:
        """What is offloaded, with the gradients that the host's update reads, before torch rounds pinned blocks up to powers
        of two; a reference that is kept there; and the state that waits there while engines sample."""
        waits = self._shares_device and self._config.optimizer.memory_while_sampling == "host"
        waiting = self.optimizer if waits else 0
        return (self._shard - self.on_device) * (self._state_bytes + FP32) + self.scored_with + waiting

    @property
    def _state_bytes(self) -> int:
        """Of a parameter: two moments, and where the model is narrower its float32 original; of that, with narrow moments and
        no parameters in FP8, the lower half alone."""
        moment = MOMENT_BYTES[self._config.optimizer.moment_dtype]
        whole = moment == FP32 or self._config.trainer.fp8_parameters
        original = FP32 if whole else FP32 - self._item
        return 2 * moment + (original if self._item != FP32 else 0)


def takes_flash(element_bytes: int, head_dim: int) -> bool:
    """Whether torch's flash attention on GPUs takes heads of such elements and size."""
    return element_bytes == 2 and head_dim % 8 == 0 and head_dim <= LARGEST_FLASH_HEAD


def host_bytes_per_node(spec: Resolved) -> int:
    """Optimizer state and reference in the memory of a node full of the stage that holds most."""
    most = max(TrainerState(spec, stage).host_bytes for stage in range(spec.trainer.pp_size))
    return most * min(spec.config.trainer.world_size, spec.config.cluster.gpus_per_node)


class Step:
    """What a step makes and frees again: one microbatch's tensors, and how many microbatches wait for their backward."""

    def __init__(self, spec: Resolved, stage: int, *, on_gpu: bool = True) -> None:
        shape, config = spec.shape, spec.config
        self._spec = spec
        self._config = config
        self._trainer = t = config.trainer
        self._on_gpu = on_gpu
        self._stage = stage
        self._shape = shape
        tp = t.tensor_parallel
        self._e = item_bytes(config.model.dtype)
        self._into_linear = 1 if t.fp8 != "none" else self._e  # bytes of an element that a layer's product saves
        self._T, self._H, self._D = t.microbatch_tokens, shape.hidden, shape.head_dim
        self._T_own = -(-self._T // tp) if t.sequence_parallel else self._T  # tokens of what lies between the products
        self._F = shape.ffn_hidden // tp
        self._heads = shape.num_heads // tp
        self._Q, self._K = self._heads * shape.head_dim, max(1, shape.num_kv_heads // tp) * shape.head_dim
        self._V = layout.padded_vocab(shape, spec.trainer) // tp
        self._layers = len(layout.stage_layers(shape, spec.trainer)[stage][0])
        self._is_first, self._is_last = stage == 0, stage == t.pipeline_parallel - 1
        self._narrow_on_cpu = not on_gpu and self._e != FP32
        self._widened_head = self._e != FP32 and (not on_gpu or spec.config.model.head == "float32")

    @cached_property
    def layer(self) -> int:
        """What one layer keeps of a microbatch for its backward."""
        return self._norms(2) + self._head_norms + self._attention + self._feed_forward

    @property
    def _head_norms(self) -> int:
        """RMSNorms of queries and keys, head by head, in families that have them: what `_norms` keeps of each. Derived from
        megatron-core's code and not measured."""
        if not family_of(self._shape).has_head_norms():
            return 0
        width = self._Q + self._K
        return self._T * (width * self._e + width // self._D * FP32)

    def _norms(self, count: int, into: int | None = None) -> int:
        """RMSNorms, which keep their input and a float32 a token, and the inputs of the products that follow."""
        return count * self._T_own * (self._H * self._e + FP32 + self._H * (into or self._into_linear))

    @property
    def _attention(self) -> int:
        """Fused queries, keys and values; the queries apart, as grouped heads need them; the output, and a log-sum-exp of every
        query and head. Where attention does not rotate by itself, or keys have norms, keys after that too; torch's own
        attention, sequence by sequence, has its output once so and once whole."""
        e, local = self._e, not self._trainer.uses_te
        by_sequence = local and self._on_gpu and not takes_flash(e, self._D) and not self._trainer.shares_prompts
        keys_apart = not local or self._on_gpu or family_of(self._shape).has_head_norms()
        rotated = 2 * self._Q + (3 if keys_apart else 2) * self._K
        output = self._Q * e * (2 if by_sequence else 1) + (self._Q * self._into_linear if self._into_linear != e else 0)
        return self._T * (rotated * e + output + self._heads * FP32)

    @property
    def _feed_forward(self) -> int:
        """Saved for the backward: fc1's output [T, 2F] and SwiGLU's output [T, F]; torch's own operators, which local layers
        take on a GPU, also save silu(gate) [T, F]."""
        factors = 3 if self._on_gpu and not self._trainer.uses_te else 2
        return self._T * self._F * (factors * self._e + self._into_linear)

    @cached_property
    def kept(self) -> int:
        """Of one model chunk and microbatch until its backward: all, or with recomputation each layer's input."""
        each = self._T_own * self._H * self._e if self._trainer.recompute else self.layer
        rotary = 0 if self._trainer.uses_te else self._T * self._D * self._e  # cosines and sines, once a row
        return self._layers * each + rotary

    @property
    def in_flight(self) -> int:
        """Model chunks whose forward waits for its backward: the schedule's warm-up and one more, given enough
        microbatches."""
        t = self._trainer
        behind = t.pipeline_parallel - self._stage - 1
        return behind + 1 if t.virtual_pipeline == 1 else 2 * behind + (t.virtual_pipeline - 1) * t.pipeline_parallel + 1

    @property
    def fullest(self) -> Components:
        """The fullest moment: a layer's backward, log-probs at the last stage, the embedding's gradient, the update, or the
        dealing of the step's sequences, which lie on rank 0's device."""
        waiting = self.in_flight * self.kept
        again = self.layer if self._trainer.recompute else 0  # its output instead of its input, which is kept already
        moments = [(waiting, again, 0, self._layer_backward)]
        if self._is_last:
            moments.append((waiting, 0, *self._head))
        if self._is_first:
            moments.append((waiting - self.kept, 0, 0, self._shape.hidden * self._V * self._e))
        moments.append((0, 0, 0, self._update))
        if not self._on_gpu and self._trainer.distributed_optimizer and self._trainer.data_parallel > 1:
            moments.append((0, 0, 0, TrainerState(self._spec, self._stage).gradients))  # gloo scatters sums from a copy
        if copied := TrainerState(self._spec, self._stage).scored_with:
            logits, rest = self._head if self._is_last else (0, 0)
            moments.append((0, self.layer, logits, rest + copied))
        if self._on_gpu:  # before the first microbatch, when engines that share the device sleep already
            moments.append((0, 0, 0, dealt_bytes(self._spec, on_rank_zero=self._is_first)))
        fullest = max(moments, key=sum)
        return dict(zip(TRANSIENT, (*fullest[:3], fullest[3] + self._buffers), strict=True))

    @property
    def _update(self) -> int:
        """What AdamW makes beside what it keeps: Transformer Engine's both moments in float32 where it keeps them narrower,
        torch's none; gradients in float32 where they are summed in less. Or the weights on their way into FP8."""
        adam = self._config.optimizer
        state = TrainerState(self._spec, self._stage)
        if adam.moment_dtype != "float32":
            return 2 * FP32 * state.on_device
        return max(state.cast, state.widened_gradients)

    @property
    def _layer_backward(self) -> int:
        """The gradients of the residual stream, and of the feed-forward's product and both its factors, when the product is
        gone; or those of gate and up and of their weight, when gate and up are gone too."""
        product = self._T * self._F * self._into_linear
        factors = 3 * self._T * self._F * self._e - product
        weight = 0 if self.stand_ins else 2 * self._F * self._H * self._e
        return self._T_own * self._H * self._e + max(factors, weight + self._whole_rows - product)

    @property
    def _whole_rows(self) -> int:
        """[T, H] that sequence parallelism gathers for a product, and whose gradient it scatters."""
        return 2 * self._T * self._H * self._e if self._trainer.sequence_parallel else 0

    @property
    def _buffers(self) -> int:
        """Kept through a step: megatron's room to gather a sequence in, Transformer Engine's for overlap, and what
        neighbouring stages send, which the first and the last stage have one of."""
        t, rows = self._trainer, self._T * self._H * self._e
        gathered = rows if t.sequence_parallel and not t.uses_te else 0
        at_an_end = (self._is_first or self._is_last) and t.virtual_pipeline == 1
        neighbours = 0 if t.pipeline_parallel == 1 else 1 if at_an_end else 2
        received = neighbours * self._T_own * self._H * self._e
        return gathered + received + (OVERLAP_BUFFERS * rows if t.overlap_tensor_parallel else 0)

    @property
    def stand_ins(self) -> int:
        """What autograd is given in place of weight gradients that products add up themselves. On GPUs Transformer Engine keeps
        one tensor for each shape of a linear layer, its own and megatron-core's, from the first backward until the process
        ends; else it is made and freed as a gradient is."""
        if not self._on_gpu or not self._trainer.fuses_accumulation:
            return 0
        layer = (2 * self._Q + 2 * self._K + 3 * self._F) * self._H
        head = self._V * self._H if self._is_last and not self._trainer.fused_lm_head else 0
        return (layer + head) * self._e

    @property
    def _head(self) -> tuple[int, int]:
        """(logits, the rest) at the last norm, the output layer and its log-probs."""
        norm, rows, weight = self._norms(1, self._e), self._T * self._H * self._e, self._V * self._H * self._e
        gathered = rows if self._trainer.sequence_parallel else 0
        if self._trainer.fused_lm_head:
            from engine.ops import lm_head  # loads torch

            block = lm_head.BLOCK
            widened = 2 * min(block, self._V) * self._H * FP32 if self._widened_head else block * self._H * self._e
            element = FP32 if self._widened_head else self._e
            rows = min(lm_head.rows_at_once(self._T, self._V, element, on_gpu=self._on_gpu), self._T)
            chunk = rows * self._V * element
            added = self._trainer.fuses_accumulation and self._trainer.gradient_dtype == "float32"
            gradients = self._V * self._H * FP32 + (0 if self._e == FP32 or added else weight)
            return chunk, norm + gathered + rows + gradients + (0 if self._e == FP32 else widened)
        logits = self._T * self._V * self._e  # the gradient overwrites them
        return logits, norm + gathered + rows + (0 if self.stand_ins else weight)


def resolve_kv_cache(spec: Resolved) -> KvCache:
    """The KV cache of each rank of the run's engines. Colocated, the trainer holds its own memory beside it; of what a weight
    sync stages, which its plan knows, the most that it may be is counted."""
    i = spec.config.inference
    dtype = i.stored_dtype or spec.config.model.dtype
    staged = STAGING_BUCKETS * (spec.config.sync.bucket_mebibytes << 20) if "trainer" in spec.parts else 0
    return KvCache(
        token_bytes=kv_bytes_per_token(spec.shape, i.tensor_parallel, dtype),
        request_tokens=i.max_model_tokens,
        max_concurrent=i.max_concurrent,
        asked_bytes=size_bytes(i.kv_cache),
        beside_bytes=_beside(spec, Channel(staged, staged)),
    )


def _beside(spec: Resolved, channel: Channel) -> int:
    """Bytes of an engine's GPU that its KV cache cannot have; none are known of a layout that does not fit the model, which the
    preflight refuses."""
    try:
        check_engine_layout(spec.shape, spec.engine)
        shares = spec.colocated and "trainer" in spec.parts
        if shares:
            check_layout(spec.shape, spec.trainer)
        beside = sum(beside_cache(spec, channel).values())
        if shares:
            stages = (while_sampling(spec, stage, trainer_kept(spec, stage, channel)) for stage in range(spec.trainer.pp_size))
            beside += max(sum(kept.values()) for kept in stages)
    except ConfigError:
        return 0
    return beside


def engine_rank(spec: Resolved, channel: Channel, gpu_bytes: int) -> Components:
    """A rank of an engine while it samples."""
    assert spec.kv_cache is not None
    return {"engine: KV cache": spec.kv_cache.num_bytes(gpu_bytes), **beside_cache(spec, channel)}


def beside_cache(spec: Resolved, channel: Channel) -> Components:
    """What a rank of an engine holds beside its KV cache."""
    shape = spec.shape
    i = spec.config.inference
    itemsize = item_bytes(spec.config.model.dtype)
    axes = layout.EngineLayout(i.tensor_parallel)  # also where a sync reloads full tensors: vLLM then repacks its shards
    weights = sum(math.prod(size) for size in layout.shard_shapes(shape, axes, 0).values()) * itemsize
    matrices = layout.layer_matrices(shape, axes) if i.quantization == "fp8" else ()
    each = sum(map(math.prod, matrices))
    weights -= shape.num_layers * (each * (itemsize - 1) - sum(rows for rows, _ in matrices) * FP32)
    forward = i.batched_tokens * (4 * shape.hidden + 3 * shape.ffn_hidden // i.tensor_parallel) * itemsize
    vocabulary = layout.padded_vocab(shape, axes)
    rows = i.max_concurrent * vocabulary * FP32
    widened = spec.config.model.head == "float32" and itemsize != FP32
    return {
        "engine: weights": weights,
        "engine: forward": forward,
        "engine: sampler": SAMPLER_COPIES * rows,
        # A copy of the output layer's weight that is made for every product but on CUDA and ROCm devices; counted on all.
        **({"engine: float32 head": vocabulary // i.tensor_parallel * shape.hidden * FP32} if widened else {}),
        "engine: staging": channel.engine_bytes,
        **({"engine: FP8 staging": _quantizing(spec, matrices, itemsize)} if matrices else {}),
        "engine: CUDA graphs": GRAPH_BYTES,
        "engine: context": CONTEXT_BYTES + (NCCL_BYTES if i.tensor_parallel > 1 else 0),
        "other engines: contexts": CONTEXT_BYTES * (foreign_contexts(spec) if channel.contexts is None else channel.contexts),
    }


def foreign_contexts(spec: Resolved) -> int:
    """How many engine ranks of other GPUs have a CUDA context on the GPU that has most of them: each makes one, for good, where
    it opens the memory of a trainer rank that it takes weights from at a sync. None but where engines share the trainer's GPUs
    and read in place. These are as many as may be: of several replicas near an engine the plan may choose fewer."""
    from engine.bridge.transports.registry import kind_of

    placement, near = spec.placement, spec.colocation
    if not spec.colocated or placement is None or near is None or "trainer" not in spec.parts:
        return 0
    kind = spec.carrier("cuda").kind
    if kind is None or not kind_of(kind).reads_in_place:
        return 0
    t, senders = spec.config.trainer, _senders(spec.shape, spec.trainer, spec.engine)
    found: Counter[tuple[int, int]] = Counter()  # by node and GPU
    for engine, nearest in zip(placement.engines, near.nearest, strict=True):
        for target, gpu in enumerate(engine.gpus):
            opened = {
                (engine.node, placement.ranks[rank].gpus[0])
                for rank in nearest
                if (rank // (t.tensor_parallel * t.data_parallel), rank % t.tensor_parallel) in senders[target]
            }
            found.update(opened - {(engine.node, gpu)})
    return max(found.values(), default=0)


@lru_cache(maxsize=1024)
def _senders(
    shape: ModelShape, trainer: layout.TrainerLayout, engine: layout.EngineLayout
) -> dict[int, frozenset[tuple[int, int]]]:
    """The trainer's (stage, tensor rank)s that send to each tensor rank of an engine."""
    from engine.bridge.plan import senders_to

    return senders_to(shape, trainer, engine)


def _quantizing(spec: Resolved, matrices: Sequence[tuple[int, ...]], itemsize: int) -> int:
    """What an engine with FP8 weights holds beside them at a weight sync: matrices that are not whole or not digested yet, at
    least one of each pipeline stage, which all send at once; what small slices of further ones begin; and what is rounded."""
    from engine.bridge.checksum import AT_ONCE_BYTES  # loads torch
    from engine.ops import fp8

    sizes = [math.prod(size) * itemsize for size in matrices]
    begun = max(fp8.HELD_BYTES, spec.trainer.pp_size * max(sizes))
    return begun + sum(sizes) + AT_ONCE_BYTES + ROUNDING_COPIES * fp8.AT_ONCE * FP32


def _loading(spec: Resolved, engine: Components) -> Components:
    """An engine rank with FP8 weights when it starts: it loads the whole model before it rounds it, beside what the trainer on
    its device keeps."""
    axes, itemsize = layout.EngineLayout(spec.config.inference.tensor_parallel), item_bytes(spec.config.model.dtype)
    loaded = sum(math.prod(size) for size in layout.shard_shapes(spec.shape, axes, 0).values()) * itemsize
    held = {"engine: loaded weights": loaded} | {name: engine[name] for name in ("engine: weights", "engine: context")}
    if not (spec.colocated and "trainer" in spec.parts):
        return held
    stages = (while_sampling(spec, stage, trainer_kept(spec, stage, Channel())) for stage in range(spec.trainer.pp_size))
    return max(stages, key=lambda kept: sum(kept.values())) | held


def reward_engine(shape: ModelShape, options: RewardModel) -> Components:
    """A rank of the reward model's engine while it judges. Both forms have the same tensors: the Llama's without its output
    layer, and a head [1, H] that vLLM keeps in float32. It samples nothing, and no weight sync reaches it."""
    itemsize, tp_size = item_bytes(options.dtype), options.tensor_parallel
    head = family_of(shape).head()
    held = {name: size for name, size in layout.shard_shapes(shape, layout.EngineLayout(tp_size), 0).items() if name != head}
    return {
        "engine: weights": sum(math.prod(size) for size in held.values()) * itemsize + shape.hidden * FP32,
        "engine: KV cache": reward_cache(shape, options).num_bytes(None),
        "engine: forward": options.batched_tokens * (4 * shape.hidden + 3 * shape.ffn_hidden // tp_size) * itemsize,
        "engine: CUDA graphs": GRAPH_BYTES,
        "engine: context": CONTEXT_BYTES + (NCCL_BYTES if tp_size > 1 else 0),
    }
