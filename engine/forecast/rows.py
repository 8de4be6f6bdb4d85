"""The packed rows of a step, as the trainer lays them out, in the two figures that their time follows from. The rows themselves
are megatron/packing.py's; this is the only file of the forecast that looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import chain

from engine.config.options import Trainer
from engine.megatron.packing import Outline, lay_out_rows, split_groups


@dataclass(frozen=True, slots=True)
class RowSize:
    """A packed row."""

    tokens: int  # padding included
    looks: float  # pairs of a token and one it attends to

    @property
    def is_empty(self) -> bool:
        """Whether it is padding alone."""
        return not self.looks


@dataclass(frozen=True, slots=True)
class RankRows:
    """The rows of a data-parallel rank."""

    rows: tuple[RowSize, ...]
    splits: bool  # whether some group is split over rows: the policy then scores all of them first


def rows_of_step(outlines: Many[Outline], trainer: Trainer) -> list[RankRows]:
    """Of every data-parallel rank. ConfigError when a sequence exceeds trainer.microbatch_tokens."""
    found = []
    for rows in lay_out_rows(outlines, trainer):
        split = split_groups(list(chain.from_iterable(rows)), trainer.microbatch_tokens, trainer.row_multiple)
        found.append(RankRows(tuple(_size(row, trainer.row_multiple) for row in rows), bool(split)))
    return found


def _size(row: Many[Outline], multiple: int) -> RowSize:
    tokens = sum(outline.num_tokens for outline in row)
    looks = sum(outline.num_tokens**2 for outline in row) / 2
    return RowSize(-(-max(1, tokens) // multiple) * multiple, looks)
