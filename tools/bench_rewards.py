"""Seconds between a step's last completion and its last score: a reward that judges answers as engines hand them over, beside
the same reward given a step whole, on the same answers, in turn. The source, the pool and the judging processes are a run's
own; engines sleep until a response of its length would be done.

    python -m tools.bench_rewards [--answers 1024] [--seconds 20] [--engines 2] [--workers 1 2] [--repeats 3] [--json PATH]

Lengths are log-normal (mean 700, sigma 0.6, at most 2,048 tokens), all sampled side by side, the longest possible one in
--seconds. Answers are made of the gold ones of engine/rewards/math/cases.jsonl, as tools/bench_verifier.py makes them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config.options import Rewards
from engine.core.types import Completion, Prompt, Score
from engine.data.mixture import Mixture
from engine.data.prompts import PromptSet
from engine.inference.pool import Pool
from engine.inference.sampling import SampleRequest
from engine.rewards.base import Answer, Reward
from engine.rewards.math.reward import MathReward
from engine.rewards.registry import RoutedReward
from engine.rollouts.metrics import JUDGED
from engine.rollouts.source import RolloutSource
from tests import builders
from tests.rollouts import make_completion, make_prompt
from tools.bench_verifier import answers

CASES = Path(__file__).parents[1] / "engine/rewards/math/cases.jsonl"
SAMPLES = 4  # of a prompt, as many as `answers` makes of a gold one
MEAN, SIGMA, MOST = 700, 0.6, 2048  # tokens
PATIENCE_SECONDS = 600.0


class Sleeping:
    """An engine whose responses end when they would, all begun together."""

    def __init__(self, texts: dict[tuple[str, int], str], token_seconds: float) -> None:
        self._texts, self._token_seconds = texts, token_seconds
        self._begun, self._open = 0.0, dict[str, SampleRequest]()

    def call(self, method: str, *arguments: Any) -> Sleeping.Call:
        """A call that is carried out when it is waited for."""
        if method == "submit":
            self._begun, self._open = time.monotonic(), {request.request_id: request for request in arguments[0]}
        return self.Call(self, arguments if method == "collect" else None)

    def restart(self) -> None:
        """It is never lost."""
        raise NotImplementedError

    class Call:
        """A submission, which is done at once, or a collection."""

        def __init__(self, engine: Sleeping, asked: tuple[Any, ...] | None) -> None:
            self._engine, self._asked = engine, asked

        def result(self, timeout_seconds: float) -> Any:
            """Of a collection, when no more than so many requests are open."""
            return None if self._asked is None else self._engine.collected(*self._asked)

    def collected(self, names: Sequence[str], num_open: int) -> tuple[list[Completion | None], dict[str, float]]:
        """As VllmEngine.collect."""
        started = time.monotonic()
        left = sorted(self._length(self._open[name]) for name in names if name in self._open)
        tokens = left[len(left) - num_open - 1] if len(left) > num_open else 0  # some end at once
        time.sleep(max(0.0, self._begun + tokens * self._token_seconds - started))
        ended = {
            name: self._open.pop(name) for name in names if name in self._open and self._length(self._open[name]) <= tokens
        }
        found = [self._completion(ended[name]) if name in ended else None for name in names]
        return found, {"seconds": time.monotonic() - started, "tokens": 0.0}

    def _completion(self, request: SampleRequest) -> Completion:
        text = self._texts[request.prompt_id, request.sample_index]
        return make_completion(request.prompt_id, request.sample_index, request.seed, 0, (1,), (-1.0,), text, "stop")

    @staticmethod
    def _length(request: SampleRequest) -> int:
        draw = random.Random(request.seed).gauss(math.log(MEAN) - SIGMA**2 / 2, SIGMA)
        return max(1, min(MOST, round(math.exp(draw))))


class Whole(Reward):
    """The same reward, given a step's answers when all are there."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order."""
        return self._reward.score(answers)


def measure(num_answers: int, seconds: float, num_engines: int, num_workers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds after the last completion, of each repeat, by how the step's answers are judged. Both ways give equal scores."""
    golds = [str(json.loads(line)["answer"]) for line in CASES.read_text("utf-8").splitlines()]
    num_prompts = num_answers // SAMPLES
    golds = (golds * -(-num_prompts // len(golds)))[:num_prompts]
    texts: dict[str, list[str]] = {}
    for _, gold, text in answers(golds):
        texts.setdefault(gold, []).append(text)
    prompts: list[Prompt] = []
    of_request: dict[tuple[str, int], str] = {}
    for place, gold in enumerate(golds):
        prompts.append(make_prompt(f"p{place}", (place + 1,), "", gold, "", ""))
        of_request |= {(f"p{place}", index): texts[gold].pop() for index in range(SAMPLES)}
    config = builders.config(
        run={"steps": repeats, "seed": 1},
        data={"prompts_per_step": num_prompts},
        algorithm={"samples_per_prompt": SAMPLES},
        sync={"sync_interval": "never"},
    )
    mixture = Mixture(config.data.sources, (PromptSet(tuple(prompts), 0, 0),), config.run.seed)
    found: dict[str, list[float]] = {"whole": [], "one by one": []}
    with MathReward(Rewards(workers=num_workers)) as judge:
        judge.score([Answer(prompts[0], "1")])  # started
        for step in range(repeats):
            values = []
            for name, reward in (("whole", Whole(judge)), ("one by one", judge)):
                engines = [Sleeping(of_request, seconds / MOST) for _ in range(num_engines)]
                pool = Pool(engines, PATIENCE_SECONDS)
                source = RolloutSource(config, mixture, pool, RoutedReward({"math": reward}), None)
                source.open(range(step, step + 1))
                metrics = source.next(step).metrics
                found[name].append(metrics[JUDGED.name])
                values.append(metrics["reward_mean"])
                source.close()
            assert values[0] == values[1], values
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1024, help=f"of a step, a multiple of {SAMPLES}")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a response of the greatest length takes")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="judging processes")
    parser.add_argument("--repeats", type=int, default=3, help="steps, of which the median is told")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    if options.answers < SAMPLES or options.answers % SAMPLES:
        parser.error(f"--answers must be a multiple of {SAMPLES}, found {options.answers}")
    figures: dict[str, dict[str, list[float]]] = {}
    print(f"{'workers':>7}{'judged':>12}{'seconds after the last completion, median and range':>54}")
    for workers in options.workers:
        figures[str(workers)] = measure(options.answers, options.seconds, options.engines, workers, options.repeats)
        for name, seconds in figures[str(workers)].items():
            print(
                f"{workers:7}{name:>12}{statistics.median(seconds):30.2f}  ({min(seconds):.2f} to {max(seconds):.2f})",
                flush=True,
            )
    report = {"answers": options.answers, "seconds": options.seconds, "engines": options.engines, "figures": figures}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
