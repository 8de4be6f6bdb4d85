"""What the loop asks of a reward: one verb over a list of answers, and an end. How a reward judges (a verifier in
worker processes, a reward model on an engine) is the business of its own file, not of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.core.types import Prompt, Score


class Reward(Protocol):
    """Judges completions; may hold processes or devices until closed."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """One score for each (prompt, completion text), in the order given. An answer that cannot be judged is a
        score with a status, never an exception.
        """
        ...

    def close(self) -> None:
        """Gives back all processes and devices; a second call does nothing."""
        ...
