"""Rank 0 has the step's sequences and deals them; each data-parallel rank is sent its own share and packs it. One scatter of
bytes a step, nothing pickled; no rank learns where the sequences come from, nor what the others have.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence as Many
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.distributed as dist

from engine.config.options import Trainer
from engine.core.arrays import ITEM_BYTES, LogProbs, TokenIds
from engine.core.types import Batch, Sequence
from engine.megatron.dealing import Share, deal_step
from engine.megatron.outlines import Outline, outlines_of
from engine.megatron.packing import fill_batch
from engine.megatron.parallel_state import ParallelState

COUNTS = (
    "step",
    "num_spread_groups",
    "num_prompts",
    "num_groups",
    "num_target_tokens",
    "num_sequence_tokens",
    "num_saved_tokens",
)


def scatter_batch(
    sequences: Many[Sequence] | None,
    num_prompts: int,
    step: int,
    trainer: Trainer,
    parallel: ParallelState,
    *,
    attention: float = 0.0,
    cuts_groups: bool = False,
) -> Batch:
    """This rank's batch of `step`. `sequences` and `num_prompts` are rank 0's; elsewhere they are not looked at. `attention`
    and `cuts_groups`: see deal_step.

    Collective over all trainer ranks.
    """
    deal = partial(deal_step, step=step, num_prompts=num_prompts, trainer=trainer, attention=attention, cuts_groups=cuts_groups)
    if trainer.world_size == 1:
        assert sequences is not None
        (share,) = deal(outlines_of(sequences))
        return fill_batch(share, sequences.__getitem__, trainer)
    payloads = None
    if sequences is not None:
        shares = deal(outlines_of(sequences))
        payloads = [encode(share, sequences) for share in shares]
    received = Coded(scatter_bytes(payloads, parallel))
    return fill_batch(received.share, received.sequences.__getitem__, trainer)


def scatter_bytes(payloads: Many[bytes] | None, parallel: ParallelState) -> memoryview:
    """The bytes for this rank's data-parallel rank; `payloads` are rank 0's, one for each. They reach the first rank of each
    model replica, then its other stages, then the other tensor-parallel ranks. Collective over all trainer ranks."""
    here, device = parallel, parallel.device
    sizes = torch.zeros(here.dp_size, dtype=torch.int64, device=device)
    if payloads is not None:
        sizes.copy_(torch.tensor([len(payload) for payload in payloads]))
    dist.broadcast(sizes, 0)
    lengths: list[int] = sizes.tolist()
    data = torch.empty(max(lengths), dtype=torch.uint8, device=device)  # a scatter's parts have one size
    if here.tp_rank == 0 and here.is_first_stage and here.dp_size > 1:
        parts = [_padded(payload, data) for payload in payloads] if payloads is not None else None
        dist.scatter(data, parts, group=here.dp_group, group_src=0)
    elif payloads is not None:
        data = _padded(payloads[0], data)
    if here.tp_rank == 0 and here.pp_size > 1:
        dist.broadcast(data, group=here.pp_group, group_src=0)
    if here.tp_size > 1:
        dist.broadcast(data, group=here.tp_group, group_src=0)
    return data[: lengths[here.dp_rank]].cpu().numpy().data


def _padded(payload: bytes, like: torch.Tensor) -> torch.Tensor:
    """The bytes at the beginning of a tensor [size] like another; what follows them says nothing."""
    part = np.empty(like.numel(), np.uint8)
    part[: len(payload)] = np.frombuffer(payload, np.uint8)
    return torch.from_numpy(part).to(like.device)


def encode(share: Share, sequences: Many[Sequence]) -> bytes:
    """A share with its sequences as bytes, exactly, each prompt once; `sequences` are those of the step. `Coded` says what the
    bytes are."""
    outlines = [one for row in share.rows for one in row]
    own = [sequences[one.place] for one in outlines]
    prompts = {one.prompt: sequence.prompt_ids.data for one, sequence in zip(outlines, own, strict=True)}
    names = list(own[0].values) if own else []
    assert all(sequence.values.keys() == set(names) for sequence in own), "sequences of one step have the same values"
    completions = [sequence.completion_ids.data for sequence in own]
    log_probs = [sequence.rollout_log_probs.data for sequence in own]
    told = json.dumps(names).encode()
    whole = [len(share.rows), share.num_spread_rows, len(share.split), len(prompts), len(own), len(names), len(told)]
    whole += [getattr(share, name) for name in COUNTS]
    whole += map(len, share.rows)
    whole += sorted(share.split)
    for number, ids in prompts.items():
        whole += number, len(ids) // ITEM_BYTES
    for one, sequence, ids, found in zip(outlines, own, completions, log_probs, strict=True):
        whole += one.place, one.prompt, one.group, sequence.chosen, len(ids) // ITEM_BYTES, len(found) // ITEM_BYTES
    marks = [mark for one in own for mark in (one.advantage, one.reward, *(one.values[name] for name in names))]
    numbers = array("q", whole).tobytes(), array("d", marks).tobytes()
    return b"".join([*numbers, told, *prompts.values(), *completions, *log_probs])


class Coded:
    """A share and its sequences as `encode` wrote them, in the machines' byte order, one after another:

    int64: the numbers of rows, of those with spread groups, of split groups, prompts, sequences, values, and bytes of their
    names; the share's counts; of each row its sequences; the split groups; of each prompt its number and length; of each
    sequence its place, prompt, group,
    whether it is chosen, and the lengths of its completion and of its log-probs. float64: of each sequence advantage, reward
    and values. The values' names as JSON. int32: the tokens of the prompts, then of the completions. float32: the log-probs.
    """

    def __init__(self, payload: bytes | memoryview) -> None:
        self._payload, self._place = memoryview(payload), 0
        num_rows, num_spread, num_split, num_prompts, num_sequences, num_values, num_bytes = self._numbers(np.int64, 7).tolist()
        counts: dict[str, int] = dict(zip(COUNTS, self._numbers(np.int64, len(COUNTS)).tolist(), strict=True))
        bounds = list(accumulate(self._numbers(np.int64, num_rows).tolist(), initial=0))
        split = frozenset(self._numbers(np.int64, num_split).tolist())
        known = self._numbers(np.int64, num_prompts, 2).tolist()
        table = self._numbers(np.int64, num_sequences, 6).tolist()
        marks = self._numbers(np.float64, num_sequences, 2 + num_values).tolist()
        names = json.loads(self._bytes(num_bytes))
        prompts = {number: TokenIds(self._bytes(length * ITEM_BYTES)) for number, length in known}
        completions = [TokenIds(self._bytes(row[4] * ITEM_BYTES)) for row in table]
        log_probs = [LogProbs(self._bytes(row[5] * ITEM_BYTES)) for row in table]
        assert self._place == len(payload), (self._place, len(payload))
        outlines = []
        self.sequences: dict[int, Sequence] = {}  # by their place in the step
        for i, (place, prompt, group, chosen, num_completion, _) in enumerate(table):
            outlines.append(Outline(place, len(prompts[prompt]), num_completion, group, prompt))
            advantage, reward, *values = marks[i]
            self.sequences[place] = Sequence(
                prompts[prompt],
                completions[i],
                log_probs[i],
                advantage=advantage,
                group=group,
                chosen=bool(chosen),
                reward=reward,
                values=dict(zip(names, values, strict=True)),
            )
        rows = tuple(tuple(outlines[start:end]) for start, end in pairwise(bounds))
        self.share = Share(rows=rows, num_spread_rows=num_spread, split=split, **counts)

    def _bytes(self, count: int) -> bytes:
        """The next ones."""
        return bytes(self._next(count))

    def _next(self, count: int) -> memoryview:
        start, self._place = self._place, self._place + count
        return self._payload[start : self._place]

    def _numbers(self, kind: type[np.generic], *shape: int) -> np.ndarray:
        """The next numbers, of 8 bytes each."""
        return np.frombuffer(self._next(8 * math.prod(shape)), kind).reshape(shape)
