"""Rank 0 has the step's sequences and deals them; each data-parallel rank is sent its own share and packs it. One scatter of
safetensors bytes a step, nothing pickled; no rank learns where the sequences come from, nor what the others have.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load, save

from engine.config.options import Trainer
from engine.core.arrays import LogProbs, TokenIds
from engine.core.types import Batch, Sequence
from engine.megatron.dealing import Outline, Share, deal_step, outlines_of
from engine.megatron.packing import fill_batch, make_batch
from engine.megatron.parallel_state import ParallelState

VALUE = "value."  # begins the name of a column of Sequence.values
COUNTS = ("step", "num_prompts", "num_groups", "num_target_tokens", "num_sequence_tokens", "num_saved_tokens")


def scatter_batch(
    sequences: Many[Sequence] | None,
    num_prompts: int,
    step: int,
    trainer: Trainer,
    parallel: ParallelState,
    attention: float = 0.0,
) -> Batch:
    """This rank's batch of `step`. `sequences` and `num_prompts` are rank 0's; elsewhere they are not looked at. `attention`:
    see Costs.

    Collective over all trainer ranks.
    """
    if trainer.world_size == 1:
        assert sequences is not None
        return make_batch(sequences, step=step, num_prompts=num_prompts, trainer=trainer, dp_rank=0, attention=attention)
    payloads = None
    if sequences is not None:
        outlines = outlines_of(sequences)
        shares = deal_step(outlines, step=step, num_prompts=num_prompts, trainer=trainer, attention=attention)
        payloads = [encode(share, sequences) for share in shares]
    received = Coded(scatter_bytes(payloads, parallel))
    return fill_batch(received.share, received.sequences.__getitem__, trainer)


def scatter_bytes(payloads: Many[bytes] | None, parallel: ParallelState) -> bytes:
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
    return data[: lengths[here.dp_rank]].cpu().numpy().tobytes()


def _padded(payload: bytes, like: torch.Tensor) -> torch.Tensor:
    """The bytes at the beginning of a tensor [size] like another; what follows them says nothing."""
    part = torch.empty_like(like)
    part[: len(payload)].copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    return part


def encode(share: Share, sequences: Many[Sequence]) -> bytes:
    """A share with its sequences as safetensors bytes, exactly, each prompt once; `sequences` are those of the step."""
    outlines = [one for row in share.rows for one in row]
    own = [sequences[one.place] for one in outlines]
    prompts = {one.prompt: sequence.prompt_ids for one, sequence in zip(outlines, own, strict=True)}
    names = own[0].values.keys() if own else ()
    assert all(sequence.values.keys() == names for sequence in own), "sequences of one step have the same values"
    table = [
        (one.place, one.prompt, len(sequence.completion_ids), len(sequence.rollout_log_probs), one.group, sequence.chosen)
        for one, sequence in zip(outlines, own, strict=True)
    ]

    def column(values: list[float]) -> np.ndarray:
        return np.array(values, np.float64)

    return save(
        {
            "counts": np.array([getattr(share, name) for name in COUNTS], np.int64),
            "rows": np.array([len(row) for row in share.rows], np.int64),
            "split": np.array(sorted(share.split), np.int64),
            "table": np.array(table, np.int64).reshape(-1, 6),
            "prompts": np.array([(number, len(ids)) for number, ids in prompts.items()], np.int64).reshape(-1, 2),
            "prompt_ids": TokenIds.joined(prompts.values()).array,
            "completion_ids": TokenIds.joined(sequence.completion_ids for sequence in own).array,
            "log_probs": LogProbs.joined(sequence.rollout_log_probs for sequence in own).array,
            "advantages": column([sequence.advantage for sequence in own]),
            "rewards": column([sequence.reward for sequence in own]),
            **{VALUE + name: column([sequence.values[name] for sequence in own]) for name in names},
        }
    )


class Coded:
    """A share and its sequences as `encode` wrote them."""

    def __init__(self, payload: bytes) -> None:
        tensors = load(payload)
        table, lengths = tensors["table"].tolist(), tensors["prompts"].tolist()
        texts = TokenIds.copied(tensors["prompt_ids"]).parted(length for _, length in lengths)
        prompts = {number: ids for (number, _), ids in zip(lengths, texts, strict=True)}
        completions = TokenIds.copied(tensors["completion_ids"]).parted(row[2] for row in table)
        log_probs = LogProbs.copied(tensors["log_probs"]).parted(row[3] for row in table)
        advantages, rewards = tensors["advantages"].tolist(), tensors["rewards"].tolist()
        values = {name.removeprefix(VALUE): column.tolist() for name, column in tensors.items() if name.startswith(VALUE)}
        outlines = []
        self.sequences: dict[int, Sequence] = {}  # by their place in the step
        for i, (place, prompt, num_completion, _, group, chosen) in enumerate(table):
            outlines.append(Outline(place, len(prompts[prompt]), num_completion, group, prompt))
            self.sequences[place] = Sequence(
                prompts[prompt],
                completions[i],
                log_probs[i],
                advantage=advantages[i],
                group=group,
                chosen=bool(chosen),
                reward=rewards[i],
                values={name: column[i] for name, column in values.items()},
            )
        self.share = _share(tensors, outlines)


def _share(tensors: Mapping[str, np.ndarray], outlines: Many[Outline]) -> Share:
    counts: dict[str, int] = dict(zip(COUNTS, tensors["counts"].tolist(), strict=True))
    bounds = pairwise(accumulate(tensors["rows"].tolist(), initial=0))
    rows = tuple(tuple(outlines[start:end]) for start, end in bounds)
    return Share(rows=rows, split=frozenset(tensors["split"].tolist()), **counts)
