"""The peak at every step after the warm-up."""

from __future__ import annotations

from engine.config.learning_rates.base import LearningRate


class Constant(LearningRate):
    """No decay."""

    decays = False

    def coefficient(self, progress: float) -> float:
        """Always the peak."""
        return 1.0
