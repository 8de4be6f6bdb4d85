"""megatron-core's AdamW: made, applied once a step with that step's learning rate, and turned into plain tensors and back. A
step whose gradient is 0 everywhere moves nothing: no weight decay, no momentum. It knows no loss and no schedule of
microbatches; what the learning rate is at a step is config/learning_rates' business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from engine.config import options as tables
from engine.config.learning_rates.registry import learning_rate_of
from engine.core.errors import CheckpointError, NumericsError
from engine.megatron.libraries import chosen_kernels
from engine.megatron.moments import KINDS, Slot, find_slots

MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.uint8}


class PolicyOptimizer:
    """One optimizer of this rank's chunks; with the distributed optimizer it holds this data-parallel rank's share."""

    def __init__(
        self,
        options: tables.Optimizer,
        chunks: list[DistributedDataParallel],
        names: Mapping[torch.nn.Parameter, str],
        *,
        dtype: torch.dtype,
        distributed: bool,
        fp8_recipe: str | None = None,
    ) -> None:
        """`names` are what the chunks' parameters are called in `state`; `fp8_recipe`: megatron's name of the recipe if
        parameters are stored in FP8, else None."""
        self._options = options
        moments = MOMENT_DTYPES[options.moment_dtype]
        offloads = options.offload_share > 0
        settings = OptimizerConfig(
            optimizer="adam",
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.eps,
            clip_grad=options.clip_norm,
            use_distributed_optimizer=distributed,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            fp8_recipe=fp8_recipe,
            # Then the AdamW keeps the fp32 weights itself, and what is offloaded leaves no fp32 copy on the GPU.
            use_precision_aware_optimizer=moments is not torch.float32 or (offloads and dtype is torch.bfloat16),
            exp_avg_dtype=moments,
            exp_avg_sq_dtype=moments,
            optimizer_cpu_offload=offloads,
            optimizer_offload_fraction=options.offload_share,
        )
        self._decoupled: bool = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8  # gradients apart from .grad
        with chosen_kernels(options.implementation):
            self._optimizer: Any = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
        self._slots = [slot for part in self._optimizer.chained_optimizers for slot in find_slots(part, names)]
        self._learning_rate = learning_rate_of(options)
        self._num_steps = 0  # taken or skipped: the place in the schedule
        self._host: dict[str, list[torch.Tensor]] = {}  # by slot, memory of the host for its state, as bytes
        self._away = False  # whether the state is there now

    def to_host(self) -> None:
        """Moves the state to the host's memory and lets its own go, until the next update or `to_device`; every tensor stays
        what it is, without memory. On GPUs the host's memory is pinned, and kept from one time to the next."""
        if not self._away:
            for slot in self._slots:
                self._slot_to_host(slot)
        self._away = True

    def to_device(self) -> None:
        """Brings the state back, to the bit."""
        if self._away:
            for slot in self._slots:
                self._slot_to_device(slot)
        self._away = False

    def _slot_to_host(self, slot: Slot) -> None:
        storages = list(slot.storages())
        if [held.numel() for held in self._host.setdefault(slot.name, [])] != [storage.nbytes() for storage in storages]:
            self._host[slot.name] = [
                torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                for storage in storages
            ]
        for held, storage in zip(self._host[slot.name], storages, strict=True):
            held.copy_(_bytes_of(storage))
            storage.resize_(0)

    def _slot_to_device(self, slot: Slot) -> None:
        for held, storage in zip(self._host[slot.name], slot.storages(), strict=True):
            storage.resize_(held.numel())
            _bytes_of(storage).copy_(held)

    def apply(self, step: int) -> tuple[float, float, bool]:
        """Clips the reduced gradients, moves the weights and returns (gradient norm before clipping, learning rate, whether
        the weights were moved).

        Where the gradient is 0 in every element of every rank, nothing has been learned: weights, moments and AdamW's own
        count stay as they are, and only the place in the learning-rate schedule moves on, which is a function of the step. All
        ranks decide alike, by the norm that they have in common.

        Collective over all ranks. NumericsError, on every rank and with the weights untouched, when the norm is not
        finite.
        """
        self.to_device()
        with chosen_kernels(self._options.implementation):
            found = self._apply(step)
        self._optimizer.zero_grad()  # of gradients in bfloat16 the update has made float32 ones, which nobody needs now
        return found

    def _apply(self, step: int) -> tuple[float, float, bool]:
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise NumericsError(
                f"step {step}: the gradient norm must be finite; found {norm}: lower optimizer.learning_rate or raise "
                f"optimizer.eps, and resume from the last checkpoint"
            )
        learning_rate = self._learning_rate.at(self._num_steps)
        self._num_steps += 1
        if norm == 0.0:
            return norm, learning_rate, False
        parameters = self._optimizer.get_parameters()
        if parameters:
            limit = self._options.clip_norm
            clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=norm, use_decoupled_grad=self._decoupled)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            # megatron leaves 1-d parameters without weight decay by itself
            group["weight_decay"] = self._options.weight_decay * group.get("wd_mult", 1.0)
        self._optimizer.step_with_ready_grads()
        return norm, learning_rate, True

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """What it moves: names of parameters, with [start:end] where it has a part of one only, and the shape it has it in."""
        return {slot.name: tuple(slot.key.shape) for slot in self._slots}

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's moments, step counts, place in the schedule and fp32 weights apart from the model's, by the names of the
        parameters; live tensors, no copies, of the host's memory where the state is there."""
        tensors = {"schedule.step": torch.tensor(self._num_steps)}
        for slot in self._slots:
            held = iter(self._host[slot.name] if self._away else ())
            for kind, value in slot.tensors().items():
                on_host = self._away and kind != "step"
                tensors[f"{slot.name}.{kind}"] = _like(value, next(held)) if on_host else value
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continues from what `state` returned on the same rank of the same layout; CheckpointError when it differs."""
        left = dict(tensors)
        self._num_steps = int(left.pop("schedule.step"))
        for slot in self._slots:
            kinds = [key for kind in KINDS if (key := f"{slot.name}.{kind}") in left]
            if self._away:
                self._slot_to_device(slot)
            slot.restore({key.removeprefix(f"{slot.name}."): left.pop(key) for key in kinds})
            if self._away:
                self._slot_to_host(slot)  # one by one: engines may be there
        if left:
            raise CheckpointError(
                f"optimizer tensor {next(iter(left))} must belong to a parameter of this rank; found none: resume with the "
                f"layout that saved it"
            )
        for part in self._optimizer.chained_optimizers:
            if isinstance(part.optimizer, HybridDeviceOptimizer):
                part.optimizer._sync_sub_optimizers_state_to_hdo()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The memory as uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _like(value: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """A tensor like another whose memory is given back, of the bytes that were copied from it."""
    found = torch.empty(0, dtype=value.dtype)
    return found.set_(held.untyped_storage(), value.storage_offset(), value.shape, value.stride())
