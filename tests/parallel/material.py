"""The configuration and the batches every case trains on, made alike in the ranks and in the tests. No megatron."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from engine.algorithms.oapl import SHARE
from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.types import IGNORED, Batch, Microbatch, Sequence
from engine.megatron.packing import make_batch
from tests import builders
from tests.rollouts import make_sequence

OWN_LOSS = Path(__file__).resolve().parents[1] / "own_loss.py"
UNCLIPPED = 1e9  # a clip_norm far above every gradient
EVERYTHING: dict[str, Any] = {  # every term there is
    **{"loss": "group_dpo", "alpha": 0.3, "entropy_weight": 0.05},
    **{"nll_weight": 0.1, "kl_weight": 0.1, "label_smoothing": 0.1, "weight_pairs": True},
}
ALGORITHMS: dict[str, dict[str, Any]] = {  # by short name; NLL and KL are large enough to see
    "dpo": {"nll_weight": 0.1},
    "grpo": {"loss": "grpo", "kl_weight": 0.1},
    "everything": EVERYTHING,
    "everything_in_one_group": EVERYTHING,
    "corrected": {  # GRPO's weights by response, many of them at a bound
        **{"loss": "grpo", "kl_weight": 0.1, "correction": "truncate", "correction_level": "geometric"},
        **{"correction_low": 0.9, "correction_high": 1.1},
    },
    "cispo": {"loss": "cispo", "kl_weight": 0.1, "weight_high": 1.1},
    "oapl": {"loss": "oapl", "ratio_beta": 0.1},
    "own": {"loss": f"{OWN_LOSS}:Regression", "temperature": 0.7},
    "own_in_one_group": {"loss": f"{OWN_LOSS}:ReferenceRegression", "temperature": 0.7},
    "own_with_entropy": {"loss": f"{OWN_LOSS}:ReferenceRegression", "temperature": 0.7, "entropy_weight": 0.05},
}


@dataclass(frozen=True)
class Member:
    """A sequence of a row as a model that knows no rows takes it, and where the row has it."""

    tokens: torch.Tensor  # [L]
    targets: torch.Tensor  # [L], IGNORED where there is none
    predicting: slice  # of its positions, those with a target
    span: slice  # the same positions in the row
    among: slice  # the same among the row's positions with a target


def members(row: Microbatch) -> list[Member]:
    """The sequences of a row, each with the whole of its prompt."""
    segments = [slice(start, end) for start, end in pairwise(row.cu_seqlens.tolist())]
    counts = [int((row.targets[segment] != IGNORED).sum()) for segment in segments]
    found = []
    for segment, parent, num_before, count in zip(
        segments, row.parents.tolist(), accumulate(counts, initial=0), counts, strict=False
    ):
        if not count:
            continue
        before = segments[parent] if parent >= 0 else slice(0, 0)
        tokens, targets = (torch.cat([x[before], x[segment]]) for x in (row.token_ids, row.targets))
        first = int((targets != IGNORED).nonzero()[0])
        start = segment.start + first - (before.stop - before.start)
        places = (slice(first, first + count), slice(start, start + count), slice(num_before, num_before + count))
        found.append(Member(tokens, targets, *places))
    return found


def run_config(trainer: dict[str, Any], options: dict[str, Any]) -> RunConfig:
    """A run of 3 steps whose learning rate and NLL are large enough to see; clipping only where a test asks."""
    tree: dict[str, Any] = {
        "run": {"steps": 3},
        "data": {"max_prompt_tokens": 8},
        "sampling": {"max_tokens": 24},
        "algorithm": ALGORITHMS["dpo"],
        "optimizer": {"learning_rate": 3e-3, "eps": 1e-4, "clip_norm": UNCLIPPED, "warmup_steps": 2},
        "trainer": {"microbatch_tokens": 64, **trainer},
    }
    for section, values in options.items():
        begun = {} if "loss" in values else tree.get(section, {})  # another loss has other options
        tree[section] = begun | values
    return builders.config(**tree)


def sequences(step: int, vocab_size: int, group_pairs: int = 1) -> list[Sequence]:
    """Four pairs of different lengths with made-up advantages; 5 or so rows of 64 tokens, on 2 ranks 2 or 3 each.
    `group_pairs` pairs that follow one another are one group."""
    draw = random.Random(step)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(count))

    made = []
    for pair in range(4):
        prompt = tokens(draw.randint(1, 8))
        for chosen in (True, False):
            completion = tokens(draw.randint(1, 24))
            log_probs = tuple(-4.0 - draw.random() for _ in completion)
            credit = draw.uniform(-1, 1)
            marks: dict[str, Any] = {"reward": float(chosen), "values": {"length": float(len(completion)), SHARE: 0.5}}
            made.append(make_sequence(prompt, completion, log_probs, credit, pair // group_pairs, chosen, **marks))
    return made


def pairs_in_a_group(loss: str) -> int:
    """Of the made-up sequences, for a loss by its short name."""
    return 4 if loss.endswith("_in_one_group") else 2 if loss.startswith(("everything", "own")) else 1


def batch_of(step: int, vocab_size: int, trainer: Trainer, dp_rank: int, group_pairs: int = 1) -> Batch:
    """This data-parallel rank's part of a step; groups of more than a pair may be spread over ranks."""
    made = sequences(step, vocab_size, group_pairs)
    return make_batch(made, step=step, num_prompts=5, trainer=trainer, dp_rank=dp_rank, cuts_groups=group_pairs > 1)
