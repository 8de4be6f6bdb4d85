"""What a metric is: declared once, where it is computed, with its unit, how parts of it are put together, and one sentence of
help. The loop, the progress display, the report and the table in the documents are derived from declarations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Reduction = Literal["sum", "mean", "max", "last", "effective"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a step, as metrics.jsonl has it.

    `reduce` says how the parts of microbatches and data-parallel ranks become the step's value: "sum"; "mean": their sum
    divided by the step's `per` ("pairs", "targets", ...), NaN where that is 0; "max"; "last": rank 0 alone knows it;
    "effective": their sum is one of weights, and the value is its square over the product of `sums`, which are the sum of the
    weights' squares and their number: the effective sample size as a share, NaN where there is none.
    """

    name: str
    help: str  # one sentence: what it is, and of what
    unit: str = ""  # "tokens", "s", "MiB", "nats", "share" (0 to 1); empty: a plain number or count
    reduce: Reduction = "last"
    per: str = ""  # of a mean: the count it is divided by, itself a key of the step's record
    title: str = ""  # a few words for a screen or a chart
    peers: Mapping[str, str] = field(default_factory=dict)  # what others call the same: {"TRL": "rewards/margins"}
    sums: tuple[str, ...] = ()  # further sums over the step that its value is made of; no record has them

    def value(self, total: float, record: Mapping[str, float]) -> float:
        """The step's value from the sum (or maximum) over all parts."""
        if self.reduce == "effective":
            below = math.prod(record.get(name, math.nan) for name in self.sums)
            return min(1.0, total * total / below) if below else math.nan  # the parts are rounded to float32
        if self.reduce != "mean":
            return total
        count = record.get(self.per, math.nan)
        return total / count if count else math.nan


def by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """Declarations by name. Two of one name must be equal."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        assert found.setdefault(metric.name, metric) == metric, f"two declarations of {metric.name}"
    return found


def part_reductions(metrics: Iterable[Metric]) -> dict[str, Reduction]:
    """How each part that a microbatch contributes is put together, by name: of every metric, and of what its value needs
    besides."""
    found: dict[str, Reduction] = {}
    for metric in metrics:
        found |= {metric.name: metric.reduce} | dict.fromkeys(metric.sums, "sum")
    return found
