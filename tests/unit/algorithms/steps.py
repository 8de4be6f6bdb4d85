"""A made-up step for the tests of the losses: sequences with a policy and a reference log-prob and an entropy a completion
token, as lists of float64; packed, dealt and run through a loss. What a loss should be is not known here.
"""

from __future__ import annotations

import math
import operator
import random
from dataclasses import replace
from typing import Any

import torch

from engine.algorithms.base import Loss
from engine.config.options import Trainer
from engine.core.metrics import part_reductions
from engine.core.types import Microbatch, Sequence
from engine.megatron.packing import make_batch
from tests.rollouts import make_sequence

Tokens = list[list[float]]  # a value a completion token, by sequence
LAYOUTS: list[dict[str, Any]] = [
    {"data_parallel": 1, "microbatch_tokens": 400},  # one row, a prompt once for all its samples
    {"data_parallel": 1, "microbatch_tokens": 16},  # several rows; a group of more than two may not fit
    {"data_parallel": 3, "microbatch_tokens": 16},  # several ranks, some with empty rows
    # hardly two sequences together, each with its prompt: pairs and groups are spread
    {"data_parallel": 2, "microbatch_tokens": 10, "share_prompts": False},
]


class Step:
    """Sequences of at most 10 tokens. Those of a group have one prompt, and so have some without a group."""

    def __init__(self, seed: int, num_pairs: int = 4) -> None:
        self._draw = random.Random(seed)
        self.sequences: list[Sequence] = []
        self.policy: Tokens = []
        self.reference: Tokens = []
        self.entropy: Tokens = []
        self.squares: Tokens = []  # logs of the sums of squared probabilities; of a loss that looks at them
        for pair in range(num_pairs):
            for chosen in (True, False):
                self.add(pair, chosen, self._draw.choice([0.0, self._draw.uniform(-1, 1)]))

    def add(self, group: int, chosen: bool, advantage: float) -> None:
        """One more sequence."""
        uniform, length = self._draw.uniform, self._draw.randint(1, 6)
        rollout = tuple(uniform(-4, -0.1) for _ in range(length))
        prompt = (group, *range(9, 10 + group % 3)) if group >= 0 else (50 + len(self.sequences) // 3, 9)
        self.sequences.append(make_sequence(prompt, tuple(range(length)), rollout, advantage, group, chosen))
        self.policy.append([p + uniform(-0.5, 0.5) for p in rollout])
        self.reference.append([p + uniform(-0.5, 0.5) for p in rollout])
        self.entropy.append([uniform(0, 3) for _ in rollout])

    @property
    def num_tokens(self) -> int:
        """Completion tokens in all."""
        return sum(len(s.completion_ids) for s in self.sequences)

    def run(
        self,
        loss_function: Loss,
        *,
        num_prompts: int = 7,
        data_parallel: int = 1,
        microbatch_tokens: int = 400,
        share_prompts: bool = True,
    ) -> tuple[float, dict[str, float], Tokens, Tokens]:
        """(sum of the losses, sums of the metrics, gradients by log-prob, gradients by entropy) over ranks and rows."""
        trainer = Trainer(data_parallel=data_parallel, microbatch_tokens=microbatch_tokens, share_prompts=share_prompts)
        loss = 0.0
        reductions = part_reductions(loss_function.metrics)
        sums = {name: -math.inf if reduce == "max" else 0.0 for name, reduce in reductions.items()}
        join = {name: max if reduce == "max" else operator.add for name, reduce in reductions.items()}
        gradients, slopes = ([[float("nan")]] * len(self.sequences) for _ in range(2))
        for dp_rank in range(data_parallel):
            batch = make_batch(self.sequences, step=0, num_prompts=num_prompts, trainer=trainer, dp_rank=dp_rank)
            rows = [self.lay_out(microbatch, self.policy)[0] for microbatch in batch.microbatches]
            scored = [replace(m, reference_log_probs=self.lay_out(m, self.reference)[0]) for m in batch.microbatches]
            if loss_function.needs_squares:
                scored = [replace(m, log_square_probs=self.lay_out(m, self.squares, elsewhere=3.0)[0]) for m in scored]
            if any(m.split.any() for m in scored):
                scored = loss_function.precompute_split_groups(scored, rows)
            for row, microbatch in zip(rows, scored, strict=True):
                entropy, spans = self.lay_out(microbatch, self.entropy, elsewhere=2.0)
                row.requires_grad_()
                entropy.requires_grad_()
                part, metrics = loss_function(row, microbatch, batch, entropy if loss_function.needs_entropy else None)
                part.backward()
                assert not any(value.requires_grad for value in metrics.values())
                loss += part.item()
                sums = {name: join[name](total, metrics[name].item()) for name, total in sums.items()}
                by_entropy = torch.zeros_like(row) if entropy.grad is None else entropy.grad
                for index, span in spans.items():
                    gradients[index] = [0.0] * len(self.policy[index]) if row.grad is None else row.grad[span].tolist()
                    slopes[index] = by_entropy[span].tolist()
                    by_entropy[span] = 0
                assert not by_entropy.any(), "the entropy counts where a completion token is predicted, and nowhere else"
        return loss, sums, gradients, slopes

    def lay_out(self, microbatch: Microbatch, values: Tokens, elsewhere: float = 0.0) -> tuple[torch.Tensor, dict[int, slice]]:
        """Values in their places of the row, and the slice of each sequence's completion tokens."""
        row, spans = torch.full((microbatch.token_ids.numel(),), elsewhere), {}
        starts, positions = microbatch.cu_seqlens[:-1].tolist(), microbatch.position_ids.tolist()
        for start, index in zip(starts, microbatch.places.tolist(), strict=True):
            if index >= 0:
                first = start + len(self.sequences[index].prompt_ids) - 1 - positions[start]
                spans[index] = slice(first, first + len(values[index]))
                row[spans[index]] = torch.tensor(values[index])
        return row, spans

    def pairs(self) -> list[tuple[int, int, float]]:
        """(chosen, rejected, 1 / pairs of the group) of all groups, by the definition."""
        found = []
        for group in {s.group for s in self.sequences} - {-1}:
            members = [i for i, s in enumerate(self.sequences) if s.group == group]
            chosen = [i for i in members if self.sequences[i].chosen]
            rejected = [i for i in members if not self.sequences[i].chosen]
            found += [(c, r, 1 / (len(chosen) * len(rejected))) for c in chosen for r in rejected]
        return found

    def mismatch(self) -> dict[str, float]:
        """Of policy against rollout log-probs: sum of |log r|, sum of r - log r - 1, largest r; of the ratios of whole
        responses their sum, the sum of their squares and their number."""
        responses = [
            [p - q for p, q in zip(policy, sequence.rollout_log_probs, strict=True)]
            for sequence, policy in zip(self.sequences, self.policy, strict=True)
        ]
        logs = [x for response in responses for x in response]
        products = [math.exp(math.fsum(response)) for response in responses]
        return {
            "log_prob_gap_mean": sum(map(abs, logs)),
            "rollout_kl_mean": sum(math.exp(x) - x - 1 for x in logs),
            "ratio_max": max(map(math.exp, logs), default=0.0),
            "ess_share": sum(products),
            "response_ratio_squares": sum(x * x for x in products),
            "num_responses": len(products),
        }
