"""A script, not a test: a reward engine scores conversations in their order, in reverse, each alone, and in groups of four as a
run has it: by one engine, and by two whose groups come in another order.
`python reward_probe.py CONFIG CONVERSATIONS`, the latter a JSON file of [message, answer]."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from engine.config.load import load_config
from engine.core.types import Score
from engine.inference.reward_engine import RewardEngine
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer
from engine.rewards.model import ModelReward
from tests.rollouts import make_prompt


def main() -> None:
    config, conversations = load_config(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
    engine = RewardEngine(config)  # nothing is kept from call to call, so one does for two
    half = Asked(engine)
    asked = [conversations, conversations[::-1], *([conversation] for conversation in conversations)]
    scores = [[(score.value, score.status) for score in engine.score(some)] for some in asked]
    answers = {
        place: Answer(make_prompt("p", (), message, "", "", ""), answer, group=place // 4, group_size=4)
        for place, (message, answer) in enumerate(conversations)
    }
    by_one = shown(ModelReward([half], 300.0).score(list(answers.values())))
    arriving = Arrivals[Answer]()
    with arriving:
        arriving.put(dict(reversed(answers.items())))
    by_two = shown(ModelReward([half, half], 300.0).score_as_they_arrive(arriving))
    print("RESULT " + json.dumps([scores[0], scores[1][::-1], [score for (score,) in scores[2:]], by_one, by_two]))


def shown(scores: list[Score]) -> list[tuple[float, str]]:
    return [(score.value, score.status) for score in scores]


class Done(Future[Any]):
    def on_done(self, told: Callable[[], object]) -> None:
        self.add_done_callback(lambda _: told())


class Asked:
    """The engine's handle, whose calls are done at once."""

    name = "the reward engine"

    def __init__(self, engine: RewardEngine) -> None:
        self._engine = engine

    def call(self, method: str, *arguments: Any) -> Any:
        done = Done()
        done.set_result(getattr(self._engine, method)(*arguments))
        return done

    def restart(self) -> None:
        raise NotImplementedError


if __name__ == "__main__":
    main()
