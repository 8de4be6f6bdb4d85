"""The reference as a second set of the policy's weights on this rank: copied from it or mixed with it, on the device or in host
memory. When it moves is the schedule's business; scoring with it policy.py's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.megatron.fp8.parameters import copied


class Reference:
    """The reference's weights, by megatron's names; none before the first `copy`."""

    def __init__(self, policy: Mapping[str, torch.Tensor], device: torch.device, *, on_host: bool, mix: float) -> None:
        """`policy`: its parameters on `device`. `on_host`: as trainer.reference_memory says; `mix`: sync.reference_mix."""
        self.weights: dict[str, torch.Tensor] = {}
        self._policy, self._device = policy, device
        self._on_host, self._mix = on_host, mix

    def copy(self) -> None:
        """Makes it the policy as it is now; on the host in the memory of the one before."""
        if not self._on_host:
            self.weights |= {name: copied(parameter) for name, parameter in self._policy.items()}
            return
        pinned = self._device.type == "cuda"
        for name, parameter in self._policy.items():
            if name not in self.weights:
                self.weights[name] = torch.empty_like(parameter.data, device="cpu", pin_memory=pinned)
            self.weights[name].copy_(parameter.data)

    @torch.no_grad()
    def refresh(self) -> None:
        """Where one is kept, makes it a copy of the policy as it is now, or with sync.reference_mix = m its own weights times
        1 - m plus the policy's times m, in place, each number rounded once."""
        if not self.weights:
            return
        if self._mix == 1:
            self.copy()
            return
        for name, parameter in self._policy.items():
            reference = self.weights[name]
            reference.lerp_(parameter.detach().to(reference.device), self._mix)

    def on_device(self) -> dict[str, torch.Tensor]:
        """Its weights there: themselves, or a copy for as long as somebody has it."""
        if not self._on_host:
            return self.weights
        return {name: tensor.to(self._device, copy=True) for name, tensor in self.weights.items()}
