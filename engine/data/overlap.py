"""Whether problems that a run is judged by are also trained on: digests of what prompts ask, without what does not change a
problem (case, white space, LaTeX spacing). Two that are worded differently are two problems here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from engine.core.types import Message
from engine.data.filters import normalized

SHOWN = 3  # beginnings of problems in a sentence


def prompt_digest(problem: str, messages: tuple[Message, ...] = ()) -> bytes:
    """What two prompts that ask the same have in common, in 16 bytes: what users say in them, whatever system prompt and
    answers are between."""
    asked = "\n".join(text for role, text in messages if role == "user") or problem
    return hashlib.blake2b(normalized(asked).encode(), digest_size=16).digest()


def shared(held_out: Iterable[tuple[str, tuple[Message, ...]]], trained: Collection[bytes]) -> list[str]:
    """The problems of (problem, messages) whose digests are among the `trained`."""
    return [problem for problem, messages in held_out if prompt_digest(problem, messages) in trained]


def overlap_warning(key: str, num_held_out: int, found: list[str]) -> str:
    """The sentence about problems of the option `key` that are trained on; empty without any."""
    if not found:
        return ""
    examples = ", ".join(repr(problem[:40]) for problem in found[:SHOWN])
    return (
        f"{key}: {len(found)} of {num_held_out} problems are also trained on, such as {examples}: its figures say little of "
        f"others; leave them out of the training data (`semion prepare --exclude` does)"
    )
