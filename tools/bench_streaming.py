"""What sync.streaming could hide, by arithmetic: drawn lengths, the pool's own dealing and calls, the waves' own cut, and a
clock. It samples and trains nothing. The clock: an engine decodes all of its responses at once, a decoding step takes the same
time however many are open, judging takes none, and training takes time by tokens, whichever wave they are in.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

from engine.core.arrays import NO_TOKENS
from engine.forecast.lengths import LogNormal
from engine.inference.pool import deal, open_after
from engine.inference.sampling import SampleRequest
from engine.rollouts.waves import COMPLETE_SHARES, Waves
from tools.scale_balance import LONG, PROMPT, SHORT

STANDARD = NormalDist()
COSTS = (0.25, 0.5, 1.0)  # time of training a step over that of sampling it


@dataclass(frozen=True, slots=True)
class Case:
    """A step. `alike`: the share of the variance of a response's logarithmic length that its prompt decides."""

    lengths: LogNormal
    alike: float
    size: int  # samples of a prompt
    num_prompts: int = 64
    num_engines: int = 4


CUT_OFF = LogNormal(4000, 0.9, 8_192)  # one of ten at the limit
CASES = [Case(lengths, alike, size) for lengths in (SHORT, LONG, CUT_OFF) for size in (8, 16) for alike in (0.0, 0.5)]


@dataclass(frozen=True, slots=True)
class Cut:
    """The waves of a step: the share of its tokens that each has, and when it is complete, as a share of the time until the
    step's last response."""

    shares: tuple[float, ...]
    moments: tuple[float, ...]

    def step_time(self, cost: float) -> float:
        """Sampling and training, in times of the sampling, where the training takes `cost` of them."""
        end = 0.0
        for share, moment in zip(self.shares, self.moments, strict=True):
            end = max(end, moment) + cost * share
        return end


def cut(lengths: list[int], case: Case) -> Cut:
    """Of responses of these lengths, prompt by prompt."""
    requests = [SampleRequest("", f"p{i // case.size}", i, 0, NO_TOKENS, 1.0, 1.0, 1) for i in range(len(lengths))]
    (dealt,) = deal([requests], case.num_engines)
    waves, moments, now = Waves(case.num_prompts, case.size, COMPLETE_SHARES), list[int](), 0
    orders = [sorted(own, key=lambda place: lengths[place]) for own in dealt]
    calls = [open_after(len(own)) for own in orders]
    handed_over = [0] * len(orders)
    with waves:
        for turn in range(max(map(len, calls))):
            for engine, (order, left) in enumerate(zip(orders, calls, strict=True)):
                if turn < len(left):
                    due = lengths[order[len(order) - left[turn] - 1]]  # what ends at the same decoding step comes with it
                    until = sum(lengths[place] <= due for place in order)
                    arrived: dict[int, Any] = {place: place for place in order[handed_over[engine] : until]}
                    waves.put(arrived)
                    handed_over[engine], now = max(handed_over[engine], until), max(now, due)
            waves.turn()
            moments += [now] * (len(waves.made) - len(moments))
    moments = [*moments, now][: len(waves.made)]
    moments[-1] = now  # the last one may still have arrived when it was made
    tokens = [sum(PROMPT + lengths[g * case.size + i] for g in one.groups for i in range(case.size)) for one in waves.made]
    return Cut(tuple(one / sum(tokens) for one in tokens), tuple(moment / now for moment in moments))


def drawn(case: Case, draw: random.Random) -> list[int]:
    """Lengths of a step's responses."""
    prompts = [draw.gauss(0, case.alike**0.5) for _ in range(case.num_prompts)]
    rest = (1 - case.alike) ** 0.5
    return [case.lengths.draw(STANDARD.cdf(own + draw.gauss(0, rest))) for own in prompts for _ in range(case.size)]


def row(case: Case, num_steps: int) -> str:
    """A line of the table: means over so many steps."""
    draw = random.Random(5)
    cuts = [cut(drawn(case, draw), case) for _ in range(num_steps)]
    streamed = fmean(1 - one.shares[-1] for one in cuts)
    first = fmean(one.moments[0] for one in cuts)
    waves = fmean(len(one.shares) for one in cuts)
    speed = " | ".join(f"{(1 + cost) / fmean(one.step_time(cost) for one in cuts):.2f}" for cost in COSTS)
    name = f"{case.lengths.mean:,.0f}, {case.lengths.sigma:g}, {case.lengths.cap:,} | {case.size} | {case.alike:.0%}"
    return f"| {name} | {waves:.1f} | {streamed:.0%} | {first:.0%} | {speed} |"


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps to draw of each case")
    num_steps = parser.parse_args().steps
    told = " | ".join(f"training {cost:g}" for cost in COSTS)
    print(f"| mean length, sigma, most | samples | alike | waves | streamed_share | first wave at | {told} |\n|{'---|' * 9}")
    for case in CASES:
        print(row(case, num_steps), flush=True)


if __name__ == "__main__":
    main()
