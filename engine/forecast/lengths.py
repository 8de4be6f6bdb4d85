"""How long responses are, and what a step then trains on: a distribution that is drawn from by counted seeds, or lengths as a
run's records have them. It samples no token; what of a group trains is decided by the run's own loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

from engine.config.load import RunConfig
from engine.core.arrays import NO_LOG_PROBS
from engine.core.errors import ConfigError
from engine.core.jsonl import read_objects, row_of
from engine.core.seeds import counted_seed
from engine.core.segments import is_folder_of_segments, segments_of
from engine.core.types import Completion, Prompt, Rollout, RolloutGroup, Score
from engine.megatron.outlines import Outline, outlines_of
from engine.observe.rollouts import rollouts_of
from engine.rollouts.batch import step_data

STANDARD = NormalDist()


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths whose logarithm is normal: `mean` and `sigma` (of the logarithm) before those above `cap` are cut off there."""

    mean: float
    sigma: float
    cap: int

    def draw(self, uniform: float) -> int:
        """The length at a quantile."""
        if self.sigma == 0:
            return max(1, min(self.cap, round(self.mean)))
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, min(self.cap, round(math.exp(mu + self.sigma * STANDARD.inv_cdf(uniform)))))

    def __str__(self) -> str:
        return f"log-normal, mean {self.mean:g}, sigma {self.sigma:g}, at most {self.cap} tokens"


@dataclass(frozen=True, slots=True)
class Recorded:
    """Lengths that were seen, each as likely as another."""

    lengths: tuple[int, ...]  # in ascending order
    cap: int
    path: str

    def draw(self, uniform: float) -> int:
        """The length at a quantile."""
        return min(self.cap, self.lengths[int(uniform * len(self.lengths))])

    def __str__(self) -> str:
        mean = sum(self.lengths) / len(self.lengths)
        return f"{len(self.lengths)} responses of {self.path}, mean {mean:.0f} tokens"


Lengths = LogNormal | Recorded


def recorded_lengths(path: str | Path, cap: int) -> Recorded:
    """The lengths in a run's directory or its rollouts, or in a JSONL file of rows with a number `tokens`. ConfigError where
    there are none."""
    place = rollouts_of(Path(path)) or Path(path)
    if is_folder_of_segments(place):
        rows = (row_of(line) for segment in segments_of(place) for line in segment.lines())
    elif place.is_file():
        rows = (row for _, row in read_objects(place))
    else:
        raise ConfigError(f"--lengths {path} must be a run's directory or a JSONL file; found none there: name another")
    found = sorted(length for row in rows if (length := _length(row)))
    if not found:
        raise ConfigError(f"--lengths {path} must hold rollouts, or rows with a number `tokens`; found none: name another")
    return Recorded(tuple(found), cap, str(path))


def newest_lengths(run: Path, most: int) -> list[int]:
    """The lengths of the newest rollouts of a run, so many at most; none where it keeps none."""
    place = rollouts_of(run)
    if place is None:
        return []
    if not is_folder_of_segments(place):
        return [length for _, row in read_objects(place) if (length := _length(row))][-most:]
    lines = (line for segment in reversed(segments_of(place)) for line in segment.newest_lines())
    return [length for line in islice(lines, most) if (length := _length(row_of(line)))]


def _length(row: Any) -> int | None:
    for name in ("num_tokens", "completion_tokens", "tokens", "token_ids"):
        value = row.get(name)
        if isinstance(value, list):
            return len(value)
        if isinstance(value, int) and value > 0:
            return value
    return None


@dataclass(frozen=True, slots=True)
class Workload:
    """What the run is asked: prompts, answers, and how many prompts teach something."""

    completions: Lengths
    prompts: Lengths
    signal: float = 1.0  # the share of prompts with a pair or an advantage


@dataclass(frozen=True)
class StepWork:
    """A step as drawn: of each prompt its length, of each of its samples the response's, and what is trained on."""

    prompts: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    outlines: tuple[Outline, ...]

    @cached_property
    def num_sampled(self) -> int:
        """Tokens of all responses."""
        return sum(map(sum, self.completions))

    @cached_property
    def num_trained(self) -> int:
        """Tokens of all training sequences."""
        return sum(outline.num_tokens for outline in self.outlines)

    @cached_property
    def requests(self) -> list[range]:
        """Of each prompt, which of the step's requests are its samples, as the pool deals them."""
        found, first = [], 0
        for lengths in self.completions:
            found.append(range(first, first + len(lengths)))
            first += len(lengths)
        return found


MOST_DRAWN = 8_000  # responses that are drawn for one forecast; a run's further steps repeat them


def draw_steps(config: RunConfig, workload: Workload, num_steps: int) -> list[StepWork]:
    """The first steps of a run as the workload has them: so many, or as many as MOST_DRAWN responses make."""
    per_step = config.rollouts_per_step
    count = min(num_steps, max(2, MOST_DRAWN // per_step))
    return [_drawn(config, workload, step) for step in range(count)]


def _drawn(config: RunConfig, workload: Workload, step: int) -> StepWork:
    samples = config.algorithm.samples_per_prompt
    draw = random.Random(counted_seed(config.run.seed, "forecast", step))
    groups = []
    for place in range(config.rollouts_per_step // samples):
        num_prompt = workload.prompts.draw(draw.random() or 0.5)
        lengths = tuple(workload.completions.draw(draw.random() or 0.5) for _ in range(samples))
        groups.append(_group(place, step, num_prompt, lengths, draw.random() < workload.signal, draw))
    shares = [(source.prompts_per_step + source.spare_prompts, source.prompts_per_step) for source in config.data.sources]
    data = step_data(groups, shares, {}, config)
    return StepWork(
        tuple(len(group.prompt.token_ids) for group in groups),
        tuple(tuple(len(rollout.completion.token_ids) for rollout in group.rollouts) for group in groups),
        tuple(outlines_of(data.sequences)),
    )


def _group(place: int, step: int, num_prompt: int, lengths: Many[int], has_signal: bool, draw: random.Random) -> RolloutGroup:
    """A group of such lengths whose rewards are 0 and 1, both of them where it has a signal, wherever they fall. Nobody reads
    its tokens: a range stands for as many, another one for each prompt."""
    tokens: Any = range(place, place + num_prompt)
    rewards = [float(draw.random() < 0.5) for _ in lengths] if has_signal else [0.0] * len(lengths)
    if has_signal and len(set(rewards)) == 1:
        rewards[draw.randrange(len(rewards))] = 1.0 - rewards[0]
    rollouts = []
    for index, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
        answer: Any = range(length)
        completion = Completion(f"p{place}", index, 0, 0, answer, NO_LOG_PROBS, "", "stop")
        rollouts.append(Rollout(completion, Score(reward, "ok")))
    prompt = Prompt(f"p{place}", tokens, "", "", "", "")
    return RolloutGroup(prompt, step, tuple(rollouts))
