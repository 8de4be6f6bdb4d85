"""The groups of a step that several data-parallel ranks have sequences of. Each of these ranks tells the others what the loss
of a group looks at, computes the loss of all such groups as every other does, to the bit, and keeps the derivative by the
log-probs of its own sequences. One gather of a few numbers a token a step.

Shape legend: T tokens of a packed row, L positions with a target of a rank's part of such groups, B sequences of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from engine.algorithms.base import Loss
from engine.core.types import IGNORED, Microbatch
from engine.ops import to_device


def precompute_spread_groups(
    loss: Loss, rows: Many[Microbatch], log_probs: Many[torch.Tensor], device: torch.device, group: dist.ProcessGroup
) -> list[Microbatch]:
    """`loss.precompute_split_groups` of this rank's rows with groups that others of the process group have sequences of. The
    columns of `rows` are on the host, what scoring filled in and the policy's own `log_probs` [T] of each on `device`.

    Collective over the group, also for a rank without such rows. The host waits once for the sizes of the ranks' parts, and as
    often as the loss itself makes it.
    """
    held = _Held.of(rows)
    own, positions = held.on_device(rows, log_probs, device) if rows else (None, [])
    parts = _gathered(own, device, group)
    if own is None:
        return []
    decoded = [own.like(*part) for part in parts if part[0]]
    before = sum(num_sequences > 0 for num_sequences, _ in parts[: dist.get_rank(group)])
    mine = loss.precompute_split_groups([part.row for part in decoded], [part.log_probs for part in decoded])[before]
    assert mine.split_gradients is not None, "a loss of split groups has their gradient"
    found, start = [], 0
    for row, all_log_probs, at in zip(rows, log_probs, positions, strict=True):
        gradients = mine.split_gradients[start : start + at.numel()]
        start += at.numel()
        spread = torch.zeros_like(all_log_probs).index_copy(0, at, gradients)
        found.append(replace(row, split_gradients=spread))
    found[0] = replace(found[0], split_loss=mine.split_loss, split_metrics=mine.split_metrics)  # there on the first rank alone
    return found


@dataclass(frozen=True, slots=True)
class _Held:
    """What the host has of a rank's split groups, in the order of its rows."""

    places: list[torch.Tensor]  # of each row, where it has a target of a split group
    columns: dict[str, torch.Tensor]  # "lengths" [B], and fields of a microbatch, [B] or [L]
    values: dict[str, torch.Tensor]  # [B] each

    @classmethod
    def of(cls, rows: Many[Microbatch]) -> _Held:
        """Of a rank's rows."""
        places = [_positions(row) for row in rows]
        if not rows:
            return cls(places, {}, {})
        lengths = [
            _segments(row)[at].bincount(minlength=row.split.numel())[row.split] for row, at in zip(rows, places, strict=True)
        ]
        columns = {"lengths": torch.cat(lengths)}
        for name in ("advantages", "rewards", "groups", "places", "chosen"):
            columns[name] = torch.cat([getattr(row, name)[row.split] for row in rows])
        for name in ("targets", "rollout_log_probs"):
            columns[name] = _at([getattr(row, name) for row in rows], places)
        if references := [
            r.reference_log_probs for r in rows if r.reference_log_probs is not None and r.reference_log_probs.is_cpu
        ]:
            columns["reference_log_probs"] = _at(references, places)  # those of the rollouts
        names = rows[0].values
        return cls(places, columns, {name: torch.cat([row.values[name][row.split] for row in rows]) for name in names})

    def on_device(
        self, rows: Many[Microbatch], log_probs: Many[torch.Tensor], device: torch.device
    ) -> tuple[_Part, list[torch.Tensor]]:
        """The rank's part on the device, and the places there: all in one copy."""
        moved = to_device([*self.places, *self.columns.values(), *self.values.values()], device)
        positions, rest = moved[: len(rows)], moved[len(rows) :]
        columns, values = dict(zip(self.columns, rest, strict=False)), rest[len(self.columns) :]
        for name in ("reference_log_probs", "log_square_probs"):
            known = [getattr(row, name) for row in rows]
            if name not in columns and known[0] is not None:
                columns[name] = _at(known, positions)
        row = _row(columns.pop("lengths"), values=dict(zip(self.values, values, strict=True)), **columns)
        return _Part(row, _at(log_probs, positions)), positions


@dataclass(frozen=True, slots=True)
class _Part:
    """What a rank has of split groups, as a microbatch of the positions with a target alone, which has no prompts."""

    row: Microbatch
    log_probs: torch.Tensor  # [L] float32, the policy's own

    def encode(self) -> torch.Tensor:
        """All of it as int32, floats by their bits: what `_columns` lists."""
        return torch.cat([_bits(column) for column in self._columns()])

    def like(self, num_sequences: int, coded: torch.Tensor) -> _Part:
        """A part of the same kind as this one, of so many sequences, from its `encode`."""
        num_tokens, left = divmod(coded.numel() - num_sequences * self._num_of_sequences, self._num_of_tokens)
        assert not left, (num_sequences, coded.numel())
        row, place, found = self.row, 0, list[torch.Tensor]()
        for index, column in enumerate(self._columns()):
            size = num_sequences if index < self._num_of_sequences else num_tokens
            part, place = coded[place : place + size], place + size
            found.append(part.view(torch.float32) if column.is_floating_point() else part.to(column.dtype))
        lengths, groups, places, chosen, advantages, rewards, *rest = found
        values = dict(zip(row.values, rest, strict=False))
        targets, log_probs, rollout, *rest = rest[len(values) :]
        reference = rest.pop(0) if row.reference_log_probs is not None else None
        squares = rest.pop(0) if row.log_square_probs is not None else None
        decoded = _row(
            lengths,
            targets=targets,
            rollout_log_probs=rollout,
            reference_log_probs=reference,
            log_square_probs=squares,
            advantages=advantages,
            rewards=rewards,
            values=values,
            groups=groups,
            places=places,
            chosen=chosen,
        )
        return _Part(decoded, log_probs)

    @property
    def _num_of_sequences(self) -> int:
        """Columns that have a number a sequence."""
        return 6 + len(self.row.values)

    @property
    def _num_of_tokens(self) -> int:
        """Columns that have a number a token."""
        return len(self._columns()) - self._num_of_sequences

    def _columns(self) -> list[torch.Tensor]:
        """[B] each, then [L] each."""
        row = self.row
        of_sequences = [row.cu_seqlens.diff(), row.groups, row.places, row.chosen, row.advantages, row.rewards]
        of_tokens = [row.targets, self.log_probs, row.rollout_log_probs]
        known = [column for column in (row.reference_log_probs, row.log_square_probs) if column is not None]
        return [*of_sequences, *row.values.values(), *of_tokens, *known]


def _row(lengths: torch.Tensor, *, targets: torch.Tensor, groups: torch.Tensor, **columns: Any) -> Microbatch:
    """Sequences [B] of `lengths` tokens with a target each, all of split groups."""
    device, bounds = targets.device, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rising = torch.arange(targets.numel(), device=device)
    return Microbatch(
        token_ids=targets,
        targets=targets,
        target_positions=rising,
        position_ids=rising - bounds[:-1].repeat_interleave(lengths, output_size=targets.numel()),
        cu_seqlens=bounds.to(torch.int32),
        parents=torch.full_like(groups, -1),
        pairs=torch.zeros(0, 2, dtype=torch.int64, device=device),
        pair_weights=torch.zeros(0, device=device),
        groups=groups,
        split=torch.ones_like(groups, dtype=torch.bool),
        **columns,
    )


def _at(values: Many[torch.Tensor], places: Many[torch.Tensor]) -> torch.Tensor:
    """What the rows' `values` [T] are at their places, one row after another: [L]."""
    return torch.cat([value[at] for value, at in zip(values, places, strict=True)])


def _segments(row: Microbatch) -> torch.Tensor:
    """The segment of each token, [T]."""
    lengths = row.cu_seqlens.diff().long()
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)


def _positions(row: Microbatch) -> torch.Tensor:
    """Where a row has a target of a split group, [L]."""
    return ((row.targets != IGNORED) & row.split[_segments(row)]).nonzero().squeeze(-1)


def _bits(column: torch.Tensor) -> torch.Tensor:
    return column.contiguous().view(torch.int32) if column.is_floating_point() else column.to(torch.int32)


def _gathered(own: _Part | None, device: torch.device, group: dist.ProcessGroup) -> list[tuple[int, torch.Tensor]]:
    """(number of sequences, `encode`) of every rank of the group, of which each has its own counts."""
    coded = torch.zeros(0, dtype=torch.int32, device=device) if own is None else own.encode()
    (size,) = to_device([torch.tensor([0 if own is None else own.row.groups.numel(), coded.numel()])], device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    counts: list[tuple[int, int]] = torch.stack(sizes).tolist()
    longest = max(num_numbers for _, num_numbers in counts)
    parts = [coded.new_empty(longest) for _ in counts]
    dist.all_gather(parts, torch.nn.functional.pad(coded, (0, longest - coded.numel())), group=group)
    return [(num_sequences, part[:count]) for part, (num_sequences, count) in zip(parts, counts, strict=True)]
