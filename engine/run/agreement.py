"""Broadcasts from rank 0 to the other trainer ranks, beside the trainer's own collectives: that it is still at work or done,
and why a run is to stop. Every method is collective over the trainer ranks. It stops no run.
"""

from __future__ import annotations

from engine.bridge.sender import ParallelState
from engine.config.load import RunConfig
from engine.megatron.broadcast import broadcast_bytes
from engine.run.signals import sign_of_life, stop_request

_OVER, _MORE, _STOP = b"over", b"more", b"stop"  # the messages


class Agreement:
    """One trainer rank's end of these broadcasts."""

    def __init__(self, config: RunConfig, state: ParallelState) -> None:
        self._config, self._state = config, state

    # However long engines, rewards and evaluations take within their own deadlines, no rank waits longer in one collective than
    # rank 0 waits between two heartbeats, and the command that watches sees the run live.

    def heartbeat(self) -> None:
        """Rank 0, while it works alone: it broadcasts that it has made progress, so that the other ranks' collectives do
        not time out."""
        self._beat(_MORE)

    def done(self) -> None:
        """Rank 0: its work is done; `listen` returns on every other rank."""
        self._beat(_OVER)

    def listen(self) -> None:
        """Every other rank: waits until rank 0 is `done`."""
        while self._broadcast(b"") != _OVER:
            pass

    def reason(self, mine: str | None) -> str | None:
        """Broadcasts the guard's reason to stop the run for; None: the run goes on. `mine` is rank 0's."""
        return self._broadcast((mine or "").encode()).decode() or None

    def stop_asked(self) -> bool:
        """Whether the command had asked the run to stop when rank 0 looked."""
        asked = self._state.rank == 0 and stop_request(self._config).exists()
        return self._broadcast(_STOP if asked else b"") == _STOP

    def _beat(self, message: bytes) -> None:
        sign_of_life(self._config).touch()
        self._broadcast(message)

    def _broadcast(self, message: bytes) -> bytes:
        """Rank 0's message, on every rank."""
        return broadcast_bytes(message, self._state.device) if self._state.world_size > 1 else message
