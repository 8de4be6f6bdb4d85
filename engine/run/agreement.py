"""What rank 0 tells the other trainer ranks between two steps, and how they wait for it: that its work is done, and whether the
run is to end. All of it goes over the host group, so nobody who waits holds a GPU. Every method but `heartbeat` is collective
over the trainer ranks. It stops no run.
"""

from __future__ import annotations

import json

from engine.bridge.sender import ParallelState
from engine.config.load import RunConfig
from engine.run.signals import sign_of_life, stop_request


class Agreement:
    """One trainer rank's end of these words."""

    def __init__(self, config: RunConfig, state: ParallelState) -> None:
        self._config, self._state = config, state

    def heartbeat(self) -> None:
        """Rank 0, while it works alone: it has made progress, so that the command that watches sees the run live. The other
        ranks need no such word: they wait for as long as rank 0's process lives."""
        sign_of_life(self._config).touch()

    def done(self) -> None:
        """Rank 0: its work is done; `listen` returns on every other rank."""
        self.heartbeat()
        self._state.host.broadcast(b"")

    def listen(self) -> None:
        """Every other rank: waits until rank 0 is `done`."""
        self._state.host.broadcast(b"")

    def number(self, value: float) -> float:
        """Rank 0's `value`, on every rank."""
        return float(json.loads(self._state.host.broadcast(json.dumps(value).encode())))

    def early_end(self, collapse: str | None, *, resumable: bool) -> tuple[str | None, bool]:
        """(the guard's reason to stop the run for, whether the command has asked it to stop), as rank 0 sees them. `collapse`
        is rank 0's reason; only where the run is `resumable` is the command's request looked for."""
        asked = self._state.rank == 0 and resumable and stop_request(self._config).exists()
        reason, stopped = json.loads(self._state.host.broadcast(json.dumps([collapse, asked]).encode()))
        return reason, stopped
