"""Prompts, completions and sequences of plain Python numbers, as tests write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from engine.core.arrays import LogProbs, TokenIds
from engine.core.types import Completion, Prompt, Sequence


def make_prompt(
    id: str, token_ids: Iterable[int], problem: str, answer: str, solution: str, source: str, *more: Any, **named: Any
) -> Prompt:
    """Further arguments as Prompt has them."""
    return Prompt(id, TokenIds.of(token_ids), problem, answer, solution, source, *more, **named)


def make_completion(
    prompt_id: str,
    sample_index: int,
    seed: int,
    version: int,
    token_ids: Iterable[int],
    log_probs: Iterable[float],
    text: str,
    finish_reason: Literal["stop", "length"],
    **named: Any,
) -> Completion:
    """Further arguments as Completion has them."""
    numbers = TokenIds.of(token_ids), LogProbs.of(log_probs)
    return Completion(prompt_id, sample_index, seed, version, *numbers, text, finish_reason, **named)


def make_sequence(
    prompt_ids: Iterable[int], completion_ids: Iterable[int], log_probs: Iterable[float] = (), *more: Any, **named: Any
) -> Sequence:
    """Further arguments as Sequence has them."""
    return Sequence(TokenIds.of(prompt_ids), TokenIds.of(completion_ids), LogProbs.of(log_probs), *more, **named)
