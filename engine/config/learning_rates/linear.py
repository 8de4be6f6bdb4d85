"""A straight line from the peak to the floor."""

from __future__ import annotations

from engine.config.learning_rates.base import LearningRate


class Linear(LearningRate):
    """Falls by the same amount every step."""

    def coefficient(self, progress: float) -> float:
        """1 - progress."""
        return 1.0 - progress
