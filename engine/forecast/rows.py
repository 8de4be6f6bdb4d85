"""The packed rows of a step, as the trainer lays them out, in the two figures that their time follows from. The rows themselves
are megatron/packing.py's; this is the only file of the forecast that looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from engine.config.options import Trainer
from engine.megatron.dealing import deal_rows, room_of
from engine.megatron.outlines import Costs, Outline


@dataclass(frozen=True, slots=True)
class RowSize:
    """A packed row."""

    tokens: int  # padding included
    held: int  # without it; a prompt that samples share counts once
    targets: int  # tokens that the output layer is computed for
    looks: float  # pairs of a token and one it attends to

    @property
    def is_empty(self) -> bool:
        """Whether it is padding alone."""
        return not self.held


@dataclass(frozen=True, slots=True)
class RankRows:
    """The rows of a data-parallel rank."""

    rows: tuple[RowSize, ...]
    scored: tuple[RowSize, ...]  # those with groups that are split over rows or ranks, which the policy scores first


class Rows:
    """The rows of steps, laid out once for all layouts of the trainer that lay them out alike: of the ranks that compute a row
    together only its padding tells. A search has many such layouts."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[float, ...]], tuple[Many[Outline], list[RankRows]]] = {}

    def of_step(
        self, outlines: Many[Outline], trainer: Trainer, attention_cost: float, *, cuts_groups: bool = False
    ) -> list[RankRows]:
        """As `rows_of_step`."""
        whole = trainer.row_multiple == trainer.microbatch_tokens
        alike = (
            trainer.data_parallel,
            trainer.pipeline_parallel,
            trainer.virtual_pipeline,
            trainer.shares_prompts,
            trainer.microbatch_tokens,
            room_of(trainer),
            whole,
            attention_cost,
            cuts_groups,
        )
        key = (id(outlines), alike)
        if key not in self._found:  # beside the outlines, since an id is of one object only as long as that is there
            self._found[key] = (outlines, _laid_out(outlines, trainer, attention_cost, cuts_groups))
        return _padded(self._found[key][1], trainer.row_multiple)


def rows_of_step(
    outlines: Many[Outline], trainer: Trainer, attention_cost: float, *, cuts_groups: bool = False
) -> list[RankRows]:
    """Of every data-parallel rank; `attention_cost`: ModelShape's; `cuts_groups`: see deal_step. ConfigError when a sequence
    exceeds trainer.microbatch_tokens."""
    return _padded(_laid_out(outlines, trainer, attention_cost, cuts_groups), trainer.row_multiple)


def _laid_out(outlines: Many[Outline], trainer: Trainer, attention_cost: float, cuts_groups: bool) -> list[RankRows]:
    """Rows without padding."""
    costs = Costs(trainer.shares_prompts, attention_cost)
    dealt = deal_rows(outlines, trainer, costs, cuts_groups=cuts_groups)
    ranks = []
    for rows, split in zip(dealt.rows, dealt.split, strict=True):
        sizes = [_size(row, costs) for row in rows]
        scored = [size for size, row in zip(sizes, rows, strict=True) if any(one.group in split for one in row)]
        ranks.append(RankRows(tuple(sizes), tuple(scored)))
    return ranks


def _padded(ranks: list[RankRows], multiple: int) -> list[RankRows]:
    """With every row as long as a multiple of so many tokens, and none of no tokens."""

    def padded(rows: tuple[RowSize, ...]) -> tuple[RowSize, ...]:
        return tuple(replace(row, tokens=-(-max(1, row.held) // multiple) * multiple) for row in rows)

    return [RankRows(padded(rank.rows), padded(rank.scored)) for rank in ranks]


def _size(row: Many[Outline], costs: Costs) -> RowSize:
    held, looks, targets = 0, 0.0, 0
    for members in costs.by_prompt(row):
        held += costs.tokens_of(members)
        looks += costs.looks_of(members)
        targets += sum(one.num_completion for one in members)
    return RowSize(held, held, targets, looks)
