"""What every loss and every algorithm is. A loss goes from token log-probs of a packed microbatch to one scalar that is
already divided by the whole step's own denominator, so that it adds up over microbatches and data-parallel ranks; an
algorithm is a loss that also says what a group of rollouts becomes, which options it has and what they may not be combined
with. No device, no process group.

What a configuration asks an algorithm before a run needs no arithmetic, so torch is imported where something is computed.

Sequences of one group whose loss couples them share a microbatch. Where they do not fit, or are dealt to several data-parallel
ranks, the policy scores them first without gradient, `precompute_split_groups` differentiates the groups' loss by every token
log-prob, and each microbatch then backpropagates alone: exact while the weights stand still, which they do until the optimizer
steps.

Shape legend: T tokens of the microbatch, B sequences of it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from engine.algorithms.advantages import BATCH, OPTION, scale_by_batch
from engine.config.load import RunConfig
from engine.config.options import AlgorithmOptions
from engine.core.errors import ConfigError
from engine.core.metrics import Metric, by_name
from engine.core.types import IGNORED, Batch, Microbatch, Rollout, RolloutGroup, Sequence

if TYPE_CHECKING:
    import torch

Parts = dict[str, "torch.Tensor"]  # what a microbatch contributes to each metric: a detached scalar by name
Result = tuple["torch.Tensor", Parts]  # (scalar loss, parts)
Slopes = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]  # (positions [n], their log-probs [n]) -> [n] float32

ROLLOUT_GAP = Metric(
    "log_prob_gap_mean",
    "absolute difference of policy and rollout log-probs, over the tokens trained on: mismatch when fresh, drift when stale",
    title="log-prob gap",
    unit="nats a token",
    reduce="mean",
    per="target_tokens",
    peers={"TRL": "sampling/sampling_logp_difference/mean"},
)
ROLLOUT_KL = Metric(
    "rollout_kl_mean",
    "KL of the policy to the weights that sampled (k3), over the tokens trained on: mismatch when fresh, drift when stale",
    unit="nats a token",
    reduce="mean",
    per="target_tokens",
    peers={"verl": "rollout_corr/k3_kl", "NeMo-RL": "gen_kl_error"},
)
RATIO_MAX = Metric(
    "ratio_max",
    "largest probability of a token trained on under the policy over that under the weights that sampled it",
    reduce="max",
    peers={"TRL": "sampling/importance_sampling_ratio/max"},
)
RESPONSES, RATIO_SQUARES = "num_responses", "response_ratio_squares"  # sums over the step that records do not have
ESS = Metric(
    "ess_share",
    "effective sample size of the responses trained on, each weighed by its probability under the policy over that under the "
    "weights that sampled it, as a share of their number: 1 where all weigh the same",
    title="effective sample size",
    unit="share",
    reduce="effective",
    sums=(RATIO_SQUARES, RESPONSES),
    peers={"verl": "rollout_corr/rollout_is_eff_sample_size"},
)
MISMATCH = (ROLLOUT_GAP, ROLLOUT_KL, RATIO_MAX, ESS)  # what a loss over rollouts says of trainer against sampler


class Loss:
    """A loss with the metrics it reports."""

    metrics: tuple[Metric, ...] = ()
    needs_reference = False  # whether the loss looks at reference log-probs
    needs_entropy = False  # whether it looks at the entropy of the next token
    needs_squares = False  # whether it looks at `log_square_probs`, which come without gradient

    def denominator(self, batch: Batch) -> int:
        """What the sum over the whole step's microbatches is divided by."""
        raise NotImplementedError

    def coefficients(self, microbatch: Microbatch) -> torch.Tensor | Slopes | None:
        """The loss's derivative by each log-prob, up to one factor: [T] float32 where it depends on no log-prob; a function
        where a token's depends on its own log-prob alone; None where on others'. With it trainer.fused_lm_head computes the
        logits once. The reference's log-probs may be missing: the policy's own are meant then."""
        return None

    def precompute_split_groups(self, microbatches: list[Microbatch], log_probs: Many[torch.Tensor]) -> list[Microbatch]:
        """For groups that are split over several microbatches: these, each with the gradient of those groups' loss by its own
        token log-probs, so that it can backpropagate alone. `log_probs` [T] are the policy's own of each microbatch with its
        present weights, without gradient. Where a group is split over data-parallel ranks, a microbatch holds what a rank has
        of it, and of that the positions with a target alone."""
        return microbatches

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """log_probs [T] float32 with gradient, entropy [T] likewise where needed -> (scalar loss, parts of the metrics)."""
        raise NotImplementedError


class Algorithm(Loss):
    """A loss that a configuration can name. One file holds it with its options, rules and metrics."""

    Options: ClassVar[type[AlgorithmOptions]] = AlgorithmOptions
    needs_rollouts = True  # whether it needs rewards and rollout log-probs, which pairs that others wrote have not
    # Whether `__call__` is a sum over groups divided by `denominator(batch, algorithm.reduction)`, and looks at nothing else of
    # the batch, so that a step can be computed in parts (sync.streaming). Said by the class that has `__call__`.
    sums_over_groups: ClassVar[bool] = False
    # Whether the loss of a response depends on others of its prompt, so that they share a microbatch and a rank.
    couples_groups: ClassVar[bool] = True

    def __init__(self, options: Any, *, sampled: bool = True) -> None:
        """`options` are of the class's own Options. `sampled`: whether there are rollout log-probs to compare with;
        responses that others wrote have none."""
        self.options = options
        self.sampled = sampled

    def denominator(self, batch: Batch) -> int:
        """See Loss."""
        return denominator(batch, self.options.reduction)

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """(what the loss trains on of this prompt, whether it gives a signal: a pair, an advantage). `index` is the group's
        number in the step, or with sync.streaming in its part of it. Rollouts that could not be judged are left out."""
        raise NotImplementedError

    def of_step(self, sequences: list[Sequence], groups: Many[RolloutGroup]) -> list[Sequence]:
        """The step's sequences as they are trained on, once all its groups are known; advantages may depend on all of them."""
        if getattr(self.options, "normalize_advantages", "") != BATCH:
            return sequences
        return scale_by_batch(sequences, groups)

    def precompute_split_groups(self, microbatches: list[Microbatch], log_probs: Many[torch.Tensor]) -> list[Microbatch]:
        """See Loss. ConfigError: a loss that compares the sequences of a group must have this for groups larger than a row."""
        if not self.couples_groups:
            return microbatches
        raise ConfigError(
            f"trainer.microbatch_tokens must hold all sequences of a group for algorithm.loss = {self.options.loss!r}, which "
            f"has no precompute_split_groups; found a larger group: raise it, or extend GroupLoss, which has one"
        )

    @classmethod
    def splits_groups(cls) -> bool:
        """Whether the sequences of a group may stand in several microbatches, and on several data-parallel ranks."""
        return cls.precompute_split_groups is not Algorithm.precompute_split_groups

    @classmethod
    def require_parts(cls, name: str) -> None:
        """ConfigError for a user's class, which algorithm.loss names so, that cannot be a loss."""
        wanted = {"sequences": Algorithm.sequences, "__call__": Loss.__call__}
        missing = [method for method, ours in wanted.items() if getattr(cls, method) is ours]
        if missing:
            raise ConfigError(
                f"algorithm.loss = {name!r} must have the methods sequences and __call__ of an Algorithm; found no "
                f"{' and no '.join(missing)}: write them, or extend GroupLoss, which needs group_loss alone"
            )
        for metric in cls.metrics:
            if not isinstance(metric, Metric):
                raise ConfigError(f"algorithm.loss = {name!r} must declare its metrics as Metric; found {metric!r}: mend it")

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """Sentences for options that this loss cannot be combined with: keys, rule, values found, fix. ConfigError where a part
        that an option names is not there."""
        a, broken = config.algorithm, list[str]()
        made = cls(a)
        if config.sync.reference != "never" and not made.needs_reference:
            broken.append(
                f"sync.reference needs a loss that looks at the reference; found {config.sync.reference!r} with algorithm.loss "
                f"= {a.loss!r}{cls.without_reference}: set sync.reference = 'never'"
            )
        measured = config.sync.auto_metric
        if config.sync.sync_interval == "auto" and measured not in {metric.name for metric in made.metrics}:
            broken.append(
                f"sync.sync_interval = 'auto' needs a loss that reports sync.auto_metric; found {measured!r} with "
                f"algorithm.loss = {a.loss!r}, which does not: give it that metric, or set sync_interval to a number"
            )
        if a.entropy_weight and config.trainer.fused_lm_head:
            broken.append(
                f"algorithm.entropy_weight needs the logits, which trainer.fused_lm_head never makes; found {a.entropy_weight} "
                f"and true: set trainer.fused_lm_head to false"
            )
        return broken + (cls._broken_streaming_rules(config) if config.sync.streaming else [])

    @classmethod
    def _broken_streaming_rules(cls, config: RunConfig) -> list[str]:
        """Sentences for a loss that looks at a step as a whole, and so cannot be computed in parts."""
        a, broken = config.algorithm, list[str]()
        normalization = getattr(a, "normalize_advantages", "")
        if normalization == BATCH:
            broken.append(
                f"sync.streaming computes gradients before all rewards of a step are known, which {OPTION} = {BATCH!r} needs; "
                f"found both: use 'mean' or 'mean_std', or set streaming = false"
            )
        of_call, of_step = (next(c for c in cls.__mro__ if name in vars(c)) for name in ("__call__", "of_step"))
        if not vars(of_call).get("sums_over_groups", False) or of_step is not Algorithm:
            found = "its own of_step" if of_step is not Algorithm else "no sums_over_groups = True beside its __call__"
            broken.append(
                f"sync.streaming needs a loss that is a sum over groups, divided as algorithm.reduction says; found "
                f"algorithm.loss = {a.loss!r} with {found}: say so where it is one, extend GroupLoss, or set streaming = false"
            )
        return broken

    without_reference: ClassVar[str] = ""  # for the message above: which option makes it so


class SumLoss(Loss):
    """A weighted sum of losses over the same microbatches. At most one of them couples the sequences of a group."""

    def __init__(self, parts: Many[tuple[float, Loss]]) -> None:
        self.parts = tuple(parts)
        self.metrics = tuple(by_name(metric for _, part in parts for metric in part.metrics).values())
        self.needs_reference = any(part.needs_reference for _, part in parts)
        self.needs_entropy = any(part.needs_entropy for _, part in parts)
        self.needs_squares = any(part.needs_squares for _, part in parts)

    def denominator(self, batch: Batch) -> int:
        """See Loss: that of all its parts."""
        (found,) = {part.denominator(batch) for _, part in self.parts}
        return found

    def precompute_split_groups(self, microbatches: list[Microbatch], log_probs: Many[torch.Tensor]) -> list[Microbatch]:
        """See Loss."""
        for _, part in self.parts:
            microbatches = part.precompute_split_groups(microbatches, log_probs)
        return microbatches

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss. A metric that several parts know is the same in each."""
        total, metrics = log_probs.new_zeros(()), Parts()
        for weight, part in self.parts:
            loss, more = part(log_probs, microbatch, batch, entropy)
            total = total + weight * loss
            metrics |= more
        return total, metrics


def denominator(batch: Batch, reduction: str) -> int:
    """What the step's loss is divided by: all prompts, prompts that are compared, or target tokens; at least 1."""
    counts = {"prompts": batch.num_prompts, "pairs": batch.num_groups, "tokens": batch.num_target_tokens}
    return max(1, counts[reduction])


def undivided(batch: Batch) -> Batch:
    """The same batch for a loss that is not to be divided: whatever it is divided by is 1."""
    return replace(batch, num_prompts=1, num_groups=1, num_target_tokens=1)


def mismatch(log_probs: torch.Tensor, microbatch: Microbatch) -> Parts:
    """The parts of MISMATCH. With r = policy probability / rollout probability of a target token: the sum of |log r|, the sum
    of r - log r - 1 (log r held at LOG_LIMIT), the largest r (0 without a token). With R = the product of r over a response,
    its logarithm held likewise: the sums of R, of R squared and of responses."""
    import torch

    from engine.ops import sequence_log_probs
    from engine.ops.policy_gradient import LOG_LIMIT

    counted = microbatch.targets != IGNORED
    gap = log_probs.detach() - microbatch.rollout_log_probs
    held = torch.where(counted, gap, 0.0).clamp(max=LOG_LIMIT)
    ratio = torch.where(counted, held.exp(), 0.0)
    bounds = microbatch.cu_seqlens.to(gap.device)
    trained = sequence_log_probs(counted.float(), bounds) > 0  # not padding, nor a prompt that stands by itself
    of_response = sequence_log_probs(gap, bounds, counted).clamp(max=LOG_LIMIT).exp() * trained
    return {
        ROLLOUT_GAP.name: (gap.abs() * counted).sum(),
        ROLLOUT_KL.name: (held.expm1() - held).sum(),
        RATIO_MAX.name: ratio.amax() if ratio.numel() else ratio.sum(),
        ESS.name: of_response.sum(),
        RATIO_SQUARES: of_response.square().sum(),
        RESPONSES: trained.sum().to(gap),
    }


def response_lengths(microbatch: Microbatch) -> torch.Tensor:
    """Target tokens of each sequence, [B] float32; 1 for the padding segment, which has none."""
    from engine.ops import sequence_log_probs

    counted = (microbatch.targets != IGNORED).float()
    return sequence_log_probs(counted, microbatch.cu_seqlens).clamp(min=1)


def training_sequence(group: RolloutGroup, rollout: Rollout, /, **more: Any) -> Sequence:
    """The training sequence of a rollout; `more` are fields of Sequence."""
    completion = rollout.completion
    return Sequence(group.prompt.token_ids, completion.token_ids, completion.log_probs, reward=rollout.score.value, **more)


def store_split_groups(
    microbatches: list[Microbatch], leaves: list[torch.Tensor], loss: torch.Tensor, metrics: Parts
) -> list[Microbatch]:
    """The microbatches with the derivative of the split groups' `loss` by the token log-probs of each (`leaves`, [T] each); the
    first one carries loss and metrics."""
    import torch

    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    stored = []
    for index, (microbatch, leaf, gradient) in enumerate(zip(microbatches, leaves, gradients, strict=True)):
        known = torch.zeros_like(leaf) if gradient is None else gradient
        first: dict[str, Any] = {"split_loss": loss.detach(), "split_metrics": metrics} if index == 0 else {}
        stored.append(replace(microbatch, split_gradients=known, **first))
    return stored


def split_groups_loss(log_probs: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """What the split groups add to a microbatch's loss: their value on one, their gradient by the tokens of each."""
    gradients = microbatch.split_gradients
    assert gradients is not None, "groups that are split over several microbatches must be precomputed"
    loss = (gradients * (log_probs - log_probs.detach())).sum()
    return loss if microbatch.split_loss is None else microbatch.split_loss + loss
