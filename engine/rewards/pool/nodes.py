"""What judges on the run's other nodes, as rank 0 has it: a process on each of those nodes holds a pool like the one here
(engine/rewards/serving.py) and is given its part of what is to be judged. Who judges changes no score: the judge, its
deadline and its limits are the same everywhere.

Waiting: nothing here waits but for what has been told to be there. A node owes an answer to each `take` within TAKE_SECONDS,
also where nothing is judged yet, as its sign of life. One that is still silent SILENT_SECONDS later counts as lost, as one
whose process ended does. So does one that answers, but has judged nothing of what it has for longer than its processes may take
with an answer (`workers.stuck_seconds`). What it had is judged by the others, and it gets nothing more until the run is started
again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.core.errors import EngineLostError, SemionError

log = logging.getLogger(__name__)

TAKE_SECONDS = 20.0  # after which a node answers at the latest, with nothing where nothing is judged
SILENT_SECONDS = 60.0  # beyond these, and beyond what judging may take, on a busy machine or network
CLOSE_SECONDS = 30.0  # in which all nodes close what they have opened
FETCH_SECONDS = 30.0  # to have here what is known to be there
QUEUED = 2  # answers that a node holds for each that it judges at once, so that none of its processes waits for us

Request = tuple[Any, ...]  # the arguments of the judge, as JSON can hold them; for a user's class a group of answers
Outcome = tuple[Any, Any, str]  # what the judge gave (of a user's class scores), the status, and the error's text or ""


class Future(Protocol):
    """A call under way in a node's process."""

    def result(self, timeout_seconds: float) -> Any:
        """Its value; the error it raised; TimeoutError after `timeout_seconds`; EngineLostError when the process is gone."""
        ...

    def on_done(self, told: Callable[[], object]) -> None:
        """Has `told` called, in any thread, once there is a result."""
        ...


class NodeHandle(Protocol):
    """The process of a node that holds its pools. It carries out several calls at once, in any order."""

    name: str  # as errors call it

    def call(self, method: str, *arguments: Any) -> Future:
        """Starts a method of serving.NodeJudges and returns at once."""
        ...

    def stop(self) -> None:
        """Ends the process."""
        ...


@dataclass(slots=True, eq=False)
class _Call:
    future: Future
    late_at: float
    is_done: bool = False


@dataclass(slots=True)
class NodePool:
    """One reward's pool on one node."""

    handle: NodeHandle
    reward: str  # the pool's name there
    slots: int  # answers that it judges at once
    judging: set[int] = field(default_factory=set)  # numbers of the requests that it has
    is_lost: bool = False
    _tell: Callable[[], object] = lambda: None
    _number: int = 0  # of the judging: what comes of an earlier one, which was abandoned, is of no use
    _calls: list[_Call] = field(default_factory=list)
    _stuck_seconds: float = 0.0  # longest without an outcome, while it has requests
    _stuck_at: float = math.inf  # when that is over

    @property
    def room(self) -> int:
        """Requests that it takes now."""
        return 0 if self.is_lost else QUEUED * self.slots - len(self.judging)

    @property
    def late_at(self) -> float | None:
        """When it is silent for too long; None where it owes nothing."""
        return min((*(call.late_at for call in self._calls), *([self._stuck_at] if self.judging else [])), default=None)

    def begin(self, tell: Callable[[], object], stuck_seconds: float) -> None:
        """Another judging begins; `tell` is called whenever `heard` may have something. `stuck_seconds`: longest that its
        processes may give no outcome at all."""
        self._number, self._tell, self._stuck_seconds = self._number + 1, tell, stuck_seconds + SILENT_SECONDS
        self.judging.clear()
        self._calls.clear()

    def give(self, requests: Mapping[int, Request]) -> None:
        """Sends requests to judge, by their numbers."""
        takes = bool(self.judging)  # a call that takes is under way then
        if not takes:
            self._stuck_at = time.monotonic() + self._stuck_seconds
        self.judging |= requests.keys()
        self._call("give", dict(requests))
        if not takes:
            self._call("take")

    def heard(self) -> tuple[dict[int, Outcome], Sequence[int]]:
        """What has been judged since the last call, and where the node is lost the numbers of what it still had. Raises what
        its judges raise where they cannot judge."""
        found: dict[int, Outcome] = {}
        try:
            for call in list(self._calls):
                if call.is_done:
                    self._calls.remove(call)
                    taken = call.future.result(FETCH_SECONDS)
                    if taken is None:  # what it was given has arrived
                        continue
                    found |= taken
                    self.judging -= taken.keys()
                    if taken:
                        self._stuck_at = time.monotonic() + self._stuck_seconds
                    if self.judging:
                        self._call("take")
                elif time.monotonic() >= call.late_at:
                    raise TimeoutError(f"{self.handle.name} gave no sign of life for {TAKE_SECONDS + SILENT_SECONDS:.0f} s")
            if self.judging and time.monotonic() >= self._stuck_at:
                raise TimeoutError(f"{self.handle.name} judged nothing of what it had for {self._stuck_seconds:.0f} s")
        except (TimeoutError, EngineLostError) as error:
            return found, self._lose(error)
        except SemionError as error:
            raise named(self.handle, error) from error
        return found, ()

    def _call(self, method: str, *arguments: Any) -> None:
        call = _Call(
            self.handle.call(method, self.reward, self._number, *arguments), time.monotonic() + TAKE_SECONDS + SILENT_SECONDS
        )
        self._calls.append(call)
        tell = self._tell

        def done() -> None:
            call.is_done = True
            tell()

        call.future.on_done(done)

    def _lose(self, error: Exception) -> Sequence[int]:
        log.warning("%s: other nodes judge what it had, and it judges nothing more until the run is started again", error)
        self.is_lost = True
        self.handle.stop()
        owed = sorted(self.judging)
        self.judging.clear()
        self._calls.clear()
        return owed


def closing(nodes: Sequence[NodeHandle]) -> Callable[[], None]:
    """Has nodes close what they have opened, all at once, and returns what waits for that: CLOSE_SECONDS from now at most. A
    node that does not answer by then, or is gone, is a warning. It raises what the closing of a reward raised, named."""
    closed = [(node, node.call("close")) for node in nodes]
    late_at = time.monotonic() + CLOSE_SECONDS

    def wait() -> None:
        failed: SemionError | None = None
        for node, future in closed:
            try:
                future.result(max(0.0, late_at - time.monotonic()))
            except TimeoutError:
                log.warning(
                    "%s did not close its rewards within CLOSE_SECONDS = %g: its process is ended as it is",
                    node.name,
                    CLOSE_SECONDS,
                )
            except EngineLostError as error:
                log.warning("%s: it has closed none of its rewards", error)
            except SemionError as error:
                failed = failed or named(node, error)
        if failed is not None:
            raise failed

    return wait


def named(handle: NodeHandle, error: SemionError) -> SemionError:
    """An error of a node's judges with the node's name."""
    return type(error)(f"{handle.name}: {error}")
