"""Rank 0 has the step's sequences; this broadcasts them to every trainer rank, which then decodes and packs its own part
alone. One broadcast of safetensors bytes a step, nothing pickled; no rank learns where the sequences come from.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from engine.config.options import Trainer
from engine.core.types import Batch, Sequence
from engine.megatron.dealing import Outline, outlines_of
from engine.megatron.packing import lay_out_batch, make_batch
from engine.megatron.parallel_state import ParallelState

VALUE = "value."  # begins the name of a tensor of Sequence.values


def broadcast_batch(
    sequences: list[Sequence] | None,
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
        layout: dict[str, Any] = {"trainer": trainer, "dp_rank": parallel.dp_rank, "attention": attention}
        return make_batch(sequences, step=step, num_prompts=num_prompts, **layout)
    payload = encode(sequences, num_prompts) if sequences is not None else b""
    coded = Coded(broadcast_bytes(payload, parallel.device))
    return lay_out_batch(
        coded.outlines,
        coded.sequence,
        step=step,
        num_prompts=coded.num_prompts,
        trainer=trainer,
        dp_rank=parallel.dp_rank,
        attention=attention,
    )


def broadcast_bytes(payload: bytes, device: torch.device) -> bytes:
    """The bytes of rank 0 on every rank; `payload` is rank 0's. Collective over all trainer ranks."""
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return data.cpu().numpy().tobytes()


def encode(sequences: Many[Sequence], num_prompts: int) -> bytes:
    """The sequences of a step as safetensors bytes, exactly."""
    lengths = [(len(s.prompt_ids), len(s.completion_ids), len(s.rollout_log_probs)) for s in sequences]
    names = sequences[0].values.keys() if sequences else ()
    assert all(s.values.keys() == names for s in sequences), "sequences of one step have the same values"

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return save(
        {
            "num_prompts": torch.tensor([num_prompts]),
            "lengths": torch.tensor(lengths, dtype=torch.int64).view(-1, 3),
            "token_ids": torch.tensor([t for s in sequences for t in (*s.prompt_ids, *s.completion_ids)], dtype=torch.int64),
            "log_probs": column([p for s in sequences for p in s.rollout_log_probs]),
            "advantages": column([s.advantage for s in sequences]),
            "rewards": column([s.reward for s in sequences]),
            "groups": torch.tensor([(s.group, int(s.chosen)) for s in sequences], dtype=torch.int64).view(-1, 2),
            "prompts": torch.tensor([outline.prompt for outline in outlines_of(sequences)], dtype=torch.int64),
            **{VALUE + name: column([s.values[name] for s in sequences]) for name in names},
        }
    )


class Coded:
    """The sequences of a step as `encode` wrote them; each is decoded when it is asked for."""

    def __init__(self, payload: bytes) -> None:
        self._tensors = load(payload)
        self._lengths: list[list[int]] = self._tensors["lengths"].tolist()
        self._groups: list[list[int]] = self._tensors["groups"].tolist()
        self._token_starts = [0, *accumulate(prompt + completion for prompt, completion, _ in self._lengths)]
        self._prob_starts = [0, *accumulate(probs for *_, probs in self._lengths)]
        self.num_prompts = int(self._tensors["num_prompts"])

    @property
    def outlines(self) -> list[Outline]:
        """What decides where each is laid."""
        rows = zip(self._lengths, self._groups, self._tensors["prompts"].tolist(), strict=True)
        return [
            Outline(i, prompt, completion, group, number)
            for i, ((prompt, completion, _), (group, _), number) in enumerate(rows)
        ]

    def sequence(self, place: int) -> Sequence:
        """The sequence at a place of the step."""
        tensors = self._tensors
        prompt, completion, probs = self._lengths[place]
        token, prob = self._token_starts[place], self._prob_starts[place]
        token_ids = tensors["token_ids"][token : token + prompt + completion].tolist()
        group, chosen = self._groups[place]
        return Sequence(
            prompt_ids=tuple(token_ids[:prompt]),
            completion_ids=tuple(token_ids[prompt:]),
            rollout_log_probs=tuple(tensors["log_probs"][prob : prob + probs].tolist()),
            advantage=float(tensors["advantages"][place]),
            group=group,
            chosen=bool(chosen),
            reward=float(tensors["rewards"][place]),
            values={
                name.removeprefix(VALUE): float(column[place]) for name, column in tensors.items() if name.startswith(VALUE)
            },
        )
