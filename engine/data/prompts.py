"""The prompts of a source and the order they come in. The order is arithmetic on (seed, step), so nothing of it is saved
and a resumed run goes on where it stood. Sampling and scoring happen elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import DataError
from engine.core.seeds import counted_seed
from engine.core.types import Prompt
from engine.data.rows import Row, problem_id
from engine.data.templates import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptSet:
    """All prompts of a file, tokenized, with what was left out."""

    prompts: tuple[Prompt, ...]  # in the order of the rows
    num_dropped: int  # longer than max_prompt_tokens
    num_duplicates: int  # a problem that came before, here or in an earlier source

    def __str__(self) -> str:
        return f"{len(self.prompts)} prompts; left out: {self.num_dropped} too long, {self.num_duplicates} that came before"

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row],
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_prompt_tokens: int,
        *,
        reward: str = "math",
        verifiable: bool = True,
        before: Iterable[Prompt] = (),
    ) -> PromptSet:
        """Tokenizes each row once; `reward` is to judge them all, right or wrong where it is
        `verifiable`. A prompt's id is the row's own or the first 16 hex digits of
        its problem's SHA-256. `before`: the prompts of earlier sources, whose problems are not taken again.

        Raises DataError when one id stands for two problems or when no prompt is left, ConfigError when the tokenizer
        has no chat template.
        """
        prompts: list[Prompt] = []
        by_id = {prompt.id: prompt.problem for prompt in before}
        problems = set(by_id.values())
        num_dropped = num_duplicates = 0
        for row in rows:
            if row.problem in problems:
                num_duplicates += 1
                continue
            problems.add(row.problem)
            prompt_id = row.id or problem_id(row.problem)
            if prompt_id in by_id:
                raise DataError(
                    f"`id` must name one problem; found {prompt_id!r} for {by_id[prompt_id][:60]!r} and "
                    f"{row.problem[:60]!r}: change one, or remove the `id` fields"
                )
            by_id[prompt_id] = row.problem
            token_ids = encode_prompt(tokenizer, row.problem, template)
            if len(token_ids) > max_prompt_tokens:
                num_dropped += 1
                continue
            texts = row.problem, row.answer, row.solution, row.source
            prompts.append(Prompt(prompt_id, token_ids, *texts, reward, verifiable, row.columns))
        if not prompts:
            raise DataError(
                f"at least one prompt must fit data.max_prompt_tokens; found {num_dropped} longer than "
                f"{max_prompt_tokens}, {num_duplicates} that came before and no other: raise data.max_prompt_tokens, or name "
                f"other data"
            )
        return cls(tuple(prompts), num_dropped, num_duplicates)


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
