"""What a learning-rate schedule is: a linear warm-up to the peak, and then a way from the peak down to a floor. Pure arithmetic
on step numbers, which count from 0, so that a resumed run goes on exactly; it knows no optimizer.

A schedule of your own is a class that extends `LearningRate` and says `coefficient`; `optimizer.schedule` names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LearningRate(ABC):
    """The learning rate of every step.

    `peak`: optimizer.learning_rate. `warmup_steps` w: step t < w has (t + 1) / w of the peak. `decay_steps` d: from step w
    on the way to `floor` (a learning rate, not a share) takes d - w steps; from step d on the rate stays at the floor. None
    where the schedule does not decay.
    """

    peak: float
    warmup_steps: int
    decay_steps: int | None
    floor: float

    decays: ClassVar[bool] = True  # whether it needs decay_steps and may have a floor

    @abstractmethod
    def coefficient(self, progress: float) -> float:
        """Where the rate is between floor (0) and peak (1) after this share, 0 to 1, of the steps from warm-up to floor."""

    def at(self, step: int) -> float:
        """The learning rate of `step`."""
        if step < self.warmup_steps:
            return self.peak * float(step + 1) / float(self.warmup_steps)
        progress = 0.0
        if self.decay_steps is not None:
            progress = min(1.0, (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
        return self.floor + self.coefficient(progress) * (self.peak - self.floor)
