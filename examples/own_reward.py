"""A reward of your own: right answers, and a little for short ones. `python examples/own_reward.py CONFIG [section.key=value]`.

It is asked for what its parameters name, runs in judging processes with a deadline, and its parts become metrics.
"""

import sys

import engine


def right_and_short(completion: str, answer: str, num_tokens: int) -> dict[str, float]:
    """Named parts; the reward is their sum."""
    return {"right": float(f"${answer}$" in completion), "short": 0.1 * (num_tokens <= 6)}


def main(path: str, overrides: list[str]) -> None:
    config = engine.load_config(path, overrides)
    config = engine.override(config, {"data.reward": engine.register(right_and_short)})
    for event in engine.train(config):
        if isinstance(event, engine.Step):
            print(f"step {event.step}: reward {event.metrics['reward_mean']:.3f}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except (engine.SemionError, IndexError) as error:
        sys.exit(f"{error}\n{__doc__}")
