"""Several rewards in one run: each prompt's completions go to the reward that its source names. It judges nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack

from engine.config.load import RunConfig
from engine.config.options import RewardName, Rewards
from engine.core.types import Prompt, Score
from engine.rewards.base import Reward
from engine.rewards.function import FunctionReward
from engine.rewards.math.reward import MathReward
from engine.rewards.model import ModelReward, ScoringEngine


class RoutedReward:
    """Rewards by name (a `Reward`); owns and closes them."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self._rewards = dict(rewards)

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """One score for each (prompt, completion text), in order, from the reward that the prompt names."""
        places: dict[str, list[int]] = {}
        for place, (prompt, _) in enumerate(items):
            places.setdefault(prompt.reward, []).append(place)
        scores: dict[int, Score] = {}
        for name, where in places.items():
            scores.update(zip(where, self._rewards[name].score([items[place] for place in where]), strict=True))
        return [scores[place] for place in range(len(items))]

    def close(self) -> None:
        """Closes every reward, also when one of them fails to close."""
        with ExitStack() as stack:
            for reward in self._rewards.values():
                stack.callback(reward.close)

    def __enter__(self) -> RoutedReward:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def open_rewards(
    config: RunConfig, reward_engine: ScoringEngine | None, names: Set[RewardName] | None = None
) -> RoutedReward:
    """The rewards that the run's sources name, or those of `names`, started. The engine is the reward model's, None where it
    is not among them."""
    names = {source.reward for source in config.data.sources} if names is None else names
    rewards: dict[str, Reward] = {name: open_reward(name, config.rewards) for name in sorted(names - {"model"})}
    if "model" in names:
        assert reward_engine is not None
        rewards["model"] = ModelReward(reward_engine, config.reward_model.timeout_seconds)
    return RoutedReward(rewards)


def open_reward(name: RewardName, options: Rewards) -> Reward:
    """The reward of that name that judges in worker processes, started."""
    if name == "function":
        return FunctionReward(options)
    assert name == "math", name
    return MathReward(options)
