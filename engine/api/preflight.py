"""Everything about a run that can be seen wrong before a process starts: files, rows, tokenizer, headers of weights, rewards,
checkpoints to resume from, disk and memory. All faults are told at once. It opens no device, starts no Ray and no engine, and
writes nothing; of large files it reads a sample, so that it takes seconds. What is looked at, subject by subject, stands in
engine/api/faults.

`semion check` is this and a table; train, sft, eval, rollout and generate run it first, each with what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import get_args

from engine.api.faults.data import data_faults
from engine.api.faults.directory import directory_faults, resume_faults
from engine.api.faults.look import Faults, Look, Purpose, caught, evaluated, parts_of
from engine.api.faults.machine import engine_cache_faults, machine_faults, storage_faults
from engine.api.faults.model import layout_faults, model_faults
from engine.api.faults.rewards import reward_faults
from engine.config.load import RunConfig
from engine.config.options import Source
from engine.core.errors import ConfigError, SemionError, combined, unique
from engine.observe.sinks.registry import check_sinks
from engine.run.spec import Spec, resolve


def check(config: RunConfig, purpose: Purpose | None = None, *, resume: bool = False) -> Spec:
    """The run as resolved, when nothing can be seen wrong with it. `purpose`: what is to be done with the configuration, to
    train where not said (supervised, where sft.checkpoint_out makes it that); `resume`: with --resume auto.

    Raises the SemionError whose `faults` are all that was found, of the first one's class.
    """
    purpose = purpose or purpose_of(config)
    if faults := examine(config, purpose, resume=resume):
        raise combined(faults)
    return resolve(config, parts_of(config, purpose), digests=purpose in ("train", "sft"))


def purpose_of(config: RunConfig) -> Purpose:
    """What a configuration is for where a command does not say."""
    return "train" if config.sft.checkpoint_out is None else "sft"


def examine(
    config: RunConfig,
    purpose: Purpose,
    *,
    resume: bool = False,
    sets: Mapping[str, Source] | None = None,
    unread: frozenset[str] = frozenset(),
) -> list[SemionError]:
    """Every fault that can be seen before a process starts, in the order to mend them. `sets`: other problems to evaluate than
    the configuration's. `unread`: sections that could not be read (`Reading`), which nothing is said of."""
    if purpose not in get_args(Purpose):
        raise ConfigError(f"purpose must be one of {', '.join(get_args(Purpose))}; found {purpose!r}: choose one")
    return faults_of(Look(config, purpose, resume, sets, unread))


def faults_of(look: Look) -> list[SemionError]:
    """What `examine` returns; the look keeps what was found on the way."""
    return unique(_all_faults(look))


def _all_faults(look: Look) -> list[SemionError]:
    if look.is_whole and (found := caught(_purpose_faults, look)):
        return found
    found = model_faults(look) if look.reads("model") else []
    data = caught(data_faults, look) if look.reads("data") else []
    rewards = caught(reward_faults, look)
    found += data + rewards
    directory: list[SemionError] = []
    if look.purpose in ("train", "sft") and look.reads("run"):
        directory = caught(directory_faults, look)
        found += directory + list(check_sinks(look.config.run.sinks))
        if not directory and look.is_whole:
            found += caught(partial(resume_faults, reads_data=not (data or rewards)), look)
    if not look.is_whole:  # what is left compares options with what they find, and some of them are unknown
        return found
    layouts = caught(layout_faults, look)
    found += layouts + caught(partial(machine_faults, layouts_fit=look.shape is not None and not layouts), look)
    if look.shape is not None:
        found += caught(engine_cache_faults, look)
        if not layouts and not directory:
            found += caught(storage_faults, look)
    return found


def _purpose_faults(look: Look) -> Faults:
    out, replay = look.config.sft.checkpoint_out, look.config.data.replay
    if look.purpose == "train" and out is not None:
        yield ConfigError(f"sft.checkpoint_out is for `semion sft`; found {out!r}: remove it")
    if look.purpose == "sft" and out is None:
        yield ConfigError("sft.checkpoint_out is required by `semion sft` and missing: name the folder to make")
    if look.purpose == "rollout" and replay is not None:
        yield ConfigError(f"data.replay is for `semion train`; found {replay!r}: remove it to sample rollouts")
    if look.purpose == "rollout":
        yield from _unkept_faults(look.config)
    if look.purpose == "eval" and not evaluated(look.config, look.sets):
        yield ConfigError("data.held_out is required by `semion eval` and missing: name a file of problems, or --suite")


def _unkept_faults(config: RunConfig) -> Faults:
    """What `semion rollout` writes is there to be trained on, so nothing of it may be left out."""
    records = config.records
    if not (records.tokens and records.log_probs):
        yield ConfigError(
            f"records.rollouts must name 'tokens' and 'log_probs' for `semion rollout`, whose rollouts are there to be trained "
            f"on; found {list(records.rollouts)}: add what is missing"
        )
    if records.keep_steps is not None:
        yield ConfigError(
            f"records.keep_steps must be unset for `semion rollout`, whose rollouts are there to be trained on; found "
            f"{records.keep_steps}: remove it"
        )
