"""The prompts of a source and the order they come in. The order is arithmetic on (seed, step), so nothing of it is saved
and a resumed run goes on where it stood. Sampling and scoring happen elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.core.arrays import TokenIds
from engine.core.errors import DataError
from engine.core.seeds import counted_seed
from engine.core.types import Prompt
from engine.data.rows import Row, identity, problem_id
from engine.data.templates import LeftOut, PromptForm, fit_prompt

LARGE_SHARE = 0.05  # of the rows of a file left out for their length, above which people are warned
MOST = 0.99  # of the rows that a limit worth telling keeps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED, ASKED = "data.max_prompt_tokens", "inference.max_model_tokens - sampling.max_tokens"  # what bounds prompts


@dataclass(frozen=True, slots=True)
class PromptSet:
    """All prompts of a file, tokenized, with what was left out."""

    prompts: tuple[Prompt, ...]  # in the order of the rows
    num_dropped: int  # longer than max_prompt_tokens
    num_duplicates: int  # a problem that came before, here or in an earlier source
    num_special: int = 0  # spell special tokens, which the tokenizer cannot keep text
    warning: str = ""  # what is to be said where many prompts were too long

    def __str__(self) -> str:
        spell = f", {self.num_special} that spell special tokens" if self.num_special else ""
        return (
            f"{len(self.prompts)} prompts; left out: {self.num_dropped} too long, {self.num_duplicates} that came before{spell}"
        )

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row],
        tokenizer: PreTrainedTokenizerBase,
        template: str | PromptForm,
        max_prompt_tokens: int,
        *,
        reward: str = "math",
        verifiable: bool = True,
        before: Iterable[Prompt] = (),
        limit: str = TRAINED,
    ) -> PromptSet:
        """Tokenizes each row once; `reward` is to judge them all, right or wrong where it is
        `verifiable`. A prompt's id is the row's own or the first 16 hex digits of
        its problem's SHA-256. `before`: the prompts of earlier sources, whose problems are not taken again.
        `limit`: what `max_prompt_tokens` is, for messages.

        Raises DataError when one id stands for two problems, when the chat template refuses a conversation, or when no
        prompt is left, ConfigError when there is no chat template.
        """
        form = PromptForm(template) if isinstance(template, str) else template
        prompts: list[Prompt] = []
        by_id = {prompt.id: identity(prompt.problem, prompt.messages) for prompt in before}
        seen = set(by_id.values())
        left_out: list[LeftOut] = []
        num_duplicates = 0
        for row in rows:
            asked = identity(row.problem, row.messages)
            if asked in seen:
                num_duplicates += 1
                continue
            seen.add(asked)
            prompt_id = row.id or problem_id(asked)
            if prompt_id in by_id:
                raise DataError(
                    f"`id` must name one problem; found {prompt_id!r} for {by_id[prompt_id][:60]!r} and "
                    f"{asked[:60]!r}: change one, or remove the `id` fields"
                )
            by_id[prompt_id] = asked
            try:
                token_ids = fit_prompt(tokenizer, row.problem, row.messages, form, max_prompt_tokens)
            except DataError as error:
                raise DataError(f"{row.where or 'a row'}: {error}") from error
            if isinstance(token_ids, LeftOut):
                left_out.append(token_ids)
                continue
            texts = row.problem, row.answer, row.solution, row.source
            prompts.append(Prompt(prompt_id, TokenIds.of(token_ids), *texts, reward, verifiable, row.columns, row.messages))
        long = [found for found in left_out if found.why == "too_long"]
        num_special = len(left_out) - len(long)
        if not prompts:
            spell = f", {num_special} that spell special tokens" if num_special else ""
            raise DataError(
                f"at least one prompt must fit {limit}; found {len(long)} longer than "
                f"{max_prompt_tokens}, {num_duplicates} that came before{spell} and no other: raise it, or name other data"
            )
        warning = length_warning([len(prompt.token_ids) for prompt in prompts], long, limit)
        return cls(tuple(prompts), len(long), num_duplicates, num_special, warning)


def length_warning(lengths: Sequence[int], left_out: Sequence[LeftOut], bound: str = TRAINED) -> str:
    """What is to be said where many prompts were too long, with the limit that would keep most; empty where few were.
    `lengths`: of the prompts that were kept; `bound`: what they are bounded by."""
    long = [found for found in left_out if found.why == "too_long"]
    total = len(lengths) + len(long)
    if len(long) <= LARGE_SHARE * total:
        return ""
    tokenized = sorted([*lengths, *(found.num_tokens for found in long if found.is_exact)])
    wanted = math.ceil(MOST * total)
    # those that were not tokenized count as longer than all others, so that the limit keeps as many as it says, or more
    lost = "left out" if bound == TRAINED else "counted as wrong"
    limit = f"{tokenized[wanted - 1]} would keep {MOST:.0%}" if wanted <= len(tokenized) else _least(long)
    return f"{len(long) / total:.0%} of the prompts are longer than {bound} and {lost}; {limit}"


def _least(long: Sequence[LeftOut]) -> str:
    """What can be said of the limit where more than 1 % were too long to be tokenized."""
    least = min(found.num_tokens for found in long if not found.is_exact)
    return f"to keep {MOST:.0%} it would have to be {least} at least"


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """Which prompts a step uses: one seeded permutation after another (epochs), cut into steps. A step may span epochs; one
    that wants more prompts than there are wraps around. No step holds a prompt twice while others wait: in the step that an
    epoch begins in, those that stand in it already come after the others, and they are the first of the next step."""

    num_prompts: int
    seed: int

    def at(self, step: int, prompts_per_step: int) -> list[int]:
        """Indices of the prompts of `step` (from 0), a pure function of the arguments and the fields."""
        first = step * prompts_per_step
        return [self._index(position, prompts_per_step) for position in range(first, first + prompts_per_step)]

    def _index(self, position: int, prompts_per_step: int) -> int:
        epoch, offset = divmod(position, self.num_prompts)
        return int(_epoch_order(self.seed, epoch, self.num_prompts, prompts_per_step)[offset])


@lru_cache(maxsize=8)  # a step touches one epoch or two of each source
def _epoch_order(seed: int, epoch: int, num_prompts: int, prompts_per_step: int) -> NDArray[np.int64]:
    """[num_prompts] int64, the permutation of the epoch but for the step that it begins in.

    That depends on the end of the epoch which that step begins in, and so on back: to an epoch that begins with a step or lies
    in one, or where epochs are long to the one before, whose end is its permutation's.
    """
    chain = [epoch]  # each one's order depends on that of the next
    while not _is_plain(chain[-1], num_prompts, prompts_per_step):
        if len(chain) == 2 and num_prompts >= 2 * prompts_per_step:
            break
        chain.append(chain[-1] - 1 - chain[-1] * num_prompts % prompts_per_step // num_prompts)
    order = _permutation(seed, chain.pop(), num_prompts)
    while chain:
        before = chain[-1] * num_prompts % prompts_per_step  # places of the step taken by earlier epochs
        often = np.zeros(num_prompts, dtype=np.int64)
        often[order[num_prompts - before % num_prompts :]] = 1  # whole epochs in between hold every prompt alike
        permutation = _permutation(seed, chain.pop(), num_prompts)
        taken = np.argsort(often[permutation], kind="stable")[: prompts_per_step - before]
        order = np.concatenate([permutation[taken], np.delete(permutation, taken)])
    return order


def _is_plain(epoch: int, num_prompts: int, prompts_per_step: int) -> bool:
    """Whether the epoch's order is its permutation: it begins with a step, or lies within one."""
    before = epoch * num_prompts % prompts_per_step
    return before == 0 or before + num_prompts <= prompts_per_step


@lru_cache(maxsize=8)  # a step touches one epoch or two of each source
def _permutation(seed: int, epoch: int, num_prompts: int) -> NDArray[np.int64]:
    """[num_prompts] int64. Sorts raw counter-based words (Philox), whose stream numpy keeps stable over versions."""
    words = np.random.Philox(key=counted_seed(seed, "prompt order", epoch)).random_raw(num_prompts)
    return np.argsort(words, kind="stable")
