"""Options that something else gives a meaning: set without it they would be ignored, and nobody would notice. One rule: an
option that only a mistake sets without the other is refused (`broken_unused_rules`). One that a file may keep while another
option, a command line or another command turns off what looks at it is told (`unused_options`): the run starts, and says by
name what changes nothing in it. What a loss, a learning rate, a layout or a source of prompts ignores is refused where its
rules are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel

from engine.config.options import LOSSES, Options

if TYPE_CHECKING:
    from engine.config.load import RunConfig


def broken_unused_rules(c: Options) -> list[str]:
    """Sentences with key, rule, values found and fix, for options that no command looks at."""
    broken: list[str] = []
    if c.sync.sync_interval != "auto":
        broken += _without(
            "sync", c.sync, "auto_", "sync.sync_interval = 'auto', which decides by it", repr(c.sync.sync_interval)
        )
    if c.reward_model.path is None:
        broken += _without("reward_model", c.reward_model, "", "reward_model.path, the model that it is of", "none")
    functions = [name for source in c.data.sources for name in (*source.rewards, source.reward_combine) if ":" in name]
    if c.rewards.function is None and not functions and c.rewards.environment:
        broken.append(
            f"rewards.environment is what reward functions of your own may see; found {list(c.rewards.environment)} and no "
            f"such function: name one in data.reward, or remove it"
        )
    return broken


def _without(table: str, section: BaseModel, prefix: str, needed: str, found: str) -> list[str]:
    """A sentence for each option of a table, of those that begin with `prefix`, that is not as it is by default."""
    return [
        f"{key} needs {needed}; found {value!r} with {found}: set that, or remove it (on a command line as {key}=)"
        for key, value in _changed(table, section).items()
        if key.removeprefix(f"{table}.").startswith(prefix)
    ]


class Rule(NamedTuple):
    """Options that change nothing in a training run in which `is_used` does not hold."""

    options: tuple[str, ...]  # keys, or the name of a table for all of its options
    is_used: Callable[[RunConfig], bool]
    needed: str  # what would look at them, and that it is not there


def _looks_at_reference(c: RunConfig) -> bool:
    return bool(LOSSES.load(c.algorithm.loss)(c.algorithm).needs_reference)


def _judges(c: RunConfig, *but: str) -> bool:
    """Whether a reward other than these judges."""
    return any(name not in but for source in c.data.sources for name in source.rewards)


def _keys(table: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{table}.{name}" for name in names)


ROLLOUTS = ("sampling", "inference", "rewards", "checkpoint", "records", "evaluation", "guard", "algorithm")
SYNC = (  # but bucket_mebibytes, in which weights are gathered for files too
    *("sync_interval", "auto_metric", "auto_bound", "auto_most", "reference", "reference_mix", "reference_log_probs"),
    *("semantics", "lookahead", "in_flight", "streaming", "transport", "timeout_seconds"),
)
PROMPTS = ("held_out", "reward", "reward_weights", "reward_combine", "prompts_per_step", "spare_prompts")
ENGINES = ("engines", "placement", "tensor_parallel", "max_concurrent", "kv_cache", "threads", "packed_weights", "quantization")
RULES = (
    Rule(
        (
            *(*ROLLOUTS, *_keys("sync", *SYNC), *_keys("data", *PROMPTS), "profile.engines"),
            *("run.restarts", "run.on_lost_node", "trainer.reference_memory", "optimizer.memory_while_sampling"),
        ),
        lambda c: c.sft.checkpoint_out is None,
        "supervised training (sft.checkpoint_out) samples, judges and saves nothing on the way",
    ),
    Rule(
        ("sft.sequences_per_step",),
        lambda c: c.sft.checkpoint_out is not None,
        "sft.checkpoint_out, which would make it supervised, is not set",
    ),
    Rule(
        (
            *(*_keys("inference", *ENGINES, "timeout_seconds", "vllm"), "sampling.stop", "profile.engines", "rewards"),
            *("sync.transport", "sync.timeout_seconds", "optimizer.memory_while_sampling"),
        ),
        lambda c: c.uses_engines,
        "with data.replay and no data.held_out no engine samples and nothing is judged",
    ),
    Rule(
        ("sampling.top_p", "sampling.top_k", "sampling.min_p", "records"),
        lambda c: c.data.replay is None,
        "with data.replay nothing is sampled to train on",
    ),
    Rule(
        ("sampling.temperature",),
        lambda c: c.data.replay is None or c.algorithm.uses_ratios,
        "with data.replay nothing is sampled to train on, and the loss compares with no probability of the rollouts",
    ),
    Rule(
        ("evaluation",),
        lambda c: any(source.held_out is not None for source in c.data.sources),
        "no problems are held out (data.held_out)",
    ),
    Rule(
        ("evaluation.top_p",),
        lambda c: c.evaluation.temperature > 0,
        "at evaluation.temperature = 0 the likeliest token is taken",
    ),
    Rule(
        _keys("guard", "entropy_share", "length_share", "truncated_share", "unjudged_share"),
        lambda c: c.guard.action != "off",
        "guard.action is 'off'",
    ),
    Rule(
        _keys("profile", "first_step", "num_steps", "ranks", "engines"),
        lambda c: c.profile.tool != "off",
        "profile.tool is 'off'",
    ),
    Rule(
        ("rewards.unevaluated",),
        lambda c: any("math" in source.rewards for source in c.data.sources),
        "no source has the reward 'math'",
    ),
    Rule(
        _keys("rewards", "workers", "concurrency", "deadline_seconds", "memory_mebibytes"),
        lambda c: _judges(c, "model") or any(":" in source.reward_combine for source in c.data.sources),
        "the reward model alone judges, in engines of its own",
    ),
    Rule(
        ("rewards.timeout_seconds",),
        lambda c: _judges(c, "math", "model", "function"),
        "no source has a Reward class of your own",
    ),
    Rule(
        ("sync.reference_log_probs",),
        lambda c: _looks_at_reference(c) and c.reference_source != "policy",
        "the loss looks at no reference, or at one that is copied from the policy before every step and known without",
    ),
    Rule(
        ("trainer.reference_memory",),
        lambda c: _looks_at_reference(c) and c.reference_source == "pass",
        "no copy of a reference is kept: the loss looks at none, or its log-probs are known without",
    ),
    Rule(
        ("algorithm.choose_truncated",),
        lambda c: c.sampling.truncated != "leave_out",
        "sampling.truncated = 'leave_out' leaves no response in a group that was cut off",
    ),
)


def unused_options(c: RunConfig) -> list[str]:
    """Sentences that name, each once, the options that are set and change nothing in a training run of this configuration."""
    told, known = list[str](), set[str]()
    for options, is_used, needed in RULES:
        if is_used(c):
            continue
        found: dict[str, object] = {}
        for option in options:
            table, _, name = option.partition(".")
            changed = _changed(table, getattr(c, table))
            found |= {key: value for key, value in changed.items() if not name or key == option}
        if new := {key: value for key, value in found.items() if key not in known}:
            known |= new.keys()
            listed = ", ".join(f"{key} = {value!r}" for key, value in new.items())
            told.append(f"{listed} {'changes' if len(new) == 1 else 'change'} nothing in this run, for {needed}")
    return told


def _changed(table: str, section: BaseModel) -> dict[str, object]:
    """The options of a table that are not as they are by default, with their values."""
    return {
        f"{table}.{name}": value
        for name, field in type(section).model_fields.items()
        if not field.is_required() and (value := getattr(section, name)) != field.default
    }
