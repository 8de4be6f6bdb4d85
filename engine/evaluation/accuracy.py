"""Evaluation on a set of problems: every problem sampled once for each of several seeds, the mean over seeds with its standard
error. Accuracy and pass@k where answers are right or wrong, the mean reward where they are graded. It is given a pool that
already serves the weights to judge; the best checkpoint is selection.py's business, files are suites.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from engine.config.load import RunConfig
from engine.core.types import Completion, Prompt, Score
from engine.inference.pool import Pool
from engine.inference.sampling import sample_requests
from engine.rewards.base import Reward, answer_of

# All requests of an evaluation decode in one batch; they are waited for, carried and judged this many at a time, so that
# inference.timeout_seconds need not cover 500 problems with 50 seeds, and the engines sample while answers are judged.
REQUESTS_PER_TICKET = 4096
# How often it is told how far it has come, unless the parts are too small. Where answers are right or wrong, what is judged
# with an answer does not change its mark; a class of the user's may look at all that it is given, so it gets all at once.
PARTS, PART_PROBLEMS = 16, 8
Request = TypeVar("Request")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The result of one evaluation. What is not known is NaN: a mean of nothing (no answer of a graded set could be judged), a
    spread of less than two."""

    version: int
    measure: Literal["accuracy", "reward"]  # what the mean is of
    mean: float  # over seeds and problems: accuracy, or of a graded set the reward of the answers that could be judged
    standard_error: float  # of the mean: problems are drawn, and so are samples (see `standard_error`)
    seed_spread: float  # standard deviation of the per-seed means over sqrt(seeds), as the paper reports
    length_normalized_reward: float  # of a graded set in a run (see `length_normalized`), else NaN
    num_problems: int  # those that are too long included, where answers are right or wrong
    num_too_long: int  # problems longer than inference.max_model_tokens - sampling.max_tokens: not asked, and counted as wrong
    num_seeds: int
    pass_at: dict[str, float]  # k -> mean over problems of the chance that one of k samples is right; none of a graded set
    completion_tokens_mean: float
    truncated: float  # share of completions that ended at sampling.max_tokens
    reward_timeouts: int
    reward_too_long: int
    reward_failures: int  # neither of the two; where answers are right or wrong, all three count as wrong
    records: tuple[dict[str, object], ...]  # one a problem and seed

    def summary(self) -> dict[str, Any]:
        """The figures without the records, None for NaN."""
        figures = {name: getattr(self, name) for name in self.__slots__ if name != "records"}
        return {name: None if value != value else value for name, value in figures.items()}


def length_normalized(reward: float, num_tokens: int, seed_tokens: float) -> float:
    """The reward of a response in proportion to its length: r L0 / L, and r L / L0 where r is negative, so that of equal
    rewards the longer response never counts more, whatever the sign. L0 (`seed_tokens`), the seed model's mean length on
    the set, leaves it in units of the reward. The paper only names a length-normalised reward: the definition is ours."""
    ratio = seed_tokens / num_tokens
    return reward * ratio if reward >= 0 else reward / ratio


def standard_error(values: Sequence[Sequence[float]]) -> float:
    """Standard error of the mean of `values` [problems][seeds], clustered by problem: the samples of one problem are
    not independent, so the spread is taken over the problems' own means. NaN of less than two problems."""
    means = [_mean(row) for row in values]
    if len(means) < 2:
        return math.nan
    centre = math.fsum(means) / len(means)
    variance = math.fsum((mean - centre) ** 2 for mean in means) / (len(means) - 1)
    return math.sqrt(variance / len(means))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, of `samples` of which `correct` are:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1), in whole numbers up to the last division."""
    assert 0 <= correct <= samples and 1 <= k <= samples, (samples, correct, k)
    draws = math.comb(samples, k)
    return (draws - math.comb(samples - correct, k)) / draws


def mean_pass_at(correct: Sequence[Sequence[float]]) -> dict[str, float]:
    """pass@k of `correct` [problems][seeds] of 0 and 1, the mean over problems, for every power of two up to seeds."""
    n = len(correct[0])
    ks = [1 << power for power in range(n.bit_length())]
    return {str(k): math.fsum(pass_at_k(n, round(math.fsum(row)), k) for row in correct) / len(correct) for k in ks}


def evaluate(
    config: RunConfig,
    prompts: Sequence[Prompt],
    pool: Pool,
    reward: Reward,
    seed_tokens: float | None = math.nan,
    part_done: Callable[[int], object] = lambda num_problems: None,
    *,
    num_too_long: int = 0,
) -> Accuracy:
    """Samples evaluation.samples completions a problem and judges them. Sampling seeds do not depend on the version, so
    two versions are compared on equal luck. All of `prompts` are of one kind; `seed_tokens`: the seed model's mean length
    on them, None where it is the seed model that is judged, NaN where nobody knows it, as outside a run. `part_done` is told
    after every wait how many problems are done. `num_too_long`: further problems of the set that do not fit an engine; where
    answers are right or wrong, they count as answered wrongly."""
    chosen, n = prompts[: config.evaluation.max_problems], config.evaluation.samples
    completions, scores = _sampled(config, chosen, pool, reward, part_done)
    lengths, statuses = [len(completion.token_ids) for completion in completions], [score.status for score in scores]
    mean_length = math.fsum(lengths) / len(lengths)
    (verifiable,) = {prompt.verifiable for prompt in chosen}
    marks = [float(score.correct) if verifiable else _graded(score) for score in scores]  # unjudged is not right
    normal = mean_length if seed_tokens is None else seed_tokens
    normalized = [
        None if mark is None or verifiable else length_normalized(mark, length, normal)
        for mark, length in zip(marks, lengths, strict=True)
    ]
    whole = config.evaluation.max_problems is None or len(chosen) < config.evaluation.max_problems
    unasked = num_too_long if verifiable and whole else 0
    marks += [0.0] * (unasked * n)
    by_problem = _by_problem(marks, n)
    by_seed = [_mean([mark for mark in marks[seed::n] if mark is not None]) for seed in range(n)]
    centre = _mean(by_seed)
    spread = math.sqrt(math.fsum((a - centre) ** 2 for a in by_seed) / (n - 1) / n) if n > 1 else math.nan
    return Accuracy(
        version=pool.version,
        measure="accuracy" if verifiable else "reward",
        mean=_mean([_mean(row) for row in by_problem]),
        standard_error=standard_error(by_problem),
        seed_spread=spread,
        length_normalized_reward=_mean([_mean(row) for row in _by_problem(normalized, n)]),
        num_problems=len(chosen) + unasked,
        num_too_long=num_too_long,
        num_seeds=n,
        pass_at=mean_pass_at(by_problem) if verifiable else {},
        completion_tokens_mean=mean_length,
        truncated=sum(completion.finish_reason == "length" for completion in completions) / len(completions),
        reward_timeouts=statuses.count("timeout"),
        reward_too_long=statuses.count("too_long"),
        reward_failures=sum(statuses.count(why) for why in ("died", "unparsable", "invalid")),
        records=_records(chosen, completions, scores),
    )


def _sampled(
    config: RunConfig, prompts: Sequence[Prompt], pool: Pool, reward: Reward, part_done: Callable[[int], object]
) -> tuple[list[Completion], list[Score]]:
    """The completions of each prompt in turn, and what they are worth."""
    evaluation, n = config.evaluation, config.evaluation.samples
    requests = sample_requests(
        prompts,
        n,
        run_seed=config.run.seed,
        purpose="evaluation",
        step=0,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_tokens=config.sampling.max_tokens,
    )
    parts = tickets(requests, n, config.inference.engines, in_parts=all(prompt.verifiable for prompt in prompts))
    completions: list[Completion] = []
    scores: list[Score] = []
    for ticket in pool.submit(parts):
        found, _ = pool.gather(ticket)
        places = [place // n for place in range(len(completions), len(completions) + len(found))]
        scores += reward.score([answer_of(prompts[i], completion, i, n) for i, completion in zip(places, found, strict=True)])
        completions += found
        part_done(len(completions) // n)
    return completions, scores


def tickets(requests: Sequence[Request], n: int, engines: int, *, in_parts: bool) -> list[Sequence[Request]]:
    """The requests of whole problems, `n` each, as they are waited for. A part has as many for each engine, so that the pool
    deals each request to the engine that would have it without parts."""
    whole = max(1, REQUESTS_PER_TICKET // n) * n
    problems = max(PART_PROBLEMS, -(-len(requests) // (n * PARTS)))
    part = n * engines * -(-problems // engines) if in_parts else whole
    return [
        requests[start : min(start + part, first + whole)]
        for first in range(0, len(requests), whole)
        for start in range(first, min(first + whole, len(requests)), part)
    ]


def _records(
    prompts: Sequence[Prompt], completions: Sequence[Completion], scores: Sequence[Score]
) -> tuple[dict[str, object], ...]:
    n = len(completions) // len(prompts)
    return tuple(
        {
            "prompt_id": completion.prompt_id,
            "problem": prompts[place // n].problem,
            "answer": prompts[place // n].answer,
            "seed_index": completion.sample_index,
            "seed": completion.seed,
            "reward": score.value,
            **({"reward_parts": dict(score.parts)} if score.parts else {}),
            "status": score.status,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "text": completion.text,
        }
        for place, (completion, score) in enumerate(zip(completions, scores, strict=True))
    )


def _graded(score: Score) -> float | None:
    return score.value if score.status == "ok" else None


def _by_problem(values: Sequence[float | None], n: int) -> list[list[float]]:
    """The known ones of each problem's n values, without problems that have none."""
    rows = ([value for value in values[place : place + n] if value is not None] for place in range(0, len(values), n))
    return [row for row in rows if row]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def greedy_samples(config: RunConfig, prompts: Sequence[Prompt], pool: Pool) -> list[dict[str, object]]:
    """What the policy says to each prompt at temperature 0, for people to read and for exact comparison."""
    requests = sample_requests(
        prompts,
        1,
        run_seed=config.run.seed,
        purpose="greedy",
        step=0,
        temperature=0.0,
        top_p=1.0,
        max_tokens=config.sampling.max_tokens,
    )
    completions, _ = pool.generate(requests)
    return [
        {
            "version": completion.version,
            "problem": prompt.problem,
            "answer": prompt.answer,
            "text": completion.text,
            "prompt_ids": list(prompt.token_ids),
            "token_ids": list(completion.token_ids),
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
