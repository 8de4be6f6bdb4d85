"""A step in parts, as sync.streaming has it, beside the same step in one piece: real ranks, dealt by the run's own source."""

from __future__ import annotations

from typing import Any

import torch

from engine.algorithms.registry import make_loss
from engine.config.load import RunConfig
from engine.config.options import LOSSES
from engine.megatron.parallel_state import ParallelState
from engine.megatron.policy import Policy
from engine.rollouts.base import StepData
from engine.run.loop import _learn, _next
from engine.run.sources import DealtSource
from tests.parallel.material import sequences
from tests.parallel.policies import make_policy

PARTS = ((2, 3), (0, 1, 6, 7), (4, 5))  # of the eight sequences of a step, whole groups: those that are complete first, ...
PROMPTS = (1, 2, 2)  # of each part, one of the last without a sequence


class Parts:
    """Rank 0's step, in parts."""

    def __init__(self, vocab_size: int, group_pairs: int) -> None:
        self._of_step = lambda step: sequences(step, vocab_size, group_pairs)
        self._left = list(range(len(PARTS)))

    def _part(self, step: int) -> StepData:
        part = self._left.pop(0)
        made = self._of_step(step)
        return StepData([made[i] for i in PARTS[part]], PROMPTS[part], {})

    def early(self, step: int, waiting: Any) -> StepData | None:
        return self._part(step) if len(self._left) > 1 else None

    def next(self, step: int, waiting: Any) -> StepData:
        found, self._left = self._part(step), list(range(len(PARTS)))
        return found


class Whole(Parts):
    """The same in one piece."""

    def early(self, step: int, waiting: Any) -> StepData | None:
        return None

    def next(self, step: int, waiting: Any) -> StepData:
        return StepData(self._of_step(step), sum(PROMPTS), {})


class Known:
    """Ranks that know what rank 0 would tell them."""

    def __init__(self) -> None:
        self._turn = 0

    def listen(self) -> None: ...

    def done(self) -> None: ...

    def heartbeat(self) -> None: ...

    def number(self, _: float) -> float:
        self._turn = (self._turn + 1) % len(PARTS)
        return float(self._turn != 0)


class Told(Known):
    def number(self, _: float) -> float:
        return 0.0


def reduced(policy: Policy, distributed: bool) -> list[torch.Tensor]:
    """This rank's gradients after a step; with the distributed optimizer it has a share of each bucket only."""
    here = policy.parallel
    buckets = [bucket.grad_data for chunk in policy._chunks for buffer in chunk.buffers for bucket in buffer.buckets]
    return [one.view(here.dp_size, -1)[here.dp_rank] if distributed else one for one in buckets]


def streamed(config: RunConfig, parallel: ParallelState, checkpoint: str, group_pairs: int = 1) -> dict[str, Any]:
    """Three steps each way, of which the parts' are done twice: the largest difference of gradients, as a share of their norm,
    and of weights; the metrics; whether the second time has the same bits."""
    loss = make_loss(config.algorithm)
    policies = [make_policy(config, parallel, loss, checkpoint) for _ in range(3)]
    size = policies[0].shape.vocab_size
    metrics: list[list[dict[str, float]]] = [[], [], []]
    apart, equal = 0.0, True
    sources: list[Any] = []
    for kind, words in ((Whole, Told), (Parts, Known), (Parts, Known)):
        rollouts: Any = kind(size, group_pairs) if parallel.rank == 0 else None
        agreement: Any = words()
        cuts_groups = LOSSES.load(config.algorithm.loss).splits_groups()
        sources.append(DealtSource(config, parallel, rollouts, agreement, cuts_groups=cuts_groups))
    for step in range(3):
        for policy, source, told in zip(policies, sources, metrics, strict=True):
            batch, rollouts = _next(step, source)
            record: dict[str, float] = {}
            while rollouts is None:
                record = _learn(policy.add_gradient, policy, batch, record)
                batch, rollouts = _next(step, source)
            told.append(_learn(policy.train_step, policy, batch, record) | rollouts)
        whole, parts, again = (reduced(policy, config.trainer.distributed_optimizer) for policy in policies)
        norm = metrics[0][-1]["grad_norm"]
        apart = max(apart, *(float((a - b).abs().max()) / norm for a, b in zip(whole, parts, strict=True)))
        equal &= all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    states = [policy.state.copy() for policy in policies]
    names = [name for name in states[0] if name.startswith("policy.")]
    untimed = [[{k: v for k, v in row.items() if "seconds" not in k} for row in told] for told in metrics]
    return {
        "gradient": apart,
        "weights": max(float((states[0][name] - states[1][name]).abs().max()) for name in names),
        "metrics": untimed[:2],
        "repeats": equal
        and untimed[1] == untimed[2]
        and all(torch.equal(states[1][name], states[2][name]) for name in states[1]),
    }
