"""What judges on one node of a run, in the process there that holds it: pools as rank 0 has itself, of worker processes or of
a user's class, which judge what rank 0 gives and keep what came of it until it is taken (engine/rewards/pool/nodes.py is the
other side). It decides nothing: which answers are judged here, and what becomes of those of a node that is lost, is rank 0's
business.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Condition

from engine.config.load import RunConfig
from engine.config.options import Source
from engine.rewards.arrivals import Arrivals
from engine.rewards.pool.nodes import TAKE_SECONDS, Outcome, Request
from engine.rewards.registry import Opened, Pool, fitted_to, pool_identities, pools

MOMENT_SECONDS = 0.02  # for which a first outcome waits for others, unless half of what is here is judged


class NodeJudges:
    """The pools of a node, by the names of their rewards. Its methods are called in several threads at once."""

    def __init__(self, config: RunConfig, threads: int) -> None:
        """`threads`: of the ranks and engines of this node, which the judging processes leave the cores to."""
        self._config, self._threads = config, threads
        self._pools: dict[str, _Pool] = {}

    def open(self, sources: Sequence[Source] | None) -> Opened:
        """Starts the processes of the rewards that `sources`, or those of the run, name. ConfigError where one cannot judge
        here, WatchdogError where it does not start."""
        config = fitted_to(self._config, self._threads, sources)
        for name, start in pools(config, sources).items():
            self._pools[name] = _Pool(start())
        slots = {name: pool.reward.slots for name, pool in self._pools.items()}
        return Opened(slots, pool_identities(config, sources))

    def give(self, name: str, judging: int, requests: Mapping[int, Request]) -> None:
        """Requests to judge, by their numbers in a judging. What was given for an earlier one is given up."""
        self._pools[name].give(judging, requests)

    def take(self, name: str, judging: int) -> dict[int, Outcome]:
        """Waits for outcomes, TAKE_SECONDS at most; those that nobody has taken. Raises what the judging raised."""
        return self._pools[name].take(judging)

    def close(self) -> None:
        """Closes every reward, also when one of them fails to; what is judged here is given up. A second call does nothing."""
        with ExitStack() as stack:
            while self._pools:
                stack.callback(self._pools.popitem()[1].close)


class _Pool:
    """One reward's processes, and the judging that is under way."""

    def __init__(self, reward: Pool) -> None:
        self.reward = reward
        self._thread = ThreadPoolExecutor(1, "judging")
        self._changed = Condition()
        self._number = 0  # of the judging
        self._arrivals: Arrivals[Request] = Arrivals()
        self._running: Future[object] | None = None
        self._num_left = 0  # requests without an outcome
        self._found: dict[int, Outcome] = {}  # that nobody has taken

    def give(self, judging: int, requests: Mapping[int, Request]) -> None:
        with self._changed:
            if judging < self._number:  # calls may overtake each other
                return
            if judging > self._number:
                self._begin(judging)
            self._num_left += len(requests)
            self._arrivals.put(requests)
            self._changed.notify_all()

    def take(self, judging: int) -> dict[int, Outcome]:
        until = time.monotonic() + TAKE_SECONDS
        with self._changed:
            self._changed.wait_for(lambda: self._has_news(judging), TAKE_SECONDS)
            if judging != self._number:
                return {}
            moment = min(MOMENT_SECONDS, until - time.monotonic())
            self._changed.wait_for(lambda: self._is_much() or judging != self._number, moment)
            if judging != self._number:
                return {}
            if self._running is not None and self._running.done():
                self._running.result()
            found, self._found = self._found, {}
            return found

    def close(self) -> None:
        """Closes the reward, when what is judged has been given up."""
        with self._changed:
            self._arrivals.abandon()
        self._thread.shutdown()
        self.reward.close()

    def _begin(self, judging: int) -> None:
        self._arrivals.abandon()
        arrivals = self._arrivals = Arrivals[Request]()
        self._number, self._num_left, self._found = judging, 0, {}

        def judged(number: int, outcome: Outcome) -> None:
            with self._changed:
                if judging == self._number:
                    self._found[number] = outcome
                    self._num_left -= 1
                    self._changed.notify_all()

        self._running = self._thread.submit(self.reward.judge, arrivals, judged)
        self._running.add_done_callback(self._ended)

    def _ended(self, _: Future[object]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_news(self, judging: int) -> bool:
        has_ended = self._running is not None and self._running.done()
        return judging < self._number or (judging == self._number and (bool(self._found) or has_ended))

    def _is_much(self) -> bool:
        return len(self._found) >= self._num_left or (self._running is not None and self._running.done())
