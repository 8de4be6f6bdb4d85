"""A script, not a test: a reward engine scores conversations in their order, in reverse, and each alone.
`python reward_probe.py CONFIG CONVERSATIONS`, the latter a JSON file of [message, answer]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine.config.load import load_config
from engine.inference.reward_engine import RewardEngine


def main() -> None:
    config, conversations = load_config(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
    engine = RewardEngine(config)
    asked = [conversations, conversations[::-1], *([conversation] for conversation in conversations)]
    scores = [[(score.value, score.status) for score in engine.score(some)] for some in asked]
    print("RESULT " + json.dumps([scores[0], scores[1][::-1], [score for (score,) in scores[2:]]]))


if __name__ == "__main__":
    main()
