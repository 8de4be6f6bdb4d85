"""The packed rows of a step, as the trainer lays them out, in the two figures that their time follows from. The rows themselves
are megatron/packing.py's; this is the only file of the forecast that looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from engine.config.options import Trainer
from engine.megatron.dealing import Costs, Outline, pack_rows, room_of, split_groups, split_over_ranks


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
    splits: bool  # whether some group is split over rows: the policy then scores all of them first


class Rows:
    """The rows of steps, laid out once for all layouts of the trainer that lay them out alike: of the ranks that compute a row
    together only its padding tells. A search has many such layouts."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[float, ...]], tuple[Many[Outline], list[RankRows]]] = {}

    def of_step(self, outlines: Many[Outline], trainer: Trainer, attention_cost: float) -> list[RankRows]:
        """As `rows_of_step`."""
        whole = trainer.row_multiple == trainer.microbatch_tokens
        alike = (
            trainer.data_parallel,
            trainer.pipeline_parallel,
            trainer.virtual_pipeline > 1,
            trainer.shares_prompts,
            trainer.microbatch_tokens,
            room_of(trainer),
            whole,
            attention_cost,
        )
        key = (id(outlines), alike)
        if key not in self._found:  # beside the outlines, since an id is of one object only as long as that is there
            self._found[key] = (outlines, _laid_out(outlines, trainer, attention_cost))
        return _padded(self._found[key][1], trainer.row_multiple)


def rows_of_step(outlines: Many[Outline], trainer: Trainer, attention_cost: float) -> list[RankRows]:
    """Of every data-parallel rank; `attention_cost`: ModelShape's. ConfigError when a sequence exceeds
    trainer.microbatch_tokens."""
    return _padded(_laid_out(outlines, trainer, attention_cost), trainer.row_multiple)


def _laid_out(outlines: Many[Outline], trainer: Trainer, attention_cost: float) -> list[RankRows]:
    """Rows without padding."""
    costs = Costs(trainer.shares_prompts, attention_cost)
    parts = split_over_ranks(outlines, trainer.data_parallel, costs)
    return [
        RankRows(tuple(_size(row, costs) for row in rows), bool(split_groups(part, trainer, costs)))
        for part, rows in zip(parts, pack_rows(parts, trainer, costs), strict=True)
    ]


def _padded(ranks: list[RankRows], multiple: int) -> list[RankRows]:
    """With every row as long as a multiple of so many tokens, and none of no tokens."""
    return [
        RankRows(
            tuple(RowSize(-(-max(1, row.held) // multiple) * multiple, row.held, row.targets, row.looks) for row in rank.rows),
            rank.splits,
        )
        for rank in ranks
    ]


def _size(row: Many[Outline], costs: Costs) -> RowSize:
    held, looks, targets = 0, 0.0, 0
    for members in costs.by_prompt(row):
        held += costs.tokens_of(members)
        looks += costs.looks_of(members)
        targets += sum(one.num_completion for one in members)
    return RowSize(held, held, targets, looks)
