"""DPO: the preference loss of the paper (equation 3) over one pair a prompt, and its variants: IPO, smoothed labels, log-probs
averaged over the response. GroupDPO (group_dpo.py) has the same loss over all pairs of a group.

Shape legend: T tokens of the microbatch, B sequences of it, P pairs of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from engine.algorithms.base import (
    MISMATCH,
    Algorithm,
    Parts,
    Result,
    denominator,
    mismatch,
    response_lengths,
    split_groups_loss,
    store_split_groups,
    training_sequence,
)
from engine.algorithms.pairs import all_pairs, pairing_function, preference_pair
from engine.config.load import RunConfig
from engine.config.options import AlgorithmOptions, Factor, Pairing, Unit, Weight
from engine.core.metrics import Metric
from engine.core.types import IGNORED, Batch, Microbatch, RolloutGroup, Sequence

if TYPE_CHECKING:
    import torch

PAIRS = Metric("pairs", "pairs that the loss compared", unit="pairs", reduce="sum")


def _of_pairs(name: str, help: str, unit: str, title: str = "", **peers: str) -> Metric:
    return Metric(name, help, title=title, unit=unit, reduce="mean", per="pairs", peers=peers)


MARGIN = _of_pairs(
    "margin_mean",
    "beta times the difference of log-ratios to the reference, over the pairs",
    "",
    title="margin",
    TRL="rewards/margins",
)
PREFERRED = _of_pairs("preferred_share", "pairs with a positive margin", "share", TRL="rewards/accuracies")
CHOSEN = _of_pairs(
    "chosen_log_prob_mean",
    "the policy's of the chosen response, before the step, over the pairs",
    "nats a response",
    TRL="logps/chosen",
)
PAIR_WEIGHT = _of_pairs("pair_weight_mean", "with algorithm.weight_pairs: of a pair, 1 as the policy itself writes", "")
REJECTED = _of_pairs("rejected_log_prob_mean", "the same of the rejected response", "nats a response", TRL="logps/rejected")


class PreferenceOptions(AlgorithmOptions):
    """What losses over pairs have."""

    beta: Factor = Field(
        0.1, description="DPO's inverse temperature; the paper's: 0.1 on math, 0.01 with a reward model (TRL: beta)"
    )
    preference_loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="of the difference of a pair's log-ratios: 'sigmoid' (DPO), or 'ipo', its squared distance from 1 / (2 "
        "beta) (TRL: loss_type)",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), Unit("of 1")] = Field(
        0.0, description="how often a pair is thought to be the wrong way round, with 'sigmoid' (cDPO)"
    )
    average_log_probs: bool = Field(
        False,
        description="divide the log-ratio of a response by its number of tokens; beta is then larger, as Tulu 3's 5 (TRL: "
        "loss_type = 'sigmoid_norm', and of its 'ipo')",
    )
    weight_pairs: bool = Field(
        False,
        description="weigh each pair by how likely the policy is to write its responses, compared with what it would write "
        "itself (WPO; TRL: use_weighting)",
    )
    nll_weight: Weight = Field(0.0, description="of the NLL of the chosen response (TRL: rpo_alpha)")
    choose_truncated: bool = Field(False, description="whether a response cut off at sampling.max_tokens may be the chosen one")

    @property
    def uses_ratios(self) -> bool:
        """A preference loss is of the model's own distribution (paper, equations 2 and 3), however its pairs were sampled."""
        return False


class DpoOptions(PreferenceOptions):
    """DPO's own."""

    pairing: Pairing = Field(
        "random",
        description="the pair of a verifiable prompt: 'random', 'best_worst', 'length_matched', or your own as "
        "path/to/file.py:name",
    )


class Dpo(Algorithm):
    """-log sigmoid(beta * [(l_pi - l_ref)(chosen) - (l_pi - l_ref)(rejected)]), plus nll_weight * NLL(chosen): the mean
    of that over all pairs of a prompt, of which DPO has one.

    l is the sum of token log-probs over the response, EOS included, not divided by length. Paper, equation 3.

    With h the difference of log-ratios, [..], average_log_probs divides each of both by its response's tokens first (Tulu 3,
    arXiv 2411.15124). label_smoothing = e makes the first term (1 - e) * (-log sigmoid(beta h)) + e * (-log
    sigmoid(-beta h)) (cDPO, Mitchell 2023), preference_loss = "ipo" makes it (h - 1 / (2 beta))^2 (IPO, arXiv 2310.12036,
    equation 17). weight_pairs multiplies it with w(chosen) * w(rejected), a constant, where log w is the mean over the response
    of the token's log-prob minus the log of the sum of all tokens' squared probabilities (WPO, arXiv 2406.11827, with its
    sampled alignment). The NLL is neither averaged nor weighed.
    """

    Options: ClassVar[type[PreferenceOptions]] = DpoOptions
    needs_reference = True
    sums_over_groups = True
    needs_rollouts = False

    def __init__(self, options: PreferenceOptions, *, sampled: bool = True) -> None:
        super().__init__(options, sampled=sampled)
        self.beta, self.nll_weight = options.beta, options.nll_weight
        self.needs_squares = options.weight_pairs
        weighted = (PAIR_WEIGHT,) if options.weight_pairs else ()
        self.metrics = (PAIRS, MARGIN, PREFERRED, CHOSEN, REJECTED, *weighted, *(MISMATCH if sampled else ()))

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """The group's one pair; a prompt without a pair is dropped."""
        pair = preference_pair(group, self.options.pairing, run_seed, self.options.choose_truncated)
        if pair is None:
            return [], False
        return [training_sequence(group, rollout, group=index, chosen=rollout is pair[0]) for rollout in pair], True

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """See Algorithm."""
        a: Any = config.algorithm
        broken = super().broken_rules(config)
        if a.label_smoothing and a.preference_loss != "sigmoid":
            broken.append(
                f"algorithm.label_smoothing needs algorithm.preference_loss = 'sigmoid'; found {a.label_smoothing} with "
                f"{a.preference_loss!r}: set it to 0"
            )
        if a.weight_pairs and config.trainer.fused_lm_head:
            broken.append(
                "algorithm.weight_pairs needs the logits, which trainer.fused_lm_head never makes; found both true: set one to "
                "false"
            )
        if isinstance(a, DpoOptions):
            pairing_function(a.pairing)  # a user's own must be there
        return broken

    def precompute_split_groups(self, microbatches: list[Microbatch], log_probs: Many[torch.Tensor]) -> list[Microbatch]:
        """See Loss."""
        import torch

        from engine.ops import to_device

        leaves = [own.detach().requires_grad_() for own in log_probs]
        split_groups = torch.cat([torch.where(m.split, m.groups, -1) for m in microbatches])
        chosen = torch.cat([m.chosen for m in microbatches])
        groups, sides = torch.stack([split_groups, chosen.to(split_groups)]).tolist()  # the host waits for the device once
        pairs, weights = to_device(all_pairs(groups, [side == 1 for side in sides]), leaves[0].device)
        with torch.enable_grad():
            sums = [self._sums(leaf, m) for leaf, m in zip(leaves, microbatches, strict=True)]
            policy, log_ratio, alignment = (torch.cat(parts) for parts in zip(*sums, strict=True))
            loss, metrics = self._compare(policy, log_ratio, alignment, pairs, weights)
        return store_split_groups(microbatches, leaves, loss, metrics)

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        policy, log_ratio, alignment = self._sums(log_probs, microbatch)
        loss, metrics = self._compare(policy, log_ratio, alignment, microbatch.pairs, microbatch.pair_weights)
        if microbatch.split_gradients is not None:
            loss = loss + split_groups_loss(log_probs, microbatch)
            metrics = {name: value + microbatch.split_metrics.get(name, 0.0) for name, value in metrics.items()}
        if self.sampled:
            metrics |= mismatch(log_probs, microbatch)
        return loss / denominator(batch, self.options.reduction), metrics

    def _sums(self, log_probs: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each response the policy's log-prob, that minus the reference's, averaged if asked for, and its weight in pairs,
        without gradient; [B] each."""
        assert microbatch.reference_log_probs is not None, "the reference must score a microbatch before DPO's loss"
        import torch

        from engine.ops import sequence_log_probs

        bounds = microbatch.cu_seqlens.to(log_probs.device)
        policy = sequence_log_probs(log_probs, bounds)
        log_ratio = policy - sequence_log_probs(microbatch.reference_log_probs, bounds)
        if self.options.average_log_probs:
            log_ratio = log_ratio / response_lengths(microbatch)
        alignment = torch.ones_like(policy)
        if self.needs_squares:
            assert microbatch.log_square_probs is not None, "the policy must score a microbatch before its pairs are weighed"
            aligned = log_probs.detach() - microbatch.log_square_probs
            sums = sequence_log_probs(aligned, bounds, microbatch.targets != IGNORED)
            alignment = (sums / response_lengths(microbatch)).exp()
        return policy, log_ratio, alignment

    def _compare(
        self,
        policy: torch.Tensor,
        log_ratio: torch.Tensor,
        alignment: torch.Tensor,
        pairs: torch.Tensor,
        weights: torch.Tensor,
    ) -> Result:
        """(weighted sum over pairs of the loss, its metrics but those of the mismatch)."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = pairs.unbind(-1)
        difference = log_ratio[chosen] - log_ratio[rejected]
        margin = self.beta * difference
        of_pairs = alignment.detach()[chosen] * alignment.detach()[rejected]
        compared = weights * of_pairs if self.needs_squares else weights
        smoothing = self.options.label_smoothing
        if self.options.preference_loss == "ipo":
            loss = (compared * (difference - 1 / (2 * self.beta)).square()).sum()
        elif smoothing:
            loss = -(compared * ((1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin))).sum()
        else:
            loss = -(compared * logsigmoid(margin)).sum()
        if self.nll_weight:
            loss = loss - self.nll_weight * (weights * policy[chosen]).sum()
        metrics: Parts = {
            PAIRS.name: margin.new_full((), float(chosen.numel())),
            MARGIN.name: margin.sum().detach(),
            PREFERRED.name: (margin > 0).float().sum(),
            CHOSEN.name: policy[chosen].sum().detach(),
            REJECTED.name: policy[rejected].sum().detach(),
        }
        if self.needs_squares:
            metrics[PAIR_WEIGHT.name] = of_pairs.sum()
        return loss, metrics
