"""Deals the training sequences of a step to data-parallel ranks and to packed rows, always the same way for the same lengths,
groups and prompts. It sees outlines, no tokens; balancing.py balances them, and packing.py then writes the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import chain

from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.megatron.balancing import deal_to_ranks
from engine.megatron.outlines import Costs, Outline, units_of, whole_groups
from engine.megatron.pipelined_rows import pipelined_rows
from engine.megatron.row_filling import Pieces

Rows = list[list[Outline]]


@dataclass(frozen=True, slots=True)
class Share:
    """What one data-parallel rank is dealt of a step, with the counts of the whole step."""

    step: int
    rows: tuple[tuple[Outline, ...], ...]  # packed rows, equally many on every rank; some may be empty
    num_spread_rows: int  # of them, the first ones: with groups that other ranks have parts of, and nothing else
    split: frozenset[int]  # groups of this rank that are split over several rows or ranks
    num_spread_groups: int  # of the step, which several ranks have parts of
    num_prompts: int  # all prompts of the step, skipped ones included
    num_groups: int
    num_target_tokens: int
    num_sequence_tokens: int  # a prompt counted for each of its samples
    num_saved_tokens: int  # of them, what rows do not hold since samples share prompts


def deal_step(
    outlines: Many[Outline],
    *,
    step: int,
    num_prompts: int,
    trainer: Trainer,
    attention: float = 0.0,
    cuts_groups: bool = False,
) -> list[Share]:
    """The share of every data-parallel rank, from what decides it alone. `attention`: see Costs; `cuts_groups`: whether the
    loss of a group can be computed over several ranks. ConfigError when a sequence exceeds trainer.microbatch_tokens."""
    costs = Costs(trainer.shares_prompts, attention)
    dealt = deal_rows(outlines, trainer, costs, cuts_groups=cuts_groups)
    num_tokens = sum(outline.num_tokens for outline in outlines)
    counts = {
        "num_spread_groups": len(dealt.spread),
        "num_prompts": num_prompts,
        "num_groups": len({outline.group for outline in outlines} - {-1}),
        "num_target_tokens": sum(outline.num_completion for outline in outlines),
        "num_sequence_tokens": num_tokens,
        "num_saved_tokens": sum(_saved(row) for of_rank in dealt.rows for row in of_rank) if costs.shares_prompts else 0,
    }
    return [
        Share(step, tuple(map(tuple, rows)), _num_spread(rows, dealt.spread), split, **counts)
        for rows, split in zip(dealt.rows, dealt.split, strict=True)
    ]


def _saved(row: Many[Outline]) -> int:
    """Tokens that a row does not hold since samples share prompts: of each shared one all but one copy, and its last token."""
    prompts = {one.prompt: one.num_prompt for one in row}
    if len(prompts) == len(row):
        return 0
    counts = Counter([one.prompt for one in row])
    return sum((count - 1) * prompts[prompt] + 1 for prompt, count in counts.items() if count > 1)


def _num_spread(rows: Many[Many[Outline]], spread: Collection[int]) -> int:
    """The rows, which are the first ones, with sequences of groups that are spread over ranks."""
    return sum(bool(row) and row[0].group in spread for row in rows)


@dataclass(frozen=True, slots=True)
class Dealt:
    """A step's sequences in rows."""

    rows: list[Rows]  # of every data-parallel rank, equally many on each; some may be empty
    split: list[frozenset[int]]  # of every rank its groups that are split over several rows or ranks
    spread: frozenset[int]  # the groups that several ranks have parts of


def deal_rows(outlines: Many[Outline], trainer: Trainer, costs: Costs, *, cuts_groups: bool = False) -> Dealt:
    """Deals sequences to ranks and lays those of each into rows; `cuts_groups` and what is raised: see deal_step."""
    row = room_of(trainer)
    parts = split_over_ranks(outlines, trainer.data_parallel, costs, row=row, cuts_groups=cuts_groups)
    held = [{one.group for one in part} - {-1} for part in parts]
    spread = frozenset(group for group, ranks in Counter(chain.from_iterable(held)).items() if ranks > 1)
    split = [frozenset(too_large(part, trainer, costs) | (groups & spread)) for part, groups in zip(parts, held, strict=True)]
    rows = pack_rows(parts, split, spread, trainer, costs)
    _refuse_to_lose(outlines, chain.from_iterable(rows))
    return Dealt(rows, split, spread)


def _refuse_to_lose(outlines: Many[Outline], rows: Iterable[Many[Outline]]) -> None:
    """A sequence that were lost or doubled on the way to rows would change what is trained on, and nothing else would tell."""
    given, laid = Counter([one.place for one in outlines]), Counter([one.place for row in rows for one in row])
    assert laid == given, f"places of the step that rows lack: {list(given - laid)}; that they have again: {list(laid - given)}"


def split_over_ranks(
    outlines: Many[Outline], num_ranks: int, costs: Costs, *, row: int | None = None, cuts_groups: bool = False
) -> list[list[Outline]]:
    """Deals sequences to ranks, the largest unit to the least loaded rank first, or fitted where that is more even; all of a
    group to one rank, unless `cuts_groups` and what is won exceeds the forward more that a cut group needs, which one of more
    tokens than a `row` needs anyway.

    Every rank's sequences keep the given order; ties go to the lower rank.
    """
    return deal_to_ranks(units_of(outlines, costs), num_ranks, costs, row=row, cuts_groups=cuts_groups)


def pack_rows(
    parts: Many[Many[Outline]], split: Many[Collection[int]], spread: Collection[int], trainer: Trainer, costs: Costs
) -> list[list[list[Outline]]]:
    """The packed rows of every data-parallel rank, of at most trainer.microbatch_tokens, equally many on each; a rank with
    fewer sequences has empty ones. A group's sequences stand in one row, but for the groups in `split`, whose sequences have
    rows of their own, since the policy scores these first: the first rows where they are `spread` over ranks, others behind
    them. ConfigError for a sequence that is larger than a row.

    Without a pipeline rows are as few as first fit makes them. With one pipelined_rows.py says how many there are and in which
    order, unless every row is padded to its largest length.
    """
    room, kinds = room_of(trainer), [_kinds(part, apart, spread) for part, apart in zip(parts, split, strict=True)]
    _refuse_longer(parts, room, trainer.row_multiple)
    if trainer.pipeline_parallel > 1 and trainer.row_multiple < trainer.microbatch_tokens:
        return pipelined_rows(
            [[Pieces(kind, apart, room, costs) for kind in of_rank] for of_rank, apart in zip(kinds, split, strict=True)],
            spread,
            trainer,
        )
    rows = [
        [row for kind in of_rank for row in _fit(kind, apart, room, costs)] for of_rank, apart in zip(kinds, split, strict=True)
    ]
    together = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1  # virtual stages take rows in groups
    num_rows = -(-max(1, *map(len, rows)) // together) * together
    return [own + [[] for _ in range(num_rows - len(own))] for own in rows]


def _refuse_longer(parts: Many[Many[Outline]], room: int, multiple: int) -> None:
    longest = max((one.num_prompt + one.num_completion for part in parts for one in part), default=0)
    if longest > room:
        raise ConfigError(
            f"trainer.microbatch_tokens must hold a sequence; found {room} < {longest}: raise it "
            f"to {-(-longest // multiple) * multiple}, or shorten data.max_prompt_tokens or sampling.max_tokens"
        )


def too_large(outlines: Many[Outline], trainer: Trainer, costs: Costs) -> set[int]:
    """The groups that are larger than a row."""
    groups: dict[int, list[Outline]] = {}
    tokens = Counter[int]()
    for one in outlines:
        if one.group >= 0:
            groups.setdefault(one.group, []).append(one)
            tokens[one.group] += one.num_prompt + one.num_completion
    room = room_of(trainer)
    return {group for group, members in groups.items() if tokens[group] > room and costs.num_tokens(members) > room}


def room_of(trainer: Trainer) -> int:
    """The most tokens of a row, which is a multiple of trainer.row_multiple."""
    return trainer.microbatch_tokens - trainer.microbatch_tokens % trainer.row_multiple


@dataclass
class _Open:
    """A row that takes more."""

    outlines: list[Outline] = field(default_factory=list)
    used: int = 0
    prompts: dict[int, list[Outline]] = field(default_factory=dict)

    def growth(self, unit: list[Outline], size: int, costs: Costs) -> int:
        """Tokens that it grows by; `size`: what the unit takes by itself."""
        if not costs.shares_prompts or self.prompts.keys().isdisjoint([one.prompt for one in unit]):
            return size
        total = 0
        for members in costs.by_prompt(unit):
            there = self.prompts.get(members[0].prompt, [])
            total += costs.tokens_of(there + members) - (costs.tokens_of(there) if there else 0)
        return total

    def take(self, unit: list[Outline], size: int, costs: Costs) -> None:
        """Adds the unit."""
        self.used += self.growth(unit, size, costs)
        self.outlines += unit
        for one in unit:
            self.prompts.setdefault(one.prompt, []).append(one)


def _kinds(outlines: Many[Outline], split: Collection[int], spread: Collection[int]) -> list[list[Outline]]:
    """What has rows of its own: the sequences of groups that are spread over ranks, of others that are split, and all others,
    as far as there are any."""
    kinds: tuple[list[Outline], list[Outline], list[Outline]] = [], [], []
    for one in outlines:
        kinds[0 if one.group in spread else 1 if one.group in split else 2].append(one)
    return [kind for kind in kinds if kind]


def _fit(outlines: list[Outline], split: Collection[int], room: int, costs: Costs) -> Rows:
    """As few rows as first fit in the given order makes. The sequences of a unit that is larger than a row are laid out one by
    one, those of a group that is not split together."""
    rows, units = list[_Open](), units_of(outlines, costs)
    if outlines and costs.num_tokens(outlines) <= room:
        return [[one for unit in units for one in unit]]

    def place(unit: list[Outline], size: int) -> None:
        least = sum(one.num_completion - 1 for one in unit)  # where the prompts are there already
        fitting = (row for row in rows if row.used + least <= room and row.used + row.growth(unit, size, costs) <= room)
        chosen = next(fitting, None)
        if chosen is None:
            rows.append(chosen := _Open())
        chosen.take(unit, size, costs)

    for unit in units:
        if (size := costs.num_tokens(unit)) <= room:
            place(unit, size)
            continue
        for part in whole_groups(unit, split):
            place(part, costs.num_tokens(part))
    return [row.outlines for row in rows]
