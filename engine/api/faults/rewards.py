"""What judges: whether each reward could, and whether the loss and the rewards go together. A user's function is loaded in a
worker of its own; no engine is started."""

from __future__ import annotations

from engine.api.faults.look import Faults, Look, caught, evaluated, tried
from engine.capacity.kv_cache import require_one_request, reward_cache
from engine.config.options import RewardModel
from engine.config.rewards import broken_reward_rules
from engine.models.base import ModelShape
from engine.models.checks import check_engine_layout
from engine.models.reward_head import read_reward_head
from engine.models.sharding import EngineLayout
from engine.rewards.registry import check_pairing, check_streaming, checks, uses_engine
from engine.run.metrics import catalogue


def reward_faults(look: Look) -> Faults:
    """The faults of the loss and of what judges."""
    config = look.config
    if look.purpose == "train":
        yield from tried(catalogue, config.algorithm)[1]  # a user's loss must not take the name of a metric of ours
    if look.purpose in ("generate", "sft") or not look.reads("data", "rewards", "reward_model"):
        return
    every = [name for source in config.data.sources for name in source.rewards]
    if broken_reward_rules(config) or ("model" in every and config.reward_model.path is None):
        return  # no such reward, or not as it must be: a rule of the configuration says so
    sources = evaluated(config, look.sets) if look.purpose == "eval" else config.data.sources
    faults = [fault for check in checks(config, sources) for fault in caught(check)] if look.samples else []
    yield from faults
    if not faults and look.purpose != "eval" and look.judges:
        yield from caught(check_pairing, config)
        yield from caught(check_streaming, config)
    options = config.reward_model
    if look.samples and uses_engine(sources) and options.path is not None:
        shape, _ = tried(_shape_of, options)
        if shape is not None:
            yield from caught(check_engine_layout, shape, EngineLayout(options.tensor_parallel), "reward_model")
            yield from caught(require_one_request, "reward_model", reward_cache(shape, options))


def _shape_of(options: RewardModel) -> ModelShape:
    assert options.path is not None
    return read_reward_head(options.path).shape
