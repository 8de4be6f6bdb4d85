"""What options of [sync] may not be combined, with each other and with other tables: intervals decided on the way, gradients
while others are sampled, work ahead of a sync, and the reference. Each broken rule is a sentence with keys, rule, values found
and fix.
"""

from __future__ import annotations

from engine.config.options import Options
from engine.config.schedules.base import Schedule

LEAST_LOOKAHEAD_IN_FLIGHT = 2  # intervals: the next one must be complete before a sync, so only a further one can be paused
LEAST_MIX_OF_BFLOAT16 = 0.5  # 8 bits do not hold the sum of a weight and less than half of its last bit


def broken_pilot_rules(c: Options) -> list[str]:
    """Sentences for what intervals that are decided on the way (sync.sync_interval = 'auto') cannot go with."""
    sync, broken = c.sync, list[str]()
    if sync.sync_interval != "auto":
        return broken
    if sync.semantics != "paper":
        broken.append(
            f"sync.sync_interval = 'auto' decides which steps sync, and so would sync.semantics; found {sync.semantics!r}: set "
            f"it to 'paper', or sync_interval to a number"
        )
    if sync.lookahead or sync.in_flight:
        broken.append(
            f"sync.sync_interval = 'auto' decides on an interval at its first step, so none can be sampled ahead, and "
            f"sync.lookahead must be 0 and sync.in_flight false; found {sync.lookahead} and {str(sync.in_flight).lower()}: set "
            f"them so, or sync_interval to a number"
        )
    if c.checkpoint.best_by is not None and c.evaluation.every != 1:
        broken.append(
            f"checkpoint.best_by needs every checkpoint to be judged, and with sync.sync_interval = 'auto' they come at syncs, "
            f"whichever steps those are; found evaluation.every = {c.evaluation.every!r}: set it to 1, remove best_by, or set "
            f"sync_interval to a number"
        )
    if sync.auto_metric == "ess_share" and (sync.auto_bound or 0.0) >= 1:
        broken.append(
            f"sync.auto_bound must be below 1 with sync.auto_metric = 'ess_share', which is 1 where nothing has drifted; found "
            f"{sync.auto_bound}: lower it, as to 0.9"
        )
    return broken


def broken_streaming_rules(c: Options, schedule: Schedule) -> list[str]:
    """Sentences for what gradients that are computed while other groups are sampled (sync.streaming) cannot go with."""
    sync, t, broken = c.sync, c.trainer, list[str]()
    if not sync.streaming:
        return broken
    if sync.sync_interval != 1 or any(schedule.version(step) != step for step in range(c.run.steps)):
        broken.append(
            f"sync.streaming is of steps whose responses are sampled while the trainer would wait for them, from its newest "
            f"weights: sync.sync_interval must be 1 and sync.lookahead 0, for else they are sampled before; found "
            f"{sync.sync_interval!r} and {sync.lookahead}: set them so, or streaming = false"
        )
    if c.inference.placement == "colocated":
        broken.append(
            "sync.streaming needs engines that sample while the trainer trains, and with inference.placement = 'colocated' "
            "they sleep then; found both: set streaming = false, or placement = 'disaggregated'"
        )
    spare = [source.spare_prompts for source in c.data.sources]
    if any(spare):
        broken.append(
            f"sync.streaming trains on a group before all others are known, and data.spare_prompts chooses among all; found "
            f"{spare}: set spare_prompts = 0, or streaming = false"
        )
    if t.overlap_gradients:
        broken.append(
            "sync.streaming adds up gradients before data-parallel ranks sum them, and trainer.overlap_gradients sums them "
            "while they are computed; found both true: set one to false"
        )
    if t.fp8 != "none":  # besides, Transformer Engine's fused accumulation then overwrites with each part's first microbatch
        broken.append(
            f"sync.streaming has been shown to give the same step without trainer.fp8 only, whose scales a loss that is "
            f"divided later may change; found {t.fp8!r}: set fp8 = 'none', or streaming = false"
        )
    return broken


def broken_lookahead_rules(c: Options, *, never_syncs: bool) -> list[str]:
    """Sentences for what needs weight syncs, and for what is sampled ahead of them or goes on over them and cannot."""
    broken = list[str]()
    if never_syncs and c.sync.reference == "follow":
        broken.append(
            "sync.reference = 'follow' copies the policy at weight syncs, and sync.sync_interval = 'never' has none; found "
            "both: set sync.reference to 'never' or a number of steps"
        )
    if c.sync.lookahead and never_syncs:
        broken.append(
            f"sync.lookahead needs weight syncs to look ahead of; found {c.sync.lookahead} in a run without any "
            f"(sync.sync_interval = {c.sync.sync_interval!r}), whose answers all come from the seed model: set lookahead = 0"
        )
    if c.sync.in_flight and c.sync.lookahead < LEAST_LOOKAHEAD_IN_FLIGHT:
        broken.append(
            f"sync.in_flight pauses what intervals after the next one have begun, so it needs sync.lookahead >= "
            f"{LEAST_LOOKAHEAD_IN_FLIGHT}; found {c.sync.lookahead}: set lookahead = {LEAST_LOOKAHEAD_IN_FLIGHT}, or "
            f"in_flight = false"
        )
    if c.sync.in_flight and any(isinstance(stop, str) for stop in c.sampling.stop):
        broken.append(
            f"sync.in_flight cannot see a text of sampling.stop that begins before a pause and ends after it; found "
            f"{c.sampling.stop!r}: name the token ids that end an answer, or set in_flight = false"
        )
    if c.sync.lookahead and c.inference.placement == "colocated":
        broken.append(
            f"sync.lookahead needs engines that sample while the trainer trains, and with inference.placement = 'colocated' "
            f"they sleep then; found {c.sync.lookahead} with it: set lookahead = 0, or placement = 'disaggregated'"
        )
    return broken


def broken_reference_rules(c: Options) -> list[str]:
    """Sentences for a reference that is to be mixed and cannot be."""
    mix, broken = c.sync.reference_mix, list[str]()
    if mix == 1:
        return broken
    if c.sync.reference == "never":
        broken.append(
            f"sync.reference_mix is of the policy in a reference that takes its weights, and sync.reference = 'never' takes "
            f"none; found {mix}: set sync.reference to 1, 'follow' or a number of steps, or remove reference_mix"
        )
    if c.model.dtype == "bfloat16" and mix < LEAST_MIX_OF_BFLOAT16:
        broken.append(
            f"sync.reference_mix must be at least {LEAST_MIX_OF_BFLOAT16} with model.dtype = 'bfloat16', in which a smaller "
            f"part of a policy that has moved little is rounded away; found {mix}: raise it, and mix less "
            f"often (sync.reference)"
        )
    if c.trainer.fp8_parameters:
        broken.append(
            f"sync.reference_mix below 1 needs trainer.fp8_parameters = false, for weights in FP8 are copied, not added; found "
            f"{mix} and true: set one of both"
        )
    return broken


def broken_reference_source_rules(c: Options, schedule: Schedule) -> list[str]:
    """Sentences for reference log-probs that the rollouts do not have."""
    needed, broken = "sync.reference_log_probs = 'rollouts' needs", list[str]()
    if c.sync.reference_log_probs == "computed":
        return broken
    if c.sync.reference_mix < 1:
        broken.append(
            f"{needed} a reference that copies the policy; found sync.reference_mix = {c.sync.reference_mix}: set it to 1, or "
            f"reference_log_probs to 'computed'"
        )
    if c.data.replay is not None:
        broken.append(
            f"{needed} rollouts that this run's reference sampled; found data.replay = {c.data.replay!r}: set it to 'computed'"
        )
    apart = next((t for t in range(c.run.steps) if schedule.reference_version(t) != schedule.version(t)), None)
    if apart is not None:
        broken.append(
            f"{needed} the reference to be what samples, at every step; found sync.reference = {c.sync.reference!r}: at step "
            f"{apart} it is version {schedule.reference_version(apart)}, and version {schedule.version(apart)} samples: set it "
            f"to 'follow', or reference_log_probs to 'computed'"
        )
    return broken
