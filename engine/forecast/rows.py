"""The packed rows of a step, as the trainer lays them out, in the two figures that their time follows from. The rows themselves
are megatron/packing.py's; this is the only file of the forecast that looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from engine.config.options import Trainer
from engine.megatron.dealing import Costs, Outline, deal_step


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


def rows_of_step(outlines: Many[Outline], trainer: Trainer, attention_cost: float) -> list[RankRows]:
    """Of every data-parallel rank; `attention_cost`: ModelShape's. ConfigError when a sequence exceeds
    trainer.microbatch_tokens."""
    costs = Costs(trainer.shares_prompts, attention_cost)
    return [
        RankRows(tuple(_size(row, trainer.row_multiple, costs) for row in share.rows), bool(share.split))
        for share in deal_step(outlines, step=0, num_prompts=0, trainer=trainer, attention=attention_cost)
    ]


def _size(row: Many[Outline], multiple: int, costs: Costs) -> RowSize:
    held = costs.num_tokens(row)
    looks = sum(costs.looks_of(members) for members in costs.by_prompt(row))
    return RowSize(-(-max(1, held) // multiple) * multiple, held, sum(one.num_completion for one in row), looks)
