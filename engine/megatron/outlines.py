"""What of a training sequence decides where it is laid, and what a packed row of such costs. No tokens.

What is dealt is a unit: the sequences of a group, whose loss couples them, or, where prompts are shared, all that have one
prompt.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass

from engine.core.arrays import TokenIds
from engine.core.types import Sequence


@dataclass(frozen=True, slots=True)
class Outline:
    """What of a sequence decides where it is laid."""

    place: int  # in the step
    num_prompt: int
    num_completion: int
    group: int
    prompt: int  # equal where the prompt's tokens are

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion together."""
        return self.num_prompt + self.num_completion


@dataclass(frozen=True, slots=True)
class Costs:
    """What a row costs: whether prompts are shared, and what a query's look at a key costs next to the products of a token."""

    shares_prompts: bool
    attention: float = 0.0

    def num_tokens(self, outlines: Many[Outline]) -> int:
        """Tokens of a row with these sequences. A shared prompt counts once, without its last token, which every sample begins
        with; the last token of a sample that shares predicts nothing and is left out."""
        return sum(self.tokens_of(members) for members in self.by_prompt(outlines))

    def tokens_of(self, members: Many[Outline]) -> int:
        """Tokens of sequences that `by_prompt` put together."""
        if len(members) == 1:
            return members[0].num_tokens
        return members[0].num_prompt - 1 + sum(one.num_completion for one in members)

    def by_prompt(self, outlines: Many[Outline]) -> list[list[Outline]]:
        """The sequences of a row that share a prompt together, in the order of their first; one by one where none is shared."""
        if not self.shares_prompts or len(outlines) == 1:
            return [[one] for one in outlines]
        found: dict[int, list[Outline]] = {}
        for one in outlines:
            found.setdefault(one.prompt, []).append(one)
        return list(found.values())

    def work(self, outlines: Many[Outline]) -> float:
        """What a row with these sequences costs, in tokens of short sequences."""
        return self.size(outlines)[0]

    def size(self, outlines: Many[Outline]) -> tuple[float, int]:
        """(work, tokens) of a row with these sequences."""
        if len(outlines) == 1:
            tokens = outlines[0].num_prompt + outlines[0].num_completion
            return tokens + self.attention * (tokens**2 / 2), tokens
        first = outlines[0].prompt if outlines else -1
        if self.shares_prompts and all([one.prompt == first for one in outlines]):
            prompt = outlines[0].num_prompt - 1 if outlines else 0
            completions = [one.num_completion for one in outlines]
            tokens = prompt + sum(completions)
            looks = prompt**2 / 2 + sum([count * (prompt + count / 2) for count in completions])
            return tokens + self.attention * looks, tokens
        work, num_tokens = 0.0, 0
        for members in self.by_prompt(outlines):
            tokens = self.tokens_of(members)
            work += tokens + self.attention * self.looks_of(members)
            num_tokens += tokens
        return work, num_tokens

    def looks_of(self, members: Many[Outline]) -> float:
        """Pairs of a token and one that it attends to, of sequences that `by_prompt` put together."""
        if len(members) == 1:
            return members[0].num_tokens ** 2 / 2
        prompt = members[0].num_prompt - 1
        return prompt**2 / 2 + sum(one.num_completion * (prompt + one.num_completion / 2) for one in members)


def outlines_of(sequences: Many[Sequence]) -> list[Outline]:
    """The outlines of sequences in hand."""
    prompts: dict[TokenIds, int] = {}
    return [
        Outline(i, len(s.prompt_ids), len(s.completion_ids), s.group, prompts.setdefault(s.prompt_ids, len(prompts)))
        for i, s in enumerate(sequences)
    ]


def units_of(outlines: Many[Outline], costs: Costs) -> list[list[Outline]]:
    """What is dealt together, at the place of its first sequence."""
    units: dict[tuple[str, int], list[Outline]] = {}
    of_prompt = {one.prompt: ("group", one.group) for one in reversed(outlines) if one.group >= 0}
    for one in outlines:
        assert one.num_prompt and one.num_completion, "a sequence needs a prompt and a completion"
        if one.group >= 0:
            key = ("group", one.group)
        elif costs.shares_prompts:
            key = of_prompt.get(one.prompt, ("prompt", one.prompt))
        else:
            key = ("place", one.place)
        units.setdefault(key, []).append(one)
    return list(units.values())


def whole_groups(unit: list[Outline], split: Collection[int]) -> list[list[Outline]]:
    """The sequences of a unit one by one, those of a group that is not split together."""
    together = [one for one in unit if one.group >= 0 and one.group not in split]
    if len(together) == len(unit):
        return [unit]
    return ([together] if together else []) + [[one] for one in unit if one.group < 0 or one.group in split]
