"""The trainer's side of a weight sync, as a transaction: all engines serve version v, or all serve the next one. Every
trainer rank calls `publish` at the same step and sends its own shards; rank 0 alone talks to the pool.

An attempt that fails anywhere fails everywhere: whoever notices closes its transport, ranks tell each other before the next
collective, and engines that gave no answer are replaced. Then all meet again and the whole version is sent anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.bridge.exchange import Sender
from engine.bridge.host_group import HostGroup
from engine.bridge.terms import SyncTerms
from engine.bridge.transports.base import Deadline, Rendezvous, Transport, TransportError
from engine.bridge.transports.registry import open_transport
from engine.bridge.transports.rendezvous import join_store, listen, serve_store
from engine.config.options import SYNC_ATTEMPTS
from engine.core.errors import SemionError, UndeliveredError, WatchdogError, WeightSyncError

ENGINE_PATIENCE, RANK_PATIENCE = 1.0, 2.0  # seconds beyond the timeout for engines, then ranks, to report their failures
REASON_BYTES = 1024  # of a rank's failure, as it is sent to the others
log = logging.getLogger(__name__)


class Source(Protocol):
    """What has weights: megatron's Policy."""

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """This rank's shards by megatron's names."""
        ...


class ParallelState(Protocol):
    """This rank among the trainer ranks: engine.megatron's ParallelState."""

    @property
    def rank(self) -> int:
        """Among all trainer ranks."""
        ...

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def host(self) -> HostGroup:
        """Words between the trainer ranks; who waits there holds no GPU."""
        ...


class Engines(Protocol):
    """The pool, as far as a sync needs it."""

    def receive(self, version: int, call: dict[str, Any]) -> list[Any]:
        """See Pool.receive."""
        ...

    def unverified(self, version: int, futures: Any, seconds: float) -> Mapping[int, SemionError]:
        """See Pool.unverified."""
        ...

    def replace_lost(self) -> None:
        """See Pool.replace_lost."""
        ...

    def commit(self, version: int) -> None:
        """See Pool.commit."""
        ...

    def sleep(self) -> None:
        """See Pool.sleep."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed somewhere."""

    text: str
    echo: bool = False  # it follows from a failure elsewhere

    def to_bytes(self) -> bytes:
        """For the other ranks, at most REASON_BYTES."""
        return (bytes([1 + self.echo]) + self.text.encode())[:REASON_BYTES]

    @staticmethod
    def from_bytes(sent: bytes) -> Failure | None:
        """What `to_bytes` made; nothing is no failure."""
        return Failure(sent[1:].decode(errors="ignore"), sent[0] == 2) if sent else None


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One finished sync."""

    version: int
    seconds: float
    num_bytes: int  # that left the trainer: one copy for every machine with engines
    num_messages: int
    attempts: int


class Publisher:
    """Sends versions of the policy to the pool."""

    def __init__(
        self,
        source: Source,
        parallel: ParallelState,
        terms: SyncTerms,
        *,
        host: str,
        timeout_seconds: float,
        pool: Engines | None,
    ) -> None:
        """Opens the rendezvous; collective over the trainer ranks. `pool` is rank 0's, None elsewhere; `host` is the
        address rank 0 listens on, and no other. Engines join at the first sync."""
        self._source, self._parallel, self._pool, self._terms = source, parallel, pool, terms
        self._timeout = timeout_seconds
        self._plan = terms.plan()
        self._digest, self._terms_json = self._plan.digest, terms.to_json()
        self._sender = Sender(self._plan, parallel.rank, terms.torch_dtype, parallel.device)
        self._transport: Transport | None = None
        self._epoch = -1
        server, port = listen(host) if parallel.rank == 0 else (None, 0)
        self._host, self._port = host, int(parallel.host.broadcast(str(port).encode()))
        if server is not None:
            self._store = serve_store(server, host, self._plan.num_members, timeout_seconds)
        else:
            self._store = join_store(host, self._port, self._plan.num_members, timeout_seconds)

    def publish(self, version: int) -> SyncReport:
        """Sends the policy's weights as `version`; returns when every engine has verified and serves them. Collective
        over the trainer ranks. WeightSyncError on all of them, when SYNC_ATTEMPTS have failed; the pool then serves none."""
        started = time.monotonic()
        failure: Failure | None = None
        for attempt in range(1, SYNC_ATTEMPTS + 1):
            failure = self._attempt(version, last=attempt == SYNC_ATTEMPTS)
            if failure is None:
                if self._pool is not None:
                    self._pool.commit(version)
                seconds = time.monotonic() - started
                return SyncReport(version, seconds, self._plan.num_bytes, len(self._plan.messages), attempt)
            if self._parallel.rank == 0:
                attempts = version, attempt, SYNC_ATTEMPTS
                log.warning("weight sync of version %d failed (attempt %d of %d): %s", *attempts, failure.text)
        assert failure is not None, SYNC_ATTEMPTS
        raise WeightSyncError(
            f"version {version} did not reach every engine in {SYNC_ATTEMPTS} attempts; the last: {failure.text}"
        )

    def sleep(self) -> None:
        """Lets every engine sleep until the next `publish`. Collective over the trainer ranks: none goes on before the engines'
        memory is free. The channel stays."""
        if self._pool is not None:
            self._pool.sleep()
        self._parallel.host.barrier()

    def _attempt(self, version: int, *, last: bool) -> Failure | None:
        """One try at a whole sync; why it failed, the same on every rank, or None."""
        self._parallel.host.barrier()  # so that all clocks start together
        deadline, agreement = Deadline(self._timeout), Deadline(self._timeout + RANK_PATIENCE)
        failures: list[Failure] = []
        futures = None
        if self._transport is None:
            self._epoch += 1
        if self._pool is not None:
            futures = self._pool.receive(version, self._call())
        try:
            if self._transport is None:
                meeting = Rendezvous(self._host, self._port, self._plan.num_members, self._timeout, self._epoch)
                self._transport = open_transport(self._terms.transport, self._store, self._parallel.rank, meeting)
            self._sender.send(self._source.parameters, self._transport, deadline)
        except (TransportError, WeightSyncError, RuntimeError, OSError) as error:
            echo = isinstance(error, (TransportError, UndeliveredError))
            failures.append(Failure(f"trainer rank {self._parallel.rank}: {error}", echo))
            self._close()
        if self._pool is not None:
            doubtful = self._pool.unverified(version, futures, deadline.remaining() + ENGINE_PATIENCE)
            failures += [Failure(f"engine {engine}: {error}", error.echo) for engine, error in doubtful.items()]
        failure = self._agreed(most_telling(failures), agreement)
        if failure is not None:
            self._close()
        if failure is not None and not last:
            if self._pool is not None:
                self._pool.replace_lost()
            self._parallel.host.barrier()  # an engine may need minutes to start: not waited for at the next rendezvous
        return failure

    def _call(self) -> dict[str, Any]:
        """What engines are sent for a sync: inference.receiver.SyncCall, but for the engine's number."""
        return {
            "seconds": self._timeout,
            "terms": self._terms_json,
            "plan_digest": self._digest,
            "host": self._host,
            "port": self._port,
            "epoch": self._epoch,
        }

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = None

    def _agreed(self, failure: Failure | None, deadline: Deadline) -> Failure | None:
        """The most telling of the ranks' failures, on every rank: nobody goes on to a collective that others left."""

        def judged(words: list[bytes]) -> bytes:
            heard = [Failure.from_bytes(word) for word in words]
            telling = most_telling([failure for failure in heard if failure is not None])
            return telling.to_bytes() if telling is not None else b""

        sent = failure.to_bytes() if failure is not None else b""
        try:
            return Failure.from_bytes(self._parallel.host.agreed(sent, judged, deadline.remaining()))
        except WatchdogError as error:
            why = f"{failure.text}; {error}" if failure is not None else str(error)
            raise WeightSyncError(f"a trainer rank is gone, or late after a weight sync: {why}") from error


def most_telling(failures: list[Failure]) -> Failure | None:
    """The first that is not an echo of another, or else the first; None of none."""
    return next((failure for failure in failures if not failure.echo), failures[0] if failures else None)
