"""What may carry weight syncs, as far as a configuration tells: the transports by name, and what one is asked before it is
taken. The transports themselves stand in engine/bridge/transports; each is loaded when it is named, and this opens none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from engine.config.options import Options
from engine.core.registry import Registry

AUTO = "auto"  # the first transport that fits
TRANSPORTS: Registry[Any] = Registry(
    "sync.transport",
    "engine.bridge.transports",
    "engine.bridge.transports.base:Transport",
    support=("registry", "rendezvous"),
    also=(AUTO,),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a transport would have to work. What is not known yet is taken to be favourable."""

    device: Literal["cpu", "cuda"]  # where the weights are
    colocated: bool  # engines take turns with trainer ranks on the same devices
    nodes: int  # of the run
    has_room: bool = True  # in the memory that processes of a machine share, on every machine, for `needed_bytes` more
    needed_bytes: int = 0  # of it, on the machine that needs most
    engines_on_one_machine: bool = True


@dataclass(frozen=True, slots=True)
class Carrier:
    """What would carry the weight syncs on devices of a type; `kind` is None where nothing that was asked for can."""

    device: Literal["cuda", "cpu"]
    kind: str | None
    why: str


def setting(config: Options, device: Literal["cpu", "cuda"], **known: Any) -> Setting:
    """What the configuration says of it, and what else is `known`."""
    return Setting(device, config.inference.placement == "colocated", config.cluster.nodes, **known)


def refusal(config: Options, **known: Any) -> str | None:
    """Why the transport that the configuration names fits neither on CPUs nor on GPUs, as one sentence with the fix; None where
    it fits on one, and for 'auto'. ConfigError for a name without a transport."""
    asked = config.sync.transport
    if asked == AUTO:
        return None
    kind = TRANSPORTS.load(asked)
    devices: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    reasons = [kind.fits(setting(config, device, **known)) for device in devices]
    if None in reasons:
        return None
    return f"sync.transport = {asked!r} {' and '.join(dict.fromkeys(reasons))}: use 'auto'"
