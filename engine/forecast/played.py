"""What a replay of the training loop gives: when each step began and ended, where its time went, and spans for a picture."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step began and ended, and where its time went."""

    start: float
    sync: float  # of a weight sync, colocated with its turns
    finish: float  # before it, for engines to complete what they sample ahead
    waited: float  # for rollouts to be sampled and judged
    judged: float  # of that, for the rewards after the last response
    host: float
    train: float

    @property
    def seconds(self) -> float:
        """The step."""
        return self.sync + self.finish + self.waited + self.host + self.train

    @property
    def end(self) -> float:
        """When it was done."""
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time, for a picture."""

    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """What an engine did, for a picture."""

    stretches: list[tuple[float, float]]  # in which it was busy
    finished: dict[int, float]  # of each step, when its last response was in


@dataclass(slots=True)
class Played:
    """The steps that were replayed, and those of them that count."""

    steps: list[StepTimes] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    engines: tuple[Sampled, ...] = ()  # those that were replayed
    first: int = 0  # of those that count
    engine_seconds: float = 0.0  # for which engines were busy meanwhile, in the mean over them

    @property
    def counted(self) -> list[StepTimes]:
        """The steps that count."""
        return self.steps[self.first :]

    @property
    def duration(self) -> float:
        """Of those."""
        return self.steps[-1].end - self.steps[self.first].start

    def mean(self, name: str) -> float:
        """Seconds a step of one of its parts."""
        return sum(getattr(step, name) for step in self.counted) / len(self.counted)

    @property
    def step_seconds(self) -> float:
        """Of a step, in the mean."""
        return self.duration / len(self.counted)
