"""All engines as one: deals requests to them, gathers completions, and commits a weight version only when every engine
has verified it. It starts no process; it is given handles and sees engines through them.

Requests are dealt by prompt (`deal`), so which engine samples what is fixed by the configuration. Each engine answers its calls
in the order they were made: a `collect` queued behind a `submit` needs nobody's attention while the trainer trains. Completions
are asked for in several calls, so that they can be judged while others are sampled (`open_after`).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

from engine.core.errors import EngineLostError, InferenceError, SemionError, WeightSyncError
from engine.core.types import Completion
from engine.inference.sampling import Part, SampleRequest


class Future(Protocol):
    """A call under way in an engine's process."""

    def result(self, timeout_seconds: float) -> Any:
        """Its value; the error it raised; TimeoutError after `timeout_seconds`."""
        ...


class EngineHandle(Protocol):
    """An engine elsewhere. Calls run one after another in the order they were made."""

    def call(self, method: str, *arguments: Any) -> Future:
        """Starts a method of VllmEngine and returns at once."""
        ...

    def restart(self) -> None:
        """Ends the engine, if it is still there, and starts it anew with the seed model; returns at once."""
        ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What the engines did since the last collection, over all engines."""

    num_tokens: int  # sampled
    busy_seconds: float  # the longest time any engine spent on it: queueing, decoding, handing over


@dataclass(frozen=True, slots=True)
class Ticket:
    """Requests under way: each engine's calls, one after another, and where in the asked-for order its answers belong."""

    submitted: tuple[Future, ...]
    calls: tuple[Sequence[Future], ...]
    places: Sequence[Sequence[int]]
    turns: int = 1  # steps whose time engines may take before they answer the last call


SLICE_SECONDS = 0.05  # for which an engine decodes on before it listens again
SLICED_ENGINES = 8  # with more, slices and what is between two looks are longer, so that who looks has no more to do
POLL_SECONDS = 0.002  # between two looks


def open_after(count: int) -> list[int]:
    """How many of so many requests an engine leaves open when it hands over what is done, call by call: half of them, half of
    the rest, and so on. So the first come early, the last call brings few, and there are few calls."""
    found = []
    while count:
        count //= 2
        found.append(count)
    return found or [0]


def deal(batches: Sequence[Sequence[SampleRequest]], num_engines: int) -> list[list[list[int]]]:
    """For each batch, the positions of the requests of each engine, in order.

    All requests of a prompt go to one engine, whose prefix cache then computes the prompt once: to the one with the fewest so
    far, over all batches. No engine gets more than its part of them, rounded up; so of the last prompts, where they do not come
    out even, the requests are shared by a few engines.
    """
    prompts: list[dict[str, list[int]]] = []
    for batch in batches:
        prompts.append({})
        for place, request in enumerate(batch):
            prompts[-1].setdefault(request.prompt_id, []).append(place)
    return deal_prompts([list(of.values()) for of in prompts], num_engines)


def deal_prompts(
    batches: Iterable[Sequence[Sequence[int]]], num_engines: int, first: int | None = None
) -> list[list[list[int]]]:
    """`deal` of batches in which it is known already which positions are of one prompt. `first`: only the shares of so many
    engines, the first ones, are told."""
    told = num_engines if first is None else min(first, num_engines)
    loads, num_dealt = [(0, engine) for engine in range(num_engines)], 0  # a heap: the fewest requests first, then by number
    shares: list[list[list[int]]] = []
    for prompts in batches:
        share: list[list[int]] = [[] for _ in range(told)]
        num_dealt += sum(map(len, prompts))
        most = -(-num_dealt // num_engines)
        for places in prompts:
            while places:
                load, engine = loads[0]
                given, places = places[: most - load], places[most - load :]
                if engine < told:
                    share[engine] += given
                heapq.heapreplace(loads, (load + len(given), engine))
        shares.append([sorted(places) for places in share])
    return shares


def unlike(held: Mapping[int, tuple[str, ...]]) -> dict[int, SemionError]:
    """Of engines that took one version, those that do not multiply with the bits that most of them do, by their workers'
    digests; of as many on both sides the first engine is right."""
    if not held:
        return {}
    usual = max(held.values(), key=list(held.values()).count)
    return {
        engine: WeightSyncError(
            f"its quantized weights must be those of the other engines, with digests {', '.join(usual)}; found "
            f"{', '.join(digests)}"
        )
        for engine, digests in held.items()
        if digests != usual
    }


# What decides an engine's tokens, as it describes it; the last three of engines on CPUs.
RUN_ALIKE = ("vllm", "torch", "model_runner", "attention", "scheduling", "sampler", "layers", "instructions")


class Pool:
    """The engines, and the one weight version that all of them serve."""

    def __init__(self, engines: Sequence[EngineHandle], timeout_seconds: float) -> None:
        self._engines = tuple(engines)
        self._timeout = timeout_seconds
        self._lost: list[int] = []
        self._runs: dict[str, str | None] = {}  # RUN_ALIKE, of the first engine that was described
        self._profiling: list[tuple[int, Future]] = []  # what engines were last told about a profile
        self._busy_seconds = 0.0  # of all engines together, since `_lap_began`
        self._lap_began: float | None = None
        self._version: int | None = 0  # engines load the seed model; None while they sleep, a sync is under way or has failed

    def describe(self) -> list[dict[str, str]]:
        """Waits until every engine is up; the machine and the versions of each. WeightSyncError where they did not load the
        same bits into FP8, InferenceError where they do not run alike: equal seeds would give other tokens."""
        futures = [handle.call("describe") for handle in self._engines]
        found = [self._result(future, i, "start") for i, future in enumerate(futures)]
        for engine, one in enumerate(found):
            self._require_alike(engine, one)
        loaded = {i: (one["quantized"],) for i, one in enumerate(found) if "quantized" in one}
        for engine, error in unlike(loaded).items():
            raise WeightSyncError(f"engine {engine} must have loaded what the others did: {error}: look at its model.path")
        return found

    def _require_alike(self, engine: int, found: Mapping[str, str]) -> None:
        """InferenceError where an engine does not run as the first that was described."""
        self._runs = self._runs or {name: found.get(name) for name in RUN_ALIKE}
        for name, wanted in self._runs.items():
            if found.get(name) != wanted:
                raise InferenceError(
                    f"engine {engine} must run as the others do, whose {name} is {wanted}; found {found.get(name)}: give all "
                    f"engines the same packages, environment and kind of device"
                )

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Engines by machine."""
        hosts: dict[str, list[int]] = {}
        for engine, found in enumerate(self.describe()):
            hosts.setdefault(found["host"], []).append(engine)
        return tuple(map(tuple, hosts.values()))

    @property
    def version(self) -> int:
        """The committed version; InferenceError when a sync has failed and none is."""
        if self._version is None:
            raise InferenceError(
                "no weight version is committed in the pool: a weight sync is under way or has failed, or the engines sleep"
            )
        return self._version

    # -- sampling

    def submit(self, batches: Sequence[Sequence[SampleRequest]]) -> list[Ticket]:
        """Queues several steps' requests at once, so that they decode together; one ticket a step, in order."""
        return self.submit_and_pause(batches, len(batches))[0]

    def submit_and_pause(
        self, batches: Sequence[Sequence[SampleRequest]], num_completed: int
    ) -> tuple[list[Ticket], Ticket | None]:
        """The same, but engines complete the first `num_completed` steps only, and pause what they have of the others: all
        after as many decoding steps, those after which the last of them has completed its part. The tickets of the first steps,
        and the one of what is paused (`paused`), whose order is that of the other steps' requests one after another; None where
        there are none."""
        version, shares = self.version, deal(batches, len(self._engines))
        submitted = tuple(
            handle.call(
                "submit",
                [batch[i] for batch, share in zip(batches, shares, strict=True) for i in share[engine]],
                version,
            )
            for engine, handle in enumerate(self._engines)
        )
        tickets = []
        for batch, share in zip(batches[:num_completed], shares[:num_completed], strict=True):
            calls = tuple(
                [handle.call("collect", [batch[i].request_id for i in places], left) for left in open_after(len(places))]
                for handle, places in zip(self._engines, share, strict=True)
            )
            tickets.append(Ticket(submitted, calls, tuple(tuple(places) for places in share)))
        if len(batches) == num_completed:
            return tickets, None
        places: list[list[int]] = [[] for _ in self._engines]
        before = 0
        for batch, share in zip(batches[num_completed:], shares[num_completed:], strict=True):
            for own, of_batch in zip(places, share, strict=True):
                own += [before + place for place in of_batch]
            before += len(batch)
        calls = tuple([handle.call("steps_so_far")] for handle in self._engines)
        return tickets, Ticket(submitted, calls, places, turns=1 + num_completed)

    def gather(
        self,
        ticket: Ticket,
        arrived: Callable[[dict[int, Completion]], object] = lambda _: None,
        turned: Callable[[], object] = lambda: None,
    ) -> tuple[list[Completion], Usage]:
        """Waits for a ticket's completions, in the order of its requests. `arrived` is called meanwhile with those that an
        engine has handed over, by their places in that order, and `turned` when every engine has answered its n-th call, whose
        completions follow from tokens alone. InferenceError names an engine that is late."""
        found: dict[int, Completion] = {}
        tokens, seconds = 0.0, [0.0] * len(ticket.calls)
        self.wait(ticket.submitted, "submit")
        for turn in zip_longest(*ticket.calls):
            for engine, future in enumerate(turn):
                if future is None:  # this engine had fewer requests, and so calls
                    continue
                completions, usage = self._result(future, engine, "collect")
                pairs = zip(ticket.places[engine], completions, strict=True)
                ended = {place: completion for place, completion in pairs if completion is not None}
                arrived(ended)
                found |= ended
                tokens, seconds[engine] = tokens + usage["tokens"], seconds[engine] + usage["seconds"]
                self._busy_seconds += usage["seconds"]
            turned()
        return [found[place] for place in range(len(found))], Usage(int(tokens), max(seconds, default=0.0))

    def paused(self, ticket: Ticket, stopped: Callable[[], bool] = lambda: False) -> list[Part]:
        """Waits until the engines have paused what this ticket is of; it, in the order of its requests.

        The step at which they pause follows from tokens alone, but is known only when the last engine has completed its part.
        Until then the others decode on, a slice of time after another, and take back what they have decoded too much.
        CancelledError once it is `stopped`.
        """
        self.wait(ticket.submitted, "submit")
        last = self._all_done(ticket, stopped)
        futures = [handle.call("pause", last) for handle in self._engines]
        found: dict[int, Part] = {}
        for engine, (future, places) in enumerate(zip(futures, ticket.places, strict=True)):
            found.update(zip(places, self._result(future, engine, "pause"), strict=True))
        return [found[place] for place in range(len(found))]

    def _all_done(self, ticket: Ticket, stopped: Callable[[], bool]) -> int:
        """After how many decoding steps every engine has completed its part of the steps before a pause. Those that have go on
        meanwhile."""
        many = max(1.0, len(self._engines) / SLICED_ENGINES)
        most = self._timeout * ticket.turns
        deadline = time.monotonic() + most
        parts = {engine: future for engine, (future,) in enumerate(ticket.calls)}  # of engines that have not told
        slices: dict[int, Future | None] = {}  # of those that have: what they decode now
        steps = [0]
        while True:
            for engine, future in list(parts.items()):
                with suppress(TimeoutError):
                    steps.append(future.result(0.0))
                    del parts[engine]
                    slices[engine] = None
            if not parts:
                return max(steps)
            if stopped():
                raise CancelledError
            if time.monotonic() > deadline:
                raise InferenceError(
                    f"engine {min(parts)} did not complete its part before a pause within {most:g} s, which is "
                    f"inference.timeout_seconds = {self._timeout:g} for each step of it: raise it, or look at the engine's log"
                )
            for engine, slice_ in list(slices.items()):
                with suppress(TimeoutError):
                    if slice_ is None or slice_.result(0.0):
                        slices[engine] = self._engines[engine].call("go_on", SLICE_SECONDS * many)
                    else:  # it has nothing left to decode
                        del slices[engine]
            time.sleep(POLL_SECONDS * many)

    def generate(self, requests: Sequence[SampleRequest]) -> tuple[list[Completion], Usage]:
        """Submits and waits."""
        return self.gather(self.submit([requests])[0])

    def idle_share(self) -> float | None:
        """The share of the time since the last call for which engines sampled nothing, over all engines and of what has been
        gathered; None at the first call."""
        now, began, busy = time.monotonic(), self._lap_began, self._busy_seconds
        self._lap_began, self._busy_seconds = now, 0.0
        if began is None or not self._engines:
            return None
        return max(0.0, 1.0 - busy / max(1e-9, (now - began) * len(self._engines)))

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """Every engine's log-probs of the same sequences (see VllmEngine.log_probs), engine by engine."""
        futures = [handle.call("log_probs", sequences) for handle in self._engines]
        return [self._result(future, engine, "log_probs") for engine, future in enumerate(futures)]

    # -- profile

    def profile(self, engines: Sequence[int], on: bool) -> None:
        """Has these engines begin or end their profile, behind all that they were asked before. Raises what the last such call
        raised."""
        self.finish_profile()
        self._profiling = [(engine, self._engines[engine].call("profile", on)) for engine in engines]

    def finish_profile(self) -> None:
        """Waits until the engines have done what `profile` told them."""
        told, self._profiling = self._profiling, []
        for engine, future in told:
            with suppress(EngineLostError):  # its profile is lost with it; whether the run is, is for others to find
                self._result(future, engine, "profile")

    # -- weight sync

    def receive(self, version: int, call: dict[str, Any]) -> list[Future]:
        """Asks every engine to receive a version (`call`: inference.receiver.SyncCall). Until `commit`, none is served."""
        self._version = None
        return [handle.call("receive", version, call | {"engine": i}) for i, handle in enumerate(self._engines)]

    def unverified(self, version: int, futures: Sequence[Future], seconds: float) -> dict[int, SemionError]:
        """Waits at most `seconds` for all engines' word on `version`; why those are in doubt that did not verify it.

        They are quarantined: an engine answers no request before it has verified a version in full. Those that are gone
        or gave no answer are lost until `replace_lost`.
        """
        deadline = time.monotonic() + seconds
        reasons: dict[int, SemionError] = {}
        held: dict[int, tuple[str, ...]] = {}
        for engine, future in enumerate(futures):
            try:
                verified, held[engine] = future.result(max(0.0, deadline - time.monotonic()))
                assert verified == version, (engine, verified, version)
            except TimeoutError:
                reasons[engine] = InferenceError(f"no answer within {seconds:.0f} s")
                self._lost.append(engine)
            except SemionError as error:
                reasons[engine] = error
                # What is neither a failed sync nor a refusal is a process, or a vLLM in it, beyond repair.
                if isinstance(error, EngineLostError) or not isinstance(error, (WeightSyncError, InferenceError)):
                    self._lost.append(engine)
        return reasons | unlike(held)

    def replace_lost(self) -> None:
        """Starts lost engines anew, all within inference.timeout_seconds; InferenceError if that fails."""
        lost, self._lost = self._lost, []
        for engine in lost:
            self._engines[engine].restart()
        deadline = time.monotonic() + self._timeout
        starting = [(engine, self._engines[engine].call("describe")) for engine in lost]
        for engine, future in starting:
            again = self._result(future, engine, "start again", max(0.0, deadline - time.monotonic()))
            self._require_alike(engine, again)

    def commit(self, version: int) -> None:
        """Serves `version`, which every engine has verified."""
        self._version = version

    def sleep(self) -> None:
        """Lets every engine sleep, each within inference.timeout_seconds: none serves a version until the next `commit`."""
        self._version = None
        for engine, future in enumerate([handle.call("sleep") for handle in self._engines]):
            with suppress(EngineLostError):  # nothing is in flight, and the next sync replaces it
                self._result(future, engine, "sleep")

    def wait(self, futures: Sequence[Future], what: str) -> None:
        """Waits for one call of each engine."""
        for engine, future in enumerate(futures):
            self._result(future, engine, what)

    def _result(self, future: Future, engine: int, what: str, seconds: float | None = None) -> Any:
        try:
            return future.result(self._timeout if seconds is None else seconds)
        except TimeoutError as error:
            raise InferenceError(
                f"engine {engine} did not answer {what!r} within inference.timeout_seconds = {self._timeout}: "
                f"raise it, or look at the engine's log"
            ) from error
