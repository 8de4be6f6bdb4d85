"""What a forecast said of a run beside what the run's records say, as its report shows it. It forecasts nothing
(engine/forecast does) and reads no record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

CALIBRATION = "calibration.json"  # in the run's directory: the constants of its machine, as `semion calibrate` wrote them


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds of one thing that a run did."""

    name: str
    about: str  # for people
    per: Literal["step", "each"]
    predicted: float | None  # None where no forecast is made of it
    measured: float | None  # None where the records do not say

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return self.predicted / self.measured if self.predicted is not None and self.measured else None


@dataclass(frozen=True, slots=True)
class Predicted:
    """A forecast beside a run."""

    parts: tuple[Part, ...]
    num_steps: int  # of which the measured ones are means
    first_step: int  # of them; those before warm up
    machine: str | None  # of the calibration; None without one
    note: str  # what is forecast by, or why nothing is

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "machine": self.machine,
            "note": self.note,
            "first_step": self.first_step,
            "steps": self.num_steps,
            "parts": [
                {
                    "name": part.name,
                    "per": part.per,
                    "predicted_seconds": part.predicted,
                    "measured_seconds": part.measured,
                    "ratio": part.ratio,
                }
                for part in self.parts
            ],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table: what, predicted, measured, the one over the other, per what."""
        return [
            (
                part.about,
                *("-" if value is None else f"{value:.3f}" for value in (part.predicted, part.measured)),
                "-" if part.ratio is None else f"{part.ratio:.2f}",
                part.per,
            )
            for part in self.parts
        ]


HEADING = ("seconds", "predicted", "measured", "predicted / measured", "per")
