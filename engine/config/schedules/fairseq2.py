"""The regimes as the paper's public code (fairseq2) has them, which counts steps from 1: the first interval is a step short."""

from __future__ import annotations

from engine.config.schedules.paper import Paper


class Fairseq2(Paper):
    """Syncs at 0, s - 1, 2 s - 1 and so on. Equal to the paper's where s is 1 or "never"."""

    def counted(self, step: int) -> int:
        """From 1; so multiples of s fall on syncs here too."""
        return step + int(self.sync_interval not in (1, "never"))

    @property
    def regime(self) -> str:
        """The paper's, and whose count it is."""
        return f"s = {self.sync_interval} ({self._name}, counted as in fairseq2){self.ahead}"
