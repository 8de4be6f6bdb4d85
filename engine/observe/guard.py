"""Watches the records of a run for what ruins it quietly: entropy or length that collapses, rewards that explode or are no
numbers, steps without a signal, rollouts that are cut off or cannot be judged. A state machine fed one record a step; the same
records give the same findings, and a checkpoint keeps its state. It stops nothing itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config.options import Guard as Options

WINDOW = 5  # steps of which means are compared: the run's first and its last ones
RECOVERY = 1.5  # a collapse is over, and may be told again, once the mean is this many times the bound
EXPLOSION = 100.0  # times the largest mean reward of the first steps, or 1 where that is smaller
HOPELESS = 3  # steps in a row without one judged rollout; the first step of a run is enough, for then nothing was ever judged


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that has just gone wrong."""

    step: int
    what: str  # "entropy", "length", "reward", "signal", "truncated" or "unjudged"
    text: str
    fatal: bool = False  # nothing is being trained: the run ends, whatever guard.action says but "off"


@dataclass(slots=True)
class _Series:
    """One metric: the run's first values and its last; None stands for what is not finite."""

    first: list[float | None] = field(default_factory=list)
    last: deque[float | None] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float | None) -> bool:
        """Takes the next step's value; whether there are steps after the first ones to judge."""
        value = value if value is not None and math.isfinite(value) else None
        self.last.append(value)
        if len(self.first) < WINDOW:
            self.first.append(value)
            return False
        return True


class Guard:
    """The guard of one run."""

    def __init__(self, options: Options) -> None:
        self._shares = {
            "entropy": ("rollout_entropy", "guard.entropy_share", options.entropy_share),
            "length": ("completion_tokens_mean", "guard.length_share", options.length_share),
        }
        self._limits = {
            "truncated": ("truncated", "guard.truncated_share", options.truncated_share),
            "unjudged": ("unjudged_share", "guard.unjudged_share", options.unjudged_share),
        }
        self._series = {what: _Series() for what in (*self._shares, "reward")}
        self._recent = {what: deque[float](maxlen=WINDOW) for what in (*self._limits, "signal")}
        self._ever_judged = False
        self._without_verdict = 0  # steps in a row of which no rollout was judged
        self._told: set[str] = set()

    def observe(self, record: Mapping[str, Any]) -> list[Finding]:
        """Takes the record of the next step; what went wrong with it, each once until it has recovered."""
        found = []
        for what, (metric, option, share) in self._shares.items():
            if self._watches(what, metric, record) and (text := self._collapse(what, metric, option, share)):
                found.append(Finding(int(record["step"]), what, text))
        if self._watches("reward", "reward_mean", record) and (text := self._ruined_reward()):
            found.append(Finding(int(record["step"]), "reward", text))
        for what, (metric, option, limit) in self._limits.items():
            if self._full(what, metric, record) and (text := self._excess(what, metric, option, limit)):
                found.append(Finding(int(record["step"]), what, text))
        if self._full("signal", "skipped_share", record) and (text := self._silence()):
            found.append(Finding(int(record["step"]), "signal", text))
        if text := self._no_verdict(record):
            found.append(Finding(int(record["step"]), "unjudged", text, fatal=True))
        return found

    def state(self) -> dict[str, Any]:
        """All that later findings depend on beside later records, as JSON holds it."""
        return {
            "shares": {what: share for what, (_, _, share) in (self._shares | self._limits).items()},
            "series": {what: {"first": list(s.first), "last": list(s.last)} for what, s in self._series.items()},
            "recent": {what: list(values) for what, values in self._recent.items()},
            "ever_judged": self._ever_judged,
            "without_verdict": self._without_verdict,
            "told": sorted(self._told),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Where it was made under another share, what was told by that share counts as not told: it is
        told once more if it goes on."""
        for what, known in state["series"].items():
            self._series[what].first[:] = known["first"]
            self._series[what].last.clear()
            self._series[what].last.extend(known["last"])
        for what, values in state["recent"].items():
            self._recent[what].clear()
            self._recent[what].extend(values)
        self._ever_judged, self._without_verdict = state["ever_judged"], state["without_verdict"]
        shares = self.state()["shares"]
        self._told = {what for what in state["told"] if state["shares"].get(what) == shares.get(what)}

    def _watches(self, what: str, metric: str, record: Mapping[str, Any]) -> bool:
        """Whether there is something to judge; a run that has no such metric (replayed pairs have no reward) has nothing."""
        return metric in record and self._series[what].add(record[metric])

    def _collapse(self, what: str, metric: str, option: str, share: float) -> str:
        before, now = _mean(self._series[what].first), _mean(self._series[what].last)
        if before is None or now is None:
            return ""
        if now >= share * before:
            if now >= RECOVERY * share * before:
                self._told.discard(what)
            return ""
        return self._once(
            what,
            f"{what} collapsed: {metric} went from {before:.3g} (the run's first {WINDOW} steps) to {now:.3g} (the last "
            f"{WINDOW}), which is below {option} = {share} of it",
        )

    def _ruined_reward(self) -> str:
        now = _mean(self._series["reward"].last)
        if now is None:
            return self._once("reward", f"reward_mean was no finite number in the last {WINDOW} steps")
        first = [abs(value) for value in self._series["reward"].first if value is not None]
        if first and abs(now) > EXPLOSION * max(1.0, *first):
            return self._once(
                "reward",
                f"rewards exploded: reward_mean went from at most {max(first):.3g} (the run's first {WINDOW} steps) to "
                f"{now:.3g} (the last {WINDOW}), over {EXPLOSION:.0f} times as much",
            )
        self._told.discard("reward")
        return ""

    def _full(self, what: str, metric: str, record: Mapping[str, Any]) -> bool:
        """Takes the step's share, where the run has it; whether a whole window of them is there to judge."""
        value = record.get(metric)
        if value is None or not math.isfinite(value):
            return False
        self._recent[what].append(value)
        return len(self._recent[what]) == WINDOW

    def _excess(self, what: str, metric: str, option: str, limit: float) -> str:
        now = math.fsum(self._recent[what]) / WINDOW
        if now <= limit:
            if RECOVERY * now <= limit:
                self._told.discard(what)
            return ""
        means = {
            "truncated": "rollouts were cut off at sampling.max_tokens: raise it, or see whether the model ends its answers",
            "unjudged": "rollouts could not be judged (reward_timeouts, reward_failures and reward_too_long say why)",
        }
        return self._once(what, f"{now:.0%} of the last {WINDOW} steps' {means[what]}; {option} = {limit}")

    def _silence(self) -> str:
        if min(self._recent["signal"]) < 1.0:
            self._told.discard("signal")
            return ""
        return self._once(
            "signal",
            f"no prompt of the last {WINDOW} steps gave a signal (skipped_share = 1: all answers to a prompt had equal "
            f"rewards), so nothing was trained: the problems are too hard or too easy, or the reward says nothing",
        )

    def _no_verdict(self, record: Mapping[str, Any]) -> str:
        """Why the run cannot go on: no rollout of its first step was judged, or of the last HOPELESS ones."""
        if record.get("unjudged_share", 0.0) < 1.0:
            self._ever_judged, self._without_verdict = True, 0
            return ""
        self._without_verdict += 1
        if self._ever_judged and self._without_verdict < HOPELESS:
            return ""
        steps = f"of {self._without_verdict} steps in a row" if self._ever_judged else "since the run began"
        return self._once(
            "no verdict",
            f"no rollout {steps} could be judged ({record.get('reward_failures', 0):.0f} failures, "
            f"{record.get('reward_timeouts', 0):.0f} timeouts, {record.get('reward_too_long', 0):.0f} too long in the last), "
            f"so nothing is trained: mend the reward; the first failure is among the warnings",
        )

    def _once(self, what: str, text: str) -> str:
        if what in self._told:
            return ""
        self._told.add(what)
        return text


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
