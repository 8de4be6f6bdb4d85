"""The paper's regimes: a weight sync before step t where t % s == 0; online, semi-online, offline."""

from __future__ import annotations

from typing import Literal

from engine.config.schedules.base import Schedule


class Paper(Schedule):
    """Syncs at 0, s, 2 s and so on; so staleness at step t is t % s, at most s - 1; with a lookahead L, up to L s more."""

    def sync_due(self, step: int) -> bool:
        """Every s steps, counted from 0."""
        return step == 0 or (self.sync_interval != "never" and self.falls_due(self.sync_interval, step))

    @property
    def regime(self) -> str:
        """s, and the paper's name for it."""
        return f"s = {self.sync_interval} ({self._name}){self.ahead}"

    @property
    def _name(self) -> str:
        return {1: "online", "never": "offline"}.get(self.sync_interval, "semi-online")

    def broken_rules(self, checkpoint_every: int | Literal["end"]) -> list[str]:
        """Checkpoints at every so many steps must fall on syncs."""
        s, every = self.sync_interval, checkpoint_every
        if s == "never" or every == "end" or every % s == 0:
            return []
        return [
            f"checkpoint.every must be a multiple of sync.sync_interval, so that a checkpoint holds the generator's "
            f"weights too; found {every} and {s}: use {s * max(1, every // s)}"
        ]
