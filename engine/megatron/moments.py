"""The optimizer's state as plain tensors under the names of the model's parameters in megatron-core's local spec, and back:
so that neither the layer spec nor whose AdamW it is shows in a trainer state. It makes no optimizer and takes no step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from engine.core.errors import CheckpointError
from engine.megatron.fp8.parameters import in_fp8

# What an AdamW may keep of a parameter; `master_param` is Transformer Engine's, fp32 weights or their lower 16 bits.
MOMENTS = ("exp_avg", "exp_avg_sq", "master_param")
FP8_PARTS = ("data", "scale_inv")  # of a moment kept in FP8: bytes, and the factor that they are multiplied by
KINDS = (*MOMENTS, *(f"{moment}.{part}" for moment in MOMENTS for part in FP8_PARTS), "step", "main")


@dataclass(frozen=True)
class Slot:
    """One parameter of this rank's optimizer: its name, the AdamW that moves it, and the fp32 weights that lie apart from the
    model's."""

    name: str  # of the model's parameter; with [start:end] where this rank's optimizer has only that part of it
    owner: Any
    key: torch.Tensor  # the parameter as `owner` knows it
    main: torch.Tensor | None  # None where the model's own memory holds the weights, or `owner` keeps them itself

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept of the parameter, by what it is; live tensors. Without moments and step before the first step."""
        held = self.owner.state.get(self.key, {})
        found: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            value = held.get(moment)
            if value is None or value is self.key:  # the hybrid optimizer lists its main weights here too
                continue
            quantized = hasattr(value, "_scale_inv")
            parts = {f"{moment}.{part}": getattr(value, f"_{part}") for part in FP8_PARTS} if quantized else {moment: value}
            found |= parts
        if found:
            step = held["step"] if "step" in held else self._group()["step"]
            found["step"] = torch.as_tensor(step, dtype=torch.float32)
        return found if self.main is None else found | {"main": self.main.data}

    def storages(self) -> Iterator[torch.UntypedStorage]:
        """The memory of what `tensors` gives, but for the count of steps; nothing else lies in it."""
        return (value.untyped_storage() for kind, value in self.tensors().items() if kind != "step")

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what `tensors` gave; CheckpointError when it is of another shape or kind."""
        fused = hasattr(self.owner, "_initialize_state")  # Transformer Engine's: it also keeps a scale beside each moment
        self.owner.state.pop(self.key, None)
        state: dict[str, torch.Tensor] = {}
        if any(moment in tensors or f"{moment}.data" in tensors for moment in MOMENTS):  # an empty one is no state to AdamW
            self.owner.state[self.key] = state
        for moment in MOMENTS:
            whole, data = tensors.get(moment), tensors.get(f"{moment}.data")
            given = data if whole is None else whole
            if given is None:
                continue
            self._check(moment, given)
            if fused:
                self.owner._initialize_state(self.key, moment, True, given.dtype is torch.int16)
                made: Any = state[moment]
                for part in FP8_PARTS if data is not None else ():
                    getattr(made, f"_{part}").copy_(tensors[f"{moment}.{part}"])
                if whole is not None:
                    made.copy_(whole)
            else:
                state[moment] = given.to(self.key.device, copy=True)
        if (self.main is not None) != ("main" in tensors):
            raise CheckpointError(
                f"optimizer tensor {self.name}.main must {'not ' if self.main is None else ''}be there with this "
                f"configuration: resume with the one that saved it"
            )
        if self.main is not None:
            self._check("main", tensors["main"])
            self.main.data.copy_(tensors["main"])
        self._restore_step(tensors.get("step"))

    def _restore_step(self, step: torch.Tensor | None) -> None:
        group = self._group()
        if not isinstance(self.owner, torch.optim.AdamW):  # fused ones count for a whole group
            group.pop("step", None)
            if step is not None:
                group["step"] = int(step)
        elif step is not None:
            on_device = group.get("fused") or group.get("capturable")
            self.owner.state[self.key]["step"] = step.to(self.key.device if on_device else "cpu", copy=True)

    def _check(self, kind: str, value: torch.Tensor) -> None:
        if value.shape != self.key.shape:
            raise CheckpointError(
                f"optimizer tensor {self.name}.{kind} must be {list(self.key.shape)} in this layout; found "
                f"{list(value.shape)}: resume with the layout that saved it"
            )

    def _group(self) -> dict[str, Any]:
        groups: list[dict[str, Any]] = self.owner.param_groups
        return next(group for group in groups if any(one is self.key for one in group["params"]))


def find_slots(optimizer: Any, names: Mapping[torch.nn.Parameter, str]) -> list[Slot]:
    """The slots of one of megatron-core's optimizers; `names` are those of the model's parameters."""
    found = []
    for model, held in _held_for(optimizer):
        name, owner, key = names[model], optimizer.optimizer, held
        if isinstance(optimizer, DistributedOptimizer):
            part = optimizer._get_model_param_range_map(model)["param"]
            name += f"[{part.start}:{part.end}]" if part.size < model.numel() else ""
        if isinstance(owner, HybridDeviceOptimizer):
            key = owner.param_to_inner_param[held]
            owner = next(sub for sub in owner.sub_optimizers if any(key is one for one in _parameters(sub)))
        apart = in_fp8(model) or key.untyped_storage().data_ptr() != model.untyped_storage().data_ptr()
        found.append(Slot(name, owner, key, key if apart else None))
    return found


def _held_for(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Parameters of the model, each with what the optimizer moves for it."""
    if isinstance(optimizer, DistributedOptimizer):
        apart = not optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        models = [*optimizer.model_float16_groups, *optimizer.model_fp32_groups]
        half = optimizer.shard_fp32_from_float16_groups if apart else optimizer.shard_float16_groups
        held = [*half, *optimizer.shard_fp32_groups]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        models = [*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups]
        held = [*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups]
    else:
        models = held = [group["params"] for group in optimizer.optimizer.param_groups]
    for model_group, held_group in zip(models, held, strict=True):
        yield from zip(model_group, held_group, strict=True)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
