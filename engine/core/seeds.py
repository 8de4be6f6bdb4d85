"""Counted randomness: every random choice of a run is a pure function of what it is for, never of a stream's position.
So neither the number of engines, nor the order of arrival, nor a resume changes a run.
"""

from __future__ import annotations

import hashlib


def counted_seed(run_seed: int, purpose: str, *parts: int | str) -> int:
    """A seed in [0, 2**63) from the run's seed, what it is for, and the numbers and ids that name one use of it."""
    text = "\x1f".join([str(run_seed), purpose, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
