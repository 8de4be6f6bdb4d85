"""What of a resolved run its memory and its weight syncs follow from: the part of `Spec` that this room reads. It is
written down here, since a Spec itself has figures of this room.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, Protocol

from engine.capacity.kv_cache import KvCache
from engine.config.placement import Colocation, Part, Placement
from engine.config.transport import Carrier
from engine.models.base import ModelShape
from engine.models.sharding import EngineLayout, TrainerLayout

if TYPE_CHECKING:
    from engine.config.load import RunConfig


class Resolved(Protocol):
    """A run as resolved; engine/run/spec.py says what each is."""

    @property
    def config(self) -> RunConfig:
        """The configuration."""
        ...

    @property
    def shape(self) -> ModelShape:
        """The policy's sizes."""
        ...

    @property
    def reward_shape(self) -> ModelShape | None:
        """The reward model's, where its engine is counted."""
        ...

    @property
    def trainer(self) -> TrainerLayout:
        """The trainer's layout."""
        ...

    @property
    def engine(self) -> EngineLayout:
        """The engines' layout."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is started."""
        ...

    @property
    def source(self) -> str:
        """Where training sequences come from."""
        ...

    @property
    def placement(self) -> Placement | None:
        """The nodes and GPUs of its processes; None where they are too few."""
        ...

    @property
    def colocation(self) -> Colocation | None:
        """Where ranks and engines are, where they take turns on GPUs."""
        ...

    @property
    def copies(self) -> Collection[str]:
        """Of its weights, kept beside the policy."""
        ...

    @property
    def starts_engines(self) -> bool:
        """Whether engines run."""
        ...

    @property
    def colocated(self) -> bool:
        """Whether they take turns with the trainer."""
        ...

    @property
    def missing_reward_model(self) -> str | None:
        """The file that would tell the reward model's sizes."""
        ...

    @property
    def kv_cache(self) -> KvCache | None:
        """Of each rank of an engine."""
        ...

    def carrier(self, device: Literal["cuda", "cpu"]) -> Carrier:
        """What carries the weight syncs on devices of that type."""
        ...
