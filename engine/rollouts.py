"""From prompts to training sequences: asks the pool for an interval's rollouts at once, has them scored, makes pairs or
advantages, and keeps the ledger of every rollout. It trains nothing and touches no process group.

Waiting: `open` never waits. One helper thread gathers and scores the opened steps in order while the trainer trains;
`next` waits for that thread, and the thread for the engines, whose own deadline it passes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from engine.algorithms.advantages import grouped_advantages
from engine.algorithms.pairs import better_and_worse, correct_and_wrong, extremes, preference_pair
from engine.config import RunConfig
from engine.data.ledger import token_digest
from engine.data.mixture import Mixture
from engine.inference.pool import Pool, Usage
from engine.inference.sampling import sample_requests
from engine.observe.phases import Phase, phase
from engine.observe.sinks import JsonlLedger
from engine.rewards.base import Reward
from engine.types import Completion, Prompt, Rollout, RolloutGroup, Sequence


@dataclass(frozen=True, slots=True)
class StepData:
    """Everything one optimizer step trains on, before it is dealt to ranks."""

    sequences: list[Sequence]
    num_prompts: int
    metrics: dict[str, float]


class StepSource(Protocol):
    """Where steps come from: rollouts sampled now, or what is on disk (replay.py)."""

    def open(self, steps: range) -> None:
        """Lets `steps` be made ready."""
        ...

    def settle(self, step: int) -> None:
        """Waits until nothing that `step` needs is under way; `next` still hands it out."""
        ...

    def next(self, step: int) -> StepData:
        """What `step` trains on; waits for it."""
        ...

    def close(self) -> None:
        """Gives back threads and files."""
        ...


class RolloutSource:
    """The rollouts of a run, step by step."""

    def __init__(
        self, config: RunConfig, prompts: Mixture, pool: Pool, reward: Reward, ledger: JsonlLedger | None
    ) -> None:
        self._config, self._prompts, self._pool, self._reward, self._ledger = config, prompts, pool, reward, ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._sampling: dict[int, Future[tuple[list[Completion], Usage]]] = {}
        self._coming: dict[int, Future[tuple[list[RolloutGroup], Usage]]] = {}

    def open(self, steps: range) -> None:
        """Submits every prompt of `steps`; they all may be sampled from now on."""
        prompts = {step: self._prompts.at(step) for step in steps}
        sampling, samples = self._config.sampling, self._config.algorithm.samples_per_prompt
        batches = [
            sample_requests(
                prompts[step],
                samples,
                run_seed=self._config.run.seed,
                purpose="rollout",
                step=step,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
            )
            for step in steps
        ]
        for step, ticket in zip(steps, self._pool.submit(batches), strict=True):
            self._sampling[step] = self._thread.submit(self._pool.gather, ticket)
            self._coming[step] = self._thread.submit(self._groups, step, prompts[step], self._sampling[step])

    def settle(self, step: int) -> None:
        """Waits as `next` does, which still hands the step out."""
        self._coming[step].result()

    def next(self, step: int) -> StepData:
        """Waits until the groups of `step` are complete and scored. Raises what an engine or the reward raised."""
        started = time.monotonic()
        self._sampling.pop(step).result()
        with phase(Phase.REWARDS):
            groups, usage = self._coming.pop(step).result()
        metrics = {"wait_seconds": time.monotonic() - started} | rollout_metrics(groups, usage)
        version = self._config.schedule.version(step)
        found = {rollout.completion.version for group in groups for rollout in group.rollouts}
        assert found == {version}, f"step {step} must train on rollouts of version {version}, found {found}"
        metrics["staleness"] = float(self._config.schedule.staleness(step))
        data = step_data(groups, self._prompts.shares, metrics, self._config)
        if self._ledger is not None:
            self._ledger.append(row for group in groups for row in ledger_rows(group))
        return data

    def close(self) -> None:
        """Stops the helper thread; what was under way is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _groups(
        self, step: int, prompts: list[Prompt], sampling: Future[tuple[list[Completion], Usage]]
    ) -> tuple[list[RolloutGroup], Usage]:
        completions, usage = sampling.result()
        return score_groups(step, prompts, completions, self._reward), usage


def score_groups(step: int, prompts: Many[Prompt], completions: Many[Completion], reward: Reward) -> list[RolloutGroup]:
    """Groups of consecutive completions (equally many a prompt, in prompt order) with their rewards."""
    size = len(completions) // len(prompts)
    items = [(prompts[place // size], completion.text) for place, completion in enumerate(completions)]
    rollouts = [
        Rollout(completion, score) for completion, score in zip(completions, reward.score(items), strict=True)
    ]
    return [
        RolloutGroup(prompt, step, tuple(rollouts[place * size : (place + 1) * size]))
        for place, prompt in enumerate(prompts)
    ]


def step_data(
    groups: Many[RolloutGroup], shares: Many[tuple[int, int]], metrics: dict[str, float], config: RunConfig
) -> StepData:
    """What a step trains on of all groups sampled for it; `shares` are those of its Mixture. Where there are spare prompts,
    their use is added to `metrics`."""
    batch, used, unused = batch_groups(groups, shares, config)
    spare = {"spare_prompts_used": float(used), "unused_prompts": float(unused)} if len(groups) > len(batch) else {}
    sequences, counts = training_sequences(batch, config)
    share = {"skipped_share": counts["skipped_prompts"] / len(batch)}
    compared = compared_tokens(sequences) if config.algorithm.loss != "grpo" else {}
    return StepData(sequences, len(batch), metrics | counts | share | compared | spare)


def batch_groups(
    groups: Many[RolloutGroup], shares: Many[tuple[int, int]], config: RunConfig
) -> tuple[list[RolloutGroup], int, int]:
    """(the groups of the batch, spare ones among them, groups with signal for which there was no place).

    Of each source (`shares`: how many were sampled, how many the batch counts) the first ones with signal, in order; where
    those are too few, the first without signal stand in the batch beside them, skipped as they would be without spare ones.
    """
    batch: list[RolloutGroup] = []
    used = unused = start = 0
    for sampled, places in shares:
        own = range(start, start + sampled)
        start += sampled
        with_signal = [i for i in own if sampled == places or _sequences_of(groups[i], config, 0)[1]]
        without = [i for i in own if i not in with_signal]
        kept = sorted(with_signal[:places] + without[: max(0, places - len(with_signal))])
        batch += [groups[i] for i in kept]
        used += sum(i >= own[places] for i in kept) if sampled > places else 0
        unused += len(with_signal[places:])
    assert start == len(groups), (start, len(groups))
    return batch, used, unused


def training_sequences(groups: Many[RolloutGroup], config: RunConfig) -> tuple[list[Sequence], dict[str, float]]:
    """The sequences in prompt order, and how many prompts gave no signal and why.

    skipped_prompts: no pair and no advantage but 0. Of verifiable prompts: all_correct_prompts, all_wrong_prompts. Of all:
    unjudged_prompts (none of the rollouts could be judged); tied_prompts: of those with two different rewards, how many
    have several rollouts of the highest or of the lowest, so that a seeded draw chose among them.
    """
    sequences: list[Sequence] = []
    names = ("skipped_prompts", "all_correct_prompts", "all_wrong_prompts", "unjudged_prompts", "tied_prompts")
    counts = dict.fromkeys(names, 0.0)
    num_groups = 0
    for group in groups:
        made, has_signal = _sequences_of(group, config, num_groups)
        sequences += made
        num_groups += any(sequence.group >= 0 for sequence in made)
        correct, wrong = correct_and_wrong(group)
        best, worst = extremes(group)
        counts["skipped_prompts"] += not has_signal
        counts["all_correct_prompts"] += group.prompt.verifiable and bool(correct) and not wrong
        counts["all_wrong_prompts"] += group.prompt.verifiable and bool(wrong) and not correct
        counts["unjudged_prompts"] += not group.judged
        counts["tied_prompts"] += best != worst and len(best) + len(worst) > 2
    return sequences, counts


def compared_tokens(sequences: Many[Sequence]) -> dict[str, float]:
    """Mean lengths of the chosen and the rejected responses that a loss compares; NaN where there are none."""
    compared = [sequence for sequence in sequences if sequence.group >= 0]
    return {
        f"{name}_tokens_mean": _mean([len(s.completion_ids) for s in compared if s.chosen is chosen])
        for name, chosen in (("chosen", True), ("rejected", False))
    }


def _sequences_of(group: RolloutGroup, config: RunConfig, index: int) -> tuple[list[Sequence], bool]:
    """(what the loss trains on of this prompt, whether there is a pair or an advantage).

    DPO and GroupDPO drop a prompt without a pair. GRPO keeps it at advantage 0, since its KL term still sees it, and drops
    it where there is none. Rollouts that could not be judged are left out of all (`reward_timeouts` and `reward_failures`
    count them).
    """
    algorithm = config.algorithm
    if algorithm.loss == "dpo":
        pair = preference_pair(group, algorithm.pairing, config.run.seed)
        return [_sequence(group, r, 0.0, index, r is pair[0]) for r in pair] if pair else [], pair is not None
    advantages = grouped_advantages([r.score.value for r in group.judged], algorithm.normalize_advantages)
    better, worse = better_and_worse(group)
    has_pairs = algorithm.loss == "group_dpo" and bool(better) and bool(worse)
    has_signal = has_pairs or (algorithm.uses_advantages and any(advantages))
    if not has_signal and not (algorithm.uses_advantages and algorithm.kl_weight):
        return [], False
    made = [
        _sequence(group, r, advantage, index if has_pairs else -1, has_pairs and r in better)
        for r, advantage in zip(group.judged, advantages, strict=True)
    ]
    return made, has_signal


def _sequence(group: RolloutGroup, rollout: Rollout, advantage: float, index: int, chosen: bool) -> Sequence:
    completion = rollout.completion
    return Sequence(
        group.prompt.token_ids, completion.token_ids, completion.log_probs, advantage=advantage, group=index, chosen=chosen
    )


def rollout_metrics(groups: Many[RolloutGroup], usage: Usage | None) -> dict[str, float]:
    """What a person watches of all rollouts sampled for a step; without `usage` nothing of how they were. The entropy is the
    mean of minus the log-prob of every sampled token, an unbiased estimate of the next-token entropy at temperature 1.

    Only of verifiable prompts, where the step has any: accuracy and the lengths of right and wrong answers. Only where there
    are several rewards: the mean of each.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    judged = [rollout for group in groups for rollout in group.judged]
    statuses = [rollout.score.status for rollout in rollouts]
    metrics = {
        "reward_mean": _mean([rollout.score.value for rollout in judged]),
        **_metrics_by_reward(groups),
        "rollout_entropy": -math.fsum(p for r in rollouts for p in r.completion.log_probs) / sum(lengths),
        "completion_tokens_mean": sum(lengths) / len(lengths),
        "completion_tokens_p50": percentile(lengths, 50),
        "completion_tokens_p90": percentile(lengths, 90),
        "completion_tokens_p99": percentile(lengths, 99),
        "completion_tokens_max": float(max(lengths)),
        "truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / len(rollouts),
        "reward_timeouts": float(statuses.count("timeout")),
        "reward_failures": float(sum(statuses.count(why) for why in ("died", "unparsable", "invalid"))),
        "reward_too_long": float(statuses.count("too_long")),
    }
    if usage is not None:  # what was sampled while this step was waited for, whichever step's
        metrics |= {"generation_tokens": float(usage.num_tokens), "generation_seconds": usage.busy_seconds}
    return metrics


def _metrics_by_reward(groups: Many[RolloutGroup]) -> dict[str, float]:
    """What only one kind of reward has, and each one's mean where there are several."""
    verified = [rollout for group in groups if group.prompt.verifiable for rollout in group.judged]
    names = sorted({group.prompt.reward for group in groups})
    metrics = {
        f"reward_mean_{name}": _mean([r.score.value for group in groups if group.prompt.reward == name for r in group.judged])
        for name in names
        if len(names) > 1
    }
    if any(group.prompt.verifiable for group in groups):
        correct = [len(rollout.completion.token_ids) for rollout in verified if rollout.score.value > 0]
        incorrect = [len(rollout.completion.token_ids) for rollout in verified if rollout.score.value <= 0]
        metrics["accuracy"] = len(correct) / len(verified) if verified else math.nan
        metrics |= {"correct_tokens_mean": _mean(correct), "incorrect_tokens_mean": _mean(incorrect)}
    return metrics


def percentile(values: Many[float], percent: int) -> float:
    """The smallest of `values` that at least this share of them does not exceed (nearest rank)."""
    return float(sorted(values)[max(0, math.ceil(percent * len(values) / 100) - 1)])


def _mean(values: Many[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def ledger_rows(group: RolloutGroup) -> list[dict[str, object]]:
    """One JSON row a rollout: what was asked, sampled and judged, and which weights sampled it."""
    prompt_tokens = token_digest(group.prompt.token_ids)
    return [
        {
            "step": group.step,
            "version": rollout.completion.version,
            "prompt_id": group.prompt.id,
            "prompt_tokens": prompt_tokens,
            "sample_index": rollout.completion.sample_index,
            "seed": rollout.completion.seed,
            "reward": rollout.score.value,
            "status": rollout.score.status,
            "finish_reason": rollout.completion.finish_reason,
            "text": rollout.completion.text,
            "token_ids": list(rollout.completion.token_ids),
            "log_probs": list(rollout.completion.log_probs),
        }
        for rollout in group.rollouts
    ]
