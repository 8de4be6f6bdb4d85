"""A loss over the rollouts of one prompt in plain torch: what a user writes to bring an own algorithm in one file.

    from engine.algorithms.group import Group, GroupLoss

    class Regression(GroupLoss):
        def group_loss(self, group: Group):
            gain = group.sums(group.log_probs) - group.sums(group.rollout_log_probs)
            return (gain - group.advantages).square().mean()

and `algorithm.loss = "regression.py:Regression"`; docs/algorithms.md has one with options and metrics. The loss is exact at
any layout: log-probs are those of the whole vocabulary, and where a group does not fit a microbatch, or is dealt to several
data-parallel ranks, its loss is differentiated by every token log-prob first (base.py). The kernels of the built-in losses are
not used.

Shape legend: T tokens of the microbatch, B sequences of it, N judged rollouts of a prompt, L tokens of a response.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from engine.algorithms.advantages import advantage_function, advantages_of
from engine.algorithms.base import (
    MISMATCH,
    Algorithm,
    Parts,
    Result,
    denominator,
    mismatch,
    split_groups_loss,
    store_split_groups,
    training_sequence,
)
from engine.config.options import AlgorithmOptions, Normalization
from engine.core.errors import ConfigError, NumericsError
from engine.core.metrics import Metric, part_reductions
from engine.core.registry import called
from engine.core.types import IGNORED, Batch, Microbatch, RolloutGroup, Sequence

if TYPE_CHECKING:
    import torch

GROUPS = Metric("groups", "prompts whose rollouts a loss of the user's own compared", unit="prompts", reduce="sum")
REDUCTIONS = ("sum", "mean", "max")  # that a metric of a user's loss may have
PerToken = tuple["torch.Tensor", ...]  # N tensors [L] of float32


@dataclass(frozen=True, slots=True)
class Group:
    """The N judged rollouts of one prompt, in the order of their sample indices."""

    index: int  # the prompt's number among those compared in the step, or with sync.streaming in its part of it
    rewards: torch.Tensor  # [N] float32
    advantages: torch.Tensor  # [N] float32
    token_ids: tuple[torch.Tensor, ...]  # N tensors [L] of int64, the responses
    log_probs: PerToken  # the policy's, with gradient
    rollout_log_probs: PerToken  # of the weights that sampled them
    reference_log_probs: PerToken | None  # None unless the loss's `needs_reference` is set
    values: Mapping[str, torch.Tensor]  # [N] float32 by name: what `GroupLoss.values` attached

    @property
    def num_tokens(self) -> torch.Tensor:
        """Tokens of each response, [N] float32."""
        import torch

        from engine.ops import to_device

        lengths = torch.tensor([float(ids.numel()) for ids in self.token_ids], dtype=self.rewards.dtype)
        return to_device([lengths], self.rewards.device)[0]

    @staticmethod
    def sums(log_probs: PerToken) -> torch.Tensor:
        """The sum over each response's tokens, [N] float32."""
        import torch

        return torch.stack([tokens.sum() for tokens in log_probs])


class GroupOptions(AlgorithmOptions):
    """What losses over groups have; a user's own Options extend it. A loss that does not look at `rollout_log_probs` may say so
    by a property `uses_ratios` that is false; its log-probs are then those of temperature 1."""

    normalize_advantages: Normalization = Field("mean", description="what a reward is compared with in its group, as GRPO's")


class GroupLoss(Algorithm):
    """The base of a user's own loss: `group_loss`, and where wanted `Options`, `metrics`, `needs_reference`, `values`,
    `sequences`, `broken_rules`."""

    Options: ClassVar[type[AlgorithmOptions]] = GroupOptions
    sums_over_groups = True
    _value_names: frozenset[str] | None = None  # of what `values` attached to the first group

    def __init__(self, options: Any, *, sampled: bool = True) -> None:
        """ConfigError when the class declares metrics that cannot be put together."""
        super().__init__(options, sampled=sampled)
        self._own = {metric.name: metric for metric in type(self).metrics}
        for metric in self._own.values():
            if metric.reduce not in REDUCTIONS or metric.sums or metric.name in (GROUPS.name, *part_reductions(MISMATCH)):
                raise ConfigError(
                    f"algorithm.loss = {options.loss!r} must declare metrics with reduce = 'sum', 'mean' or 'max' and names of "
                    f"its own; found {metric.name!r} with {metric.reduce!r}: mend the declaration"
                )
            counts = (GROUPS.name, "target_tokens", *(one.name for one in self._own.values() if one.reduce == "sum"))
            if metric.reduce == "mean" and metric.per not in counts:
                raise ConfigError(
                    f"algorithm.loss = {options.loss!r} must divide the mean {metric.name} by one of {', '.join(counts)}; "
                    f"found per = {metric.per!r}: mend the declaration"
                )
        self.metrics = (GROUPS, *MISMATCH, *self._own.values())
        self.advantages = advantage_function(options.normalize_advantages)

    @classmethod
    def require_parts(cls, name: str) -> None:
        """See Algorithm."""
        super().require_parts(name)
        own = cls.group_loss
        parameters = list(inspect.signature(own).parameters)
        kind = "async " if inspect.iscoroutinefunction(own) else "generator " if inspect.isgeneratorfunction(own) else ""
        if own is GroupLoss.group_loss or kind or len(parameters) != 2:
            raise ConfigError(
                f"algorithm.loss = {name!r} must have a method group_loss(self, group); found "
                f"{'none' if own is GroupLoss.group_loss else f'{kind}group_loss({chr(44).join(parameters)})'}: write it"
            )

    def group_loss(self, group: Group) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one group, a finite scalar that depends on `group.log_probs`; with it, where metrics are declared, this
        group's part of each by name. The step's loss is the sum over groups, divided as algorithm.reduction says."""
        raise NotImplementedError

    def values(self, group: RolloutGroup) -> Mapping[str, Many[float]]:
        """Named numbers to attach to the judged rollouts of a group, one each; computed where the rollouts are."""
        return {}

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """See Algorithm: every judged rollout; a signal wherever there is one."""
        judged = group.judged
        if not judged:
            return [], False
        advantages = advantages_of(self.advantages, group)
        attached = self._attached(group, len(judged))
        return [
            training_sequence(
                group,
                rollout,
                advantage=advantages[place],
                group=index,
                values={name: values[place] for name, values in attached.items()},
            )
            for place, rollout in enumerate(judged)
        ], True

    def _attached(self, group: RolloutGroup, num_judged: int) -> dict[str, list[float]]:
        """What `values` attaches to a group, checked: finite, one a rollout, and of the names that the step's other groups
        have, since they are packed together."""

        def attach() -> dict[str, list[float]]:
            return {name: [float(value) for value in values] for name, values in self.values(group).items()}

        attached = called(self.options.loss, "algorithm.loss", attach)
        for name, values in attached.items():
            if len(values) != num_judged or not all(map(math.isfinite, values)):
                raise NumericsError(
                    f"{self._name} must attach one finite value of {name!r} to each of {num_judged} judged rollouts; found "
                    f"{values}: mend `values`"
                )
        if self._value_names is None:
            self._value_names = frozenset(attached)
        if self._value_names != attached.keys():
            found, before = (", ".join(sorted(names)) or "none" for names in (attached, self._value_names))
            raise NumericsError(
                f"{self._name} must attach values of the same names to every group; found {found} for prompt "
                f"{group.prompt.id}, and {before} before: mend `values`"
            )
        return attached

    def precompute_split_groups(self, microbatches: list[Microbatch], log_probs: Many[torch.Tensor]) -> list[Microbatch]:
        """See Loss."""
        import torch

        leaves = [own.detach().requires_grad_() for own in log_probs]
        with torch.enable_grad():
            loss, metrics = self._total(groups_of(microbatches, leaves, split=True), leaves[0])
        return store_split_groups(microbatches, leaves, loss, metrics)

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        loss, metrics = self._total(groups_of([microbatch], [log_probs], split=False), log_probs)
        if microbatch.split_gradients is not None:
            loss = loss + split_groups_loss(log_probs, microbatch)
            metrics = self._joined(metrics, microbatch.split_metrics)
        metrics |= mismatch(log_probs, microbatch)
        return loss / denominator(batch, self.options.reduction), metrics

    @property
    def _name(self) -> str:
        return f"algorithm.loss = {self.options.loss!r}"

    def _total(self, groups: list[Group], log_probs: torch.Tensor) -> Result:
        """(sum over groups of the loss, parts of the metrics but the mismatch's); of no group 0, with a gradient of 0."""
        loss = log_probs[:0].sum()
        start = {name: -math.inf if metric.reduce == "max" else 0.0 for name, metric in self._own.items()}
        metrics: Parts = {name: log_probs.new_full((), value) for name, value in start.items()}
        metrics[GROUPS.name] = log_probs.new_full((), float(len(groups)))
        losses: list[torch.Tensor] = []
        for group in groups:
            value, parts = self._evaluated(group)
            losses.append(value)
            loss = loss + value
            metrics = self._joined(metrics, parts)
        self._require_finite(groups, losses)
        return loss, metrics

    def _require_finite(self, groups: list[Group], losses: list[torch.Tensor]) -> None:
        """NumericsError for the first group whose loss is not finite; the device is asked once for all of them."""
        import torch

        if not groups or bool(torch.isfinite(torch.stack([loss.detach() for loss in losses])).all()):
            return
        group, loss = next((group, loss) for group, loss in zip(groups, losses, strict=True) if not torch.isfinite(loss))
        raise NumericsError(
            f"{self._name} must return a finite loss; found {loss.item()} for group {group.index} with rewards "
            f"{group.rewards.tolist()}: mend the loss"
        )

    def _joined(self, metrics: Parts, more: Parts) -> Parts:
        import torch

        def join(name: str, value: torch.Tensor) -> torch.Tensor:
            if name not in more:
                return value
            at_most = name in self._own and self._own[name].reduce == "max"
            return torch.maximum(value, more[name]) if at_most else value + more[name]

        return {name: join(name, value) for name, value in metrics.items()}

    def _evaluated(self, group: Group) -> Result:
        """What `group_loss` returns, checked. NumericsError names the user's reference and what it broke."""
        import torch

        found = called(self.options.loss, "algorithm.loss", self.group_loss, group)
        loss, parts = found if isinstance(found, tuple) else (found, {})
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            shown = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise NumericsError(f"{self._name} must return a scalar tensor for a group; found {shown}: reduce it")
        if not loss.requires_grad:
            raise NumericsError(
                f"{self._name} must return a loss with a gradient; found none for group {group.index}: compute it from "
                f"group.log_probs, without .item(), .detach() or torch.no_grad()"
            )
        if parts.keys() != self._own.keys():
            raise NumericsError(
                f"{self._name} must return a value for each metric that it declares; found {', '.join(sorted(parts)) or 'none'}"
                f", declared are {', '.join(sorted(self._own)) or 'none'}: declare them in `metrics`, or return the same names"
            )
        scalars = {name: _scalar(value, loss) for name, value in parts.items()}
        for name, value in scalars.items():
            if value.dim() != 0:
                raise NumericsError(f"{self._name}: metric {name} must be a scalar; found shape {list(value.shape)}: reduce it")
        return loss.to(group.rewards.dtype), {name: value.to(group.rewards.dtype) for name, value in scalars.items()}


def _scalar(value: Any, like: torch.Tensor) -> torch.Tensor:
    """A metric's value without gradient, on the device of `like`; a plain number is written there and not copied."""
    import torch

    if isinstance(value, (bool, int, float)):
        return torch.full((), value, device=like.device)
    return torch.as_tensor(value, device=like.device).detach()


def groups_of(microbatches: list[Microbatch], log_probs: Many[torch.Tensor], *, split: bool) -> list[Group]:
    """The groups of these microbatches by number: those that stand in one, or those that are split over several. The host reads
    once a microbatch where its sequences are."""
    members: dict[int, list[tuple[int, Microbatch, int, dict[str, torch.Tensor]]]] = {}
    for microbatch, own in zip(microbatches, log_probs, strict=True):
        groups, places, counts = _read(microbatch, split)
        if not any(group >= 0 for group in groups):
            continue
        positions = microbatch.target_positions[: sum(counts)]  # of a row without a target none
        per_token = {"token_ids": microbatch.targets, "log_probs": own, "rollout_log_probs": microbatch.rollout_log_probs}
        if microbatch.reference_log_probs is not None:
            per_token["reference_log_probs"] = microbatch.reference_log_probs
        parts = {name: values.index_select(0, positions).split(counts) for name, values in per_token.items()}
        for b, group in enumerate(groups):
            if group >= 0:
                tokens = {name: values[b] for name, values in parts.items()}
                members.setdefault(group, []).append((places[b], microbatch, b, tokens))
    return [_group(index, sorted(members[index], key=lambda member: member[0])) for index in sorted(members)]


def _read(microbatch: Microbatch, split: bool) -> tuple[list[int], list[int], list[int]]:
    """Of each sequence its group, or -1 where that is not wanted, its place in the step and its tokens with a target."""
    import torch

    groups = torch.where(microbatch.split == split, microbatch.groups, -1)
    before = torch.nn.functional.pad((microbatch.targets != IGNORED).cumsum(0), (1, 0))
    counts = before.index_select(0, microbatch.cu_seqlens).diff()
    columns: list[list[int]] = torch.stack([groups, microbatch.places, counts]).tolist()
    return columns[0], columns[1], columns[2]


def _group(index: int, members: list[tuple[int, Microbatch, int, dict[str, torch.Tensor]]]) -> Group:
    import torch

    def per_token(name: str) -> tuple[torch.Tensor, ...]:
        return tuple(tokens[name] for *_, tokens in members)

    return Group(
        index=index,
        rewards=torch.stack([microbatch.rewards[b] for _, microbatch, b, _ in members]),
        advantages=torch.stack([microbatch.advantages[b] for _, microbatch, b, _ in members]),
        token_ids=per_token("token_ids"),
        log_probs=per_token("log_probs"),
        rollout_log_probs=per_token("rollout_log_probs"),
        reference_log_probs=per_token("reference_log_probs") if "reference_log_probs" in members[0][3] else None,
        values={
            name: torch.stack([microbatch.values[name][b] for _, microbatch, b, _ in members]) for name in members[0][1].values
        },
    )
