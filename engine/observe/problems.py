"""What each held-out problem came to at each evaluation of a run: means over seeds, differences with their standard error over
problems, and which problems are most often answered wrong. Arithmetic on records of evaluations; it draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_LETTERS = 1200  # of a problem or an answer that are kept


@dataclass(slots=True)
class Problem:
    """One held-out problem."""

    text: str
    answer: str  # the right one; empty where there is none on record
    means: dict[int, float] = field(default_factory=dict)  # by step: mean reward over seeds; not judged counts 0
    worst: str = ""  # the answer with the lowest reward at the last evaluation

    @property
    def mean(self) -> float:
        """Over all evaluations."""
        return math.fsum(self.means.values()) / len(self.means)


class Problems:
    """The problems of a run's sets by name of set and identity of prompt."""

    def __init__(self) -> None:
        self.sets: dict[str, dict[str, Problem]] = {}

    def add(self, evaluation: Mapping[str, Any]) -> None:
        """Takes a row of evaluations.jsonl with its records; one without them says nothing of problems."""
        known = self.sets.setdefault(evaluation["set"], {})
        rewards: dict[str, list[float]] = {}
        worst: dict[str, float] = {}
        for record in evaluation.get("records") or ():
            if not isinstance(record, Mapping) or not isinstance(name := record.get("prompt_id"), str):
                continue
            found = record.get("reward")
            reward = float(found) if isinstance(found, int | float) else 0.0
            problem = known.get(name)
            if problem is None:
                problem = known[name] = Problem(_cut(record.get("problem")), _cut(record.get("answer")))
            rewards.setdefault(name, []).append(reward)
            if reward < worst.get(name, math.inf):
                worst[name], problem.worst = reward, _cut(record.get("text"))
        for name, values in rewards.items():
            known[name].means[evaluation["step"]] = math.fsum(values) / len(values)

    def hardest(self, name: str) -> list[Problem]:
        """The problems of a set, the one most often answered wrong first."""
        return sorted((problem for problem in self.sets.get(name, {}).values() if problem.means), key=lambda p: p.mean)


Difference = tuple[float, float | None]  # and its standard error


def difference(before: Problems, first: int, after: Problems, last: int, name: str) -> Difference | None:
    """The mean over problems of what step `last` in `after` has more than step `first` in `before`, of a set, and its
    standard error (None of less than two problems). Problems are compared with themselves, so what makes one hard drops out.
    None without records of common problems."""
    mine, others = after.sets.get(name, {}), before.sets.get(name, {})
    gains = [
        mine[key].means[last] - others[key].means[first]
        for key in mine.keys() & others.keys()
        if last in mine[key].means and first in others[key].means
    ]
    if not gains:
        return None
    mean = math.fsum(gains) / len(gains)
    if len(gains) < 2:
        return mean, None
    variance = math.fsum((gain - mean) ** 2 for gain in sorted(gains)) / (len(gains) - 1)
    return mean, math.sqrt(variance / len(gains))


def _cut(text: object) -> str:
    told = "" if text is None else str(text)
    return told if len(told) <= MOST_LETTERS else f"{told[:MOST_LETTERS]} … ({len(told):,} letters)"
