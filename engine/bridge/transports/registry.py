"""The transports by name: which one carries a run's weight syncs, and its opening."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist

from engine.bridge.transports.base import Rendezvous, Transport, TransportError, first_line
from engine.config.transport import AUTO, TRANSPORTS, Setting
from engine.core.errors import ConfigError
from engine.core.registry import portable


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport of a run, and why it is not a faster one that the user could have; empty where there is none."""

    name: str
    reason: str = ""


def kind_of(name: str) -> type[Transport]:
    """The class of a transport. ConfigError for a name without one."""
    kind = TRANSPORTS.load(name)
    assert isinstance(kind, type) and issubclass(kind, Transport), kind
    return kind


def choose(asked: str, setting: Setting) -> Choice:
    """What carries weight syncs there: what is asked for, or for 'auto' the first of the engine's that fits, in the order of
    their `preference`. ConfigError where that, or nothing, fits."""
    ranked = sorted(TRANSPORTS.names, key=lambda name: kind_of(name).preference)
    refused = {name: kind_of(name).fits(setting) for name in ranked}
    fit = next((name for name, why in refused.items() if why is None), None)
    if asked != AUTO:
        why = kind_of(asked).fits(setting)
        if why is not None:
            instead = f"use 'auto', which takes {fit} here" if fit else "no transport of the engine fits here"
            raise ConfigError(f"sync.transport = {asked!r} {why}: {instead}")
        return Choice(portable(asked))
    if fit is None:
        reasons = "; ".join(f"{name} {why}" for name, why in refused.items())
        raise ConfigError(f"sync.transport = 'auto' needs a transport that fits; found none ({reasons}): name one of your own")
    for faster in ranked[: ranked.index(fit)]:
        if kind_of(faster).fits(replace(setting, has_room=True)) is None:
            return Choice(fit, f"weight syncs go over {fit}: {faster} would be faster, but it {refused[faster]}")
    return Choice(fit)


def open_transport(name: str, store: dist.Store, member: int, meeting: Rendezvous) -> Transport:
    """Joins the members of this epoch; collective over all of them. TransportError when they do not come in time."""
    kind = kind_of(name)
    try:
        return kind.open(dist.PrefixStore(f"epoch {meeting.epoch}", store), member, meeting)
    except RuntimeError as error:
        raise TransportError(f"member {member} did not meet the others: {first_line(error)}") from error
