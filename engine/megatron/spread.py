"""The groups of a step that several data-parallel ranks have sequences of. Each of these ranks tells the others what the loss
of a group looks at, computes the loss of all such groups as every other does, to the bit, and keeps the derivative by the
log-probs of its own sequences. One gather of a few numbers a token a step.

Shape legend: T tokens of a packed row, L positions with a target of a rank's split groups, B sequences of them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from engine.algorithms.base import Loss
from engine.core.types import IGNORED, Microbatch


def precompute_spread_groups(
    loss: Loss, rows: Many[Microbatch], log_probs: Many[torch.Tensor], device: torch.device, group: dist.ProcessGroup
) -> list[Microbatch]:
    """`loss.precompute_split_groups` of this rank's rows with split groups, where others of the process group have sequences of
    the same groups. `rows`, and the policy's own `log_probs` [T] of each, are on `device`.

    Collective over the group, also for a rank without such rows.
    """
    own = _Part.of(rows, log_probs) if rows else None
    coded = own.encode() if own is not None else torch.zeros(0, dtype=torch.int32, device=device)
    parts = _gathered(coded, group)
    if own is None:
        return []
    decoded = [own.like(part) for part in parts if part.numel()]
    before = sum(part.numel() > 0 for part in parts[: dist.get_rank(group)])
    mine = loss.precompute_split_groups([part.row for part in decoded], [part.log_probs for part in decoded])[before]
    assert mine.split_gradients is not None, "a loss of split groups has their gradient"
    found, start = [], 0
    for row in rows:
        positions = _positions(row)
        gradients = mine.split_gradients[start : start + positions.numel()]
        start += positions.numel()
        spread = torch.zeros_like(row.rollout_log_probs).index_copy(0, positions, gradients)
        found.append(replace(row, split_gradients=spread))
    found[0] = replace(found[0], split_loss=mine.split_loss, split_metrics=mine.split_metrics)  # there on the first rank alone
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """What a rank has of split groups, as a microbatch of the positions with a target alone, which has no prompts."""

    row: Microbatch
    log_probs: torch.Tensor  # [L] float32, the policy's own

    @classmethod
    def of(cls, rows: Many[Microbatch], log_probs: Many[torch.Tensor]) -> _Part:
        """Of a rank's rows, in their order."""
        places = [_positions(row) for row in rows]
        lengths = [
            _segments(row)[at].bincount(minlength=row.split.numel())[row.split] for row, at in zip(rows, places, strict=True)
        ]

        def tokens(values: Many[torch.Tensor | None]) -> torch.Tensor:
            return torch.cat([value[at] for value, at in zip(values, places, strict=True) if value is not None])

        def sequences(values: Many[torch.Tensor]) -> torch.Tensor:
            return torch.cat([value[row.split] for value, row in zip(values, rows, strict=True)])

        first = rows[0]
        row = _row(
            torch.cat(lengths),
            targets=tokens([row.targets for row in rows]),
            rollout_log_probs=tokens([row.rollout_log_probs for row in rows]),
            reference_log_probs=None if first.reference_log_probs is None else tokens([r.reference_log_probs for r in rows]),
            log_square_probs=None if first.log_square_probs is None else tokens([row.log_square_probs for row in rows]),
            advantages=sequences([row.advantages for row in rows]),
            rewards=sequences([row.rewards for row in rows]),
            values={name: sequences([row.values[name] for row in rows]) for name in first.values},
            groups=sequences([row.groups for row in rows]),
            places=sequences([row.places for row in rows]),
            chosen=sequences([row.chosen for row in rows]),
        )
        return cls(row, tokens(log_probs))

    def encode(self) -> torch.Tensor:
        """All of it as int32, floats by their bits: B, L, then what `_columns` lists."""
        head = torch.tensor([self.row.groups.numel(), self.row.targets.numel()], dtype=torch.int32)
        return torch.cat([head.to(self.log_probs.device), *(_bits(column) for column in self._columns())])

    def like(self, coded: torch.Tensor) -> _Part:
        """A part of the same kind as this one, from its `encode`."""
        num_sequences, num_tokens = coded[:2].tolist()
        row, place, found = self.row, 2, list[torch.Tensor]()
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

    def _columns(self) -> list[torch.Tensor]:
        """[B] each, then [L] each."""
        row = self.row
        of_sequences = [row.cu_seqlens.diff(), row.groups, row.places, row.chosen, row.advantages, row.rewards]
        of_tokens = [row.targets, self.log_probs, row.rollout_log_probs]
        known = [column for column in (row.reference_log_probs, row.log_square_probs) if column is not None]
        return [*of_sequences, *row.values.values(), *of_tokens, *known]


def _row(lengths: torch.Tensor, *, targets: torch.Tensor, groups: torch.Tensor, **columns: object) -> Microbatch:
    """Sequences [B] of `lengths` tokens with a target each, all of split groups."""
    device, bounds = targets.device, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rising = torch.arange(targets.numel(), device=device)
    return Microbatch(
        token_ids=targets,
        targets=targets,
        target_positions=rising,
        position_ids=rising - bounds[:-1].repeat_interleave(lengths),
        cu_seqlens=bounds.to(torch.int32),
        parents=torch.full_like(groups, -1),
        pairs=torch.zeros(0, 2, dtype=torch.int64, device=device),
        pair_weights=torch.zeros(0, device=device),
        groups=groups,
        split=torch.ones_like(groups, dtype=torch.bool),
        **columns,  # type: ignore[arg-type]
    )


def _segments(row: Microbatch) -> torch.Tensor:
    """The segment of each token, [T]."""
    lengths = row.cu_seqlens.diff().long()
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)


def _positions(row: Microbatch) -> torch.Tensor:
    """Where a row has a target of a split group, [L]."""
    return ((row.targets != IGNORED) & row.split[_segments(row)]).nonzero().squeeze(-1)


def _bits(column: torch.Tensor) -> torch.Tensor:
    return column.contiguous().view(torch.int32) if column.is_floating_point() else column.to(torch.int32)


def _gathered(own: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The numbers of every rank of the group, of which each has its own count."""
    size = torch.tensor([own.numel()], device=own.device)
    counts = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, size, group=group)
    sizes = [int(count) for count in counts]
    parts = [own.new_empty(max(sizes)) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(own, (0, max(sizes) - own.numel())), group=group)
    return [part[:count] for part, count in zip(parts, sizes, strict=True)]
