"""Rank 0 has the step's sequences; this hands them to every trainer rank, which then packs its own part. One broadcast
of safetensors bytes a step, nothing pickled; no rank learns where the sequences come from.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from engine.config.options import Trainer
from engine.core.types import Batch, Sequence
from engine.megatron.packing import make_batches
from engine.megatron.topology import Topology


def hand_out(sequences: list[Sequence] | None, num_prompts: int, step: int, trainer: Trainer, topology: Topology) -> Batch:
    """This rank's batch of `step`. `sequences` and `num_prompts` are rank 0's; elsewhere they are not looked at.

    Collective over all trainer ranks.
    """
    if trainer.world_size > 1:
        payload = _encode(sequences, num_prompts) if sequences is not None else b""
        sequences, num_prompts = _decode(broadcast_bytes(payload, topology.device))
    assert sequences is not None
    return make_batches(sequences, step=step, num_prompts=num_prompts, trainer=trainer)[topology.dp_rank]


def broadcast_bytes(payload: bytes, device: torch.device) -> bytes:
    """The bytes of rank 0 on every rank; `payload` is rank 0's. Collective over all trainer ranks."""
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return data.cpu().numpy().tobytes()


def _encode(sequences: list[Sequence], num_prompts: int) -> bytes:
    lengths = [(len(s.prompt_ids), len(s.completion_ids), len(s.rollout_log_probs)) for s in sequences]
    return save(
        {
            "num_prompts": torch.tensor([num_prompts]),
            "lengths": torch.tensor(lengths, dtype=torch.int64).view(-1, 3),
            "token_ids": torch.tensor([t for s in sequences for t in (*s.prompt_ids, *s.completion_ids)], dtype=torch.int64),
            "log_probs": torch.tensor([p for s in sequences for p in s.rollout_log_probs], dtype=torch.float64),
            "advantages": torch.tensor([s.advantage for s in sequences], dtype=torch.float64),
            "groups": torch.tensor([(s.group, int(s.chosen)) for s in sequences], dtype=torch.int64).view(-1, 2),
        }
    )


def _decode(payload: bytes) -> tuple[list[Sequence], int]:
    tensors = load(payload)
    token_ids, log_probs = tensors["token_ids"].tolist(), tensors["log_probs"].tolist()
    lengths = tensors["lengths"].tolist()
    token_starts = [0, *accumulate(prompt + completion for prompt, completion, _ in lengths)]
    prob_starts = [0, *accumulate(probs for *_, probs in lengths)]
    sequences = [
        Sequence(
            prompt_ids=tuple(token_ids[token : token + prompt]),
            completion_ids=tuple(token_ids[token + prompt : token + prompt + completion]),
            rollout_log_probs=tuple(log_probs[prob : prob + probs]),
            advantage=advantage,
            group=group,
            chosen=bool(chosen),
        )
        for (prompt, completion, probs), token, prob, advantage, (group, chosen) in zip(
            lengths, token_starts, prob_starts, tensors["advantages"].tolist(), tensors["groups"].tolist(), strict=False
        )
    ]
    return sequences, int(tensors["num_prompts"])
