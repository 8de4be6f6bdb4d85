"""Half a cosine from the peak to the floor (arXiv 1608.03983, without restarts). With a floor of 0.2 this is the default of the
paper's public code at the paper's date: fairseq2 692f79a98, `CosineAnnealingLRConfig(final_lr_scale=0.2)`.
"""

from __future__ import annotations

import math

from engine.config.learning_rates.base import LearningRate


class Cosine(LearningRate):
    """Falls slowly at first and at the end."""

    def coefficient(self, progress: float) -> float:
        """(1 + cos(pi * progress)) / 2."""
        return 0.5 * (1.0 + math.cos(math.pi * progress))
