"""One look at a configuration: what is asked, what of it could be read, and what was found on the way that later checks need.
What cannot be read is told once, and what follows from it is left out. It checks nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from engine.config.load import RunConfig
from engine.config.options import Source
from engine.config.placement import Part, training_parts
from engine.core.errors import SemionError
from engine.models.base import ModelShape
from engine.rewards.registry import uses_engine
from engine.rollouts.replay import replay_kind
from engine.run.spec import settled

Purpose = Literal["train", "sft", "rollout", "eval", "generate"]
Faults = Iterable[SemionError]
Check = Callable[..., Faults | None]
Made = TypeVar("Made")


@dataclass
class Look:
    """A configuration that is looked at. `unread`: sections of its file that could not be used and stand at their defaults
    here."""

    config: RunConfig
    purpose: Purpose
    resume: bool = False
    sets: Mapping[str, Source] | None = None  # other problems to evaluate than the configuration's
    unread: frozenset[str] = frozenset()
    shape: ModelShape | None = field(default=None, init=False)
    tokenizer: Any = field(default=None, init=False)
    renders: bool = field(default=False, init=False)  # whether prompts can be tokenized

    def __post_init__(self) -> None:
        self.config = settled(self.config)

    def reads(self, *sections: str) -> bool:
        """Whether these sections are what the user wrote."""
        return self.unread.isdisjoint(sections)

    @property
    def is_whole(self) -> bool:
        """Whether the whole configuration is."""
        return not self.unread

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What would be started."""
        return parts_of(self.config, self.purpose, self.sets)

    @property
    def samples(self) -> bool:
        """Whether inference engines answer prompts."""
        return "engines" in self.parts

    @cached_property
    def judges(self) -> bool:
        """Whether rewards matter: completions are sampled and judged, or a ledger's are compared."""
        return self.purpose not in ("generate", "sft") and (self.samples or tried(replay_kind, self.config)[0] == "rollouts")


def parts_of(config: RunConfig, purpose: Purpose, sets: Mapping[str, Source] | None = None) -> tuple[Part, ...]:
    """What is started. `sets`: what is evaluated, the held-out sets of the configuration where not said."""
    if purpose in ("train", "sft"):
        return training_parts(config)
    judged = {"rollout": config.data.sources, "eval": evaluated(config, sets)}.get(purpose, ())
    return ("engines", "reward_engine") if uses_engine(judged) else ("engines",)


def evaluated(config: RunConfig, sets: Mapping[str, Source] | None) -> tuple[Source, ...]:
    """The sources whose held-out problems are evaluated."""
    if sets is not None:
        return tuple(sets.values())
    return tuple(source for source in config.data.sources if source.held_out is not None)


def caught(check: Check, *arguments: Any) -> list[SemionError]:
    """What a check raises, and what it yields before."""
    found: list[SemionError] = []
    try:
        for fault in check(*arguments) or ():
            found += fault.faults
    except SemionError as error:
        found += error.faults
    return found


def tried(make: Callable[..., Made], *arguments: Any) -> tuple[Made | None, list[SemionError]]:
    """What is made, or what it was refused for."""
    try:
        return make(*arguments), []
    except SemionError as error:
        return None, list(error.faults)
