"""What options may not be combined, across the tables of a configuration: each broken rule is a sentence with keys, rule,
values found and fix. A table's own bounds stand in engine/config/options.py.
"""

from __future__ import annotations

from engine.config.learning_rates.registry import broken_learning_rate_rules
from engine.config.options import LEAST_TEMPERATURE, LOSSES, Options, source_key
from engine.config.placement import colocation
from engine.config.rewards import broken_reward_rules
from engine.config.schedules.base import Schedule
from engine.config.schedules.registry import schedule_of
from engine.config.transport import refusal
from engine.config.unused import broken_unused_rules
from engine.config.vllm_arguments import broken_vllm_rules
from engine.core.errors import ConfigError
from engine.core.places import CONTROL, UNEXPANDED
from engine.core.registry import called


def broken_rules(config: Options) -> list[str]:
    """Sentences for combinations that cannot work: keys, rule, values found, fix."""
    c = config
    every = c.checkpoint.every
    never_syncs, broken = False, list[str]()
    try:
        schedule = schedule_of(c)
        broken += broken_reference_source_rules(c, schedule) + broken_pilot_rules(c) + broken_streaming_rules(c, schedule)
        never_syncs = schedule.never_syncs
        broken += schedule.broken_rules(every)
    except ConfigError as error:
        broken.append(str(error))
    judged = any(source.held_out for source in c.data.sources)
    spans = every != "end" and c.evaluation.every != "ends" and every % c.evaluation.every == 0
    if c.checkpoint.best_by is not None and not (judged and spans):
        broken.append(
            f"checkpoint.best_by needs data.held_out, and checkpoint.every a multiple of evaluation.every, so that every "
            f"checkpoint is judged; found data.held_out = {c.data.held_out!r}, {every} and {c.evaluation.every}: set all "
            f"three, or remove best_by"
        )
    if c.trainer.sequence_parallel and c.trainer.tensor_parallel == 1:
        broken.append("trainer.sequence_parallel needs trainer.tensor_parallel > 1; found 1: set it to false")
    if c.trainer.virtual_pipeline > 1 and c.trainer.pipeline_parallel == 1:
        broken.append(
            f"trainer.virtual_pipeline needs trainer.pipeline_parallel > 1; found {c.trainer.virtual_pipeline} "
            f"with 1 stage: set it to 1"
        )
    if c.trainer.share_prompts is True and c.trainer.uses_te:
        broken.append(
            f"trainer.share_prompts needs trainer.layers = 'local', for Transformer Engine's attention cannot go on from a "
            f"segment that others share; found true with {c.trainer.layers!r}: set it to 'auto' or false, or use local layers"
        )
    ends = (c.trainer.first_stage_layers, c.trainer.last_stage_layers)
    if ends != (None, None) and c.trainer.pipeline_parallel == 1:
        broken.append(
            f"trainer.first_stage_layers and trainer.last_stage_layers need trainer.pipeline_parallel > 1; found {ends[0]} "
            f"and {ends[1]} with 1 stage: remove them"
        )
    broken += broken_name_rules(c) + broken_reference_rules(c)
    broken += broken_placement_rules(c) + broken_shrinking_rules(c) + broken_vllm_rules(c)
    broken += broken_data_rules(c) + broken_library_rules(c) + broken_head_rules(c)
    broken += broken_quantization_rules(c) + broken_unused_rules(c)
    broken += broken_reward_rules(c) + broken_learning_rate_rules(c.optimizer)
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
    return broken + broken_profile_rules(c)


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


LEAST_LOOKAHEAD_IN_FLIGHT = 2  # intervals: the next one must be complete before a sync, so only a further one can be paused
LEAST_MIX_OF_BFLOAT16 = 0.5  # 8 bits do not hold the sum of a weight and less than half of its last bit


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


def broken_name_rules(c: Options) -> list[str]:
    """Sentences for names of files that nobody has chosen, and for folders to make that would not be where they seem."""
    made = {"run.directory": c.run.directory, "sft.checkpoint_out": c.sft.checkpoint_out}
    named = made | {"model.path": c.model.path, "reward_model.path": c.reward_model.path, **c.data.files}
    broken = [
        f"{option} must be a path without control characters; found {name!r}: mend it"
        for option, name in named.items()
        if name is not None and CONTROL.search(name)
    ]
    broken += [
        f"{option} must be a folder on a disk; found {name!r}, an address: name a folder, and copy it there afterwards"
        for option, name in made.items()
        if name is not None and "://" in name
    ]
    broken += [
        f"{option} must be a path; found {name!r}, in which ~ and variables stay as they are: write the whole path"
        for option, name in made.items()
        if name is not None and UNEXPANDED.match(name)
    ]
    return broken


def broken_profile_rules(c: Options) -> list[str]:
    """Sentences for a [profile] that this run cannot be profiled by."""
    p = c.profile
    broken: list[str] = []
    if p.tool == "off":
        return broken
    if p.tool == "nsys" and c.cluster.nodes > 1:
        broken.append(
            f"profile.tool = 'nsys' needs cluster.nodes = 1, for only this machine's reports are waited for; found "
            f"{c.cluster.nodes}: set it to 'torch', or profile on one node"
        )
    if p.first_step + p.num_steps > c.run.steps:
        broken.append(
            f"profile.first_step + profile.num_steps must not exceed run.steps; found {p.first_step} + {p.num_steps} > "
            f"{c.run.steps}: lower them, or raise run.steps"
        )
    if any(rank >= c.trainer.world_size for rank in p.ranks):
        broken.append(
            f"profile.ranks must be of the {c.trainer.world_size} trainer ranks, counted from 0 (trainer.tensor_parallel x "
            f"pipeline_parallel x data_parallel); found {list(p.ranks)}: leave out what is beyond"
        )
    if any(engine >= c.inference.engines for engine in p.engines):
        broken.append(
            f"profile.engines must be of the inference.engines, counted from 0; found {list(p.engines)} and "
            f"{c.inference.engines}: leave out what is beyond"
        )
    return broken


def broken_placement_rules(c: Options) -> list[str]:
    """Sentences for trainer and engines that do not fit the nodes, or a transport that fits neither CPUs nor GPUs."""
    broken = []
    try:
        refused = refusal(c)
    except ConfigError as error:
        refused = str(error)
    if refused is not None:
        broken.append(refused)
    try:
        colocation(c)
    except ConfigError as error:
        broken.append(str(error))
    return broken


def broken_shrinking_rules(c: Options) -> list[str]:
    """Sentences for a run that is to go on with fewer nodes and could not, whatever is left of them."""
    if c.run.on_lost_node == "wait":
        return []
    needed = (
        (c.cluster.nodes > 1, "cluster.nodes > 1, for a run on one node has none to lose", c.cluster.nodes),
        (
            c.checkpoint.other_layout == "allow",
            "checkpoint.other_layout = 'allow', for it goes on in another layout, which is not bit for bit",
            c.checkpoint.other_layout,
        ),
        (c.trainer.fp8 != "delayed", "trainer.fp8 other than 'delayed', whose scales are of a whole shard", c.trainer.fp8),
        (
            c.optimizer.moment_dtype != "fp8",
            "optimizer.moment_dtype other than 'fp8', whose scales are of a whole shard",
            c.optimizer.moment_dtype,
        ),
    )
    return [
        f"run.on_lost_node = 'shrink' needs {what}; found {found!r}: change it, or set on_lost_node = 'wait'"
        for holds, what, found in needed
        if not holds
    ]


def broken_data_rules(c: Options) -> list[str]:
    """Sentences for sources of prompts that cannot be combined."""
    d, broken = c.data, []
    for place, source in enumerate(d.sources):
        if source.template not in ("figure4", "figure5") and "{problem}" not in source.template:
            broken.append(
                f"{source_key(place)}.template must be 'figure4', 'figure5' or hold {{problem}}; found {source.template!r}: "
                f"add {{problem}}"
            )
    if d.replay is not None and c.sync.sync_interval != "never":
        broken.append(
            f"data.replay needs sync.sync_interval = 'never', for what is on disk knows no newer weights; found "
            f"{c.sync.sync_interval} with {d.replay!r}: set it to 'never'"
        )
    if c.sft.checkpoint_out is not None and (d.mix or d.replay is not None):
        broken.append(
            f"sft.checkpoint_out trains on data.train alone; found {len(d.mix)} further sources and data.replay = "
            f"{d.replay!r}: remove them"
        )
    return broken


def broken_library_rules(c: Options) -> list[str]:
    """Sentences for what Transformer Engine's layers, FP8, overlap and the optimizers need of each other."""
    t, o, broken = c.trainer, c.optimizer, []
    if t.uses_te and c.model.dtype != "bfloat16":
        broken.append(
            f"trainer.layers = 'transformer_engine' needs model.dtype = 'bfloat16', which its fused attention computes in; "
            f"found {c.model.dtype!r}: set model.dtype = 'bfloat16'"
        )
    if t.fp8 != "none" and not c.may_use_te:
        broken.append(
            f"trainer.fp8 needs trainer.layers = 'transformer_engine'; found {t.fp8!r} with {t.layers!r}: set trainer.layers, "
            f"or fp8 = 'none'"
        )
    if t.fp8_parameters and (t.fp8 not in ("current", "blockwise") or not t.distributed_optimizer or o.offload_share):
        broken.append(
            f"trainer.fp8_parameters needs trainer.fp8 = 'current' or 'blockwise', trainer.distributed_optimizer and "
            f"optimizer.offload_share = 0; found {t.fp8!r}, {t.distributed_optimizer} and {o.offload_share}: set all three, or "
            f"fp8_parameters = false"
        )
    if t.overlap_tensor_parallel and (not c.may_use_te or not t.sequence_parallel):
        broken.append(
            f"trainer.overlap_tensor_parallel needs trainer.layers = 'transformer_engine' and trainer.sequence_parallel; found "
            f"{t.layers!r} and {t.sequence_parallel}: set both, or overlap_tensor_parallel = false"
        )
    if t.gradient_dtype == "bfloat16" and (c.model.dtype != "bfloat16" or t.fp8_parameters or o.moment_dtype != "float32"):
        broken.append(
            f"trainer.gradient_dtype = 'bfloat16' needs model.dtype = 'bfloat16', trainer.fp8_parameters = false and "
            f"optimizer.moment_dtype = 'float32'; found {c.model.dtype!r}, {t.fp8_parameters} and {o.moment_dtype!r}: set all "
            f"three, or gradient_dtype = 'float32'"
        )
    if t.gradient_dtype == "bfloat16" and o.offload_share:
        broken.append(
            f"trainer.gradient_dtype = 'bfloat16' needs optimizer.offload_share = 0, for the host's AdamW reads gradients in "
            f"float32; found {o.offload_share}: set one of them otherwise"
        )
    if t.overlap_gradients and (t.data_parallel == 1 or t.virtual_pipeline > 1):
        broken.append(
            f"trainer.overlap_gradients needs trainer.data_parallel > 1, whose ranks sum gradients, and "
            f"trainer.virtual_pipeline = 1; found {t.data_parallel} and {t.virtual_pipeline}: set overlap_gradients = false"
        )
    if t.reference_memory == "host" and t.fp8_parameters:
        broken.append(
            "trainer.reference_memory = 'host' needs trainer.fp8_parameters = false, whose copies have a form of their own; "
            "found true: set one of them otherwise"
        )
    if t.reference_memory == "host" and c.sync.reference == "never" == c.sync.sync_interval:
        broken.append(
            "trainer.reference_memory = 'host' needs sync.sync_interval or sync.reference other than 'never': an offline run "
            "may send its reference to the engines as the seed model; found both 'never': set reference_memory = 'device'"
        )
    if t.overlap_tensor_parallel and t.fp8 == "blockwise":
        broken.append(
            "trainer.overlap_tensor_parallel has no buffers for trainer.fp8 = 'blockwise'; found both: set trainer.fp8 = "
            "'current' or 'delayed'"
        )
    if t.overlap_tensor_parallel and t.microbatch_tokens % t.row_block:
        broken.append(
            f"trainer.microbatch_tokens must be a multiple of {t.row_block}, since trainer.overlap_tensor_parallel makes every "
            f"row as long; found {t.microbatch_tokens}: use {-(-t.microbatch_tokens // t.row_block) * t.row_block}"
        )
    te = o.implementation == "te" and t.distributed_optimizer and c.model.dtype == "bfloat16"
    if o.moment_dtype != "float32" and not te:
        broken.append(
            f"optimizer.moment_dtype needs optimizer.implementation = 'te', trainer.distributed_optimizer and model.dtype = "
            f"'bfloat16'; found {o.moment_dtype!r} with {o.implementation!r}, {t.distributed_optimizer} and {c.model.dtype!r}: "
            f"set all three, or moment_dtype = 'float32'"
        )
    if o.offload_share and not (t.distributed_optimizer and c.model.dtype == "bfloat16"):
        broken.append(
            f"optimizer.offload_share needs trainer.distributed_optimizer and model.dtype = 'bfloat16', megatron-core cuts no "
            f"other weights; found {o.offload_share} with {t.distributed_optimizer} and {c.model.dtype!r}: set both, or "
            f"offload_share = 0"
        )
    if o.memory_while_sampling == "host" and c.inference.placement != "colocated":
        broken.append(
            f"optimizer.memory_while_sampling = 'host' makes room for engines on the trainer's devices, so it needs "
            f"inference.placement = 'colocated'; found {c.inference.placement!r}: set memory_while_sampling = 'device'"
        )
    if o.memory_while_sampling == "host" and o.offload_share:
        broken.append(
            f"optimizer.memory_while_sampling = 'host' needs optimizer.offload_share = 0, whose state is on the host at any "
            f"time; found {o.offload_share}: set one of them otherwise"
        )
    if o.offload_share and o.moment_dtype != "float32":
        broken.append(
            f"optimizer.offload_share needs optimizer.moment_dtype = 'float32', the host's AdamW knows no other; found "
            f"{o.offload_share} with {o.moment_dtype!r}: set moment_dtype to 'float32'"
        )
    return broken


def broken_head_rules(c: Options) -> list[str]:
    """Sentences for an output layer in float32 that trainer or engines cannot have."""
    if c.model.head == "model" or c.model.dtype == "float32":
        return []
    broken = []
    if not c.trainer.fused_lm_head:
        broken.append(
            "model.head = 'float32' needs trainer.fused_lm_head, which makes float32 logits a few rows at a time; found false: "
            "set trainer.fused_lm_head = true"
        )
    if c.inference.packed_weights:
        broken.append(
            "model.head = 'float32' needs inference.packed_weights = false, for vLLM widens the output layer's plain weight; "
            "found true: set it to false"
        )
    return broken


def broken_quantization_rules(c: Options) -> list[str]:
    """Sentences for what FP8 weights in engines cannot be combined with."""
    if c.inference.quantization == "none":
        return []
    wrong = (
        (c.model.dtype != "bfloat16", "model.dtype = 'bfloat16', which FP8 products give", repr(c.model.dtype)),
        (c.inference.packed_weights, "inference.packed_weights = false, for a sync quantizes into place", "true"),
        (
            c.sync.reference_log_probs == "rollouts",
            "sync.reference_log_probs = 'computed', for engines' log-probs are those of rounded weights",
            "'rollouts'",
        ),
    )
    asked = f"inference.quantization = {c.inference.quantization!r}"
    return [
        f"{asked} needs {rule}; found {found}: set it so, or quantization to 'none'" for broken, rule, found in wrong if broken
    ]


def broken_algorithm_rules(c: Options) -> list[str]:
    """Sentences for what the loss cannot be combined with, as its own file says."""
    name = c.algorithm.loss
    loss = LOSSES.load(name)
    if ":" not in name:
        broken: list[str] = loss.broken_rules(c)
        return broken
    loss.require_parts(name)
    found = called(name, "algorithm.loss", loss.broken_rules, c, error=ConfigError)
    if not isinstance(found, (list, tuple)) or not all(isinstance(sentence, str) for sentence in found):
        raise ConfigError(
            f"algorithm.loss = {name!r} must return a list of sentences from broken_rules; found {found!r}: mend it"
        )
    return list(found)


def broken_sampling_rules(c: Options) -> list[str]:
    """Sentences for sampling that a loss cannot learn from, or whose distribution its log-probs are not of."""
    s, broken = c.sampling, []
    if s.temperature == 0 and c.data.replay is None:
        broken.append(
            f"sampling.temperature must be above 0 in training, for at 0 all algorithm.samples_per_prompt = "
            f"{c.algorithm.samples_per_prompt} rollouts of a prompt are one and say nothing; found 0: set it to 1"
        )
    elif 0 < s.temperature < LEAST_TEMPERATURE or (s.temperature == 0 and c.algorithm.uses_ratios):
        broken.append(
            f"sampling.temperature must be at least {LEAST_TEMPERATURE}, the lowest that vLLM samples at; found "
            f"{s.temperature}: raise it"
        )
    masks = (("top_p", s.top_p, 1), ("top_k", s.top_k, 0), ("min_p", s.min_p, 0))
    for name, found, whole in masks if c.algorithm.uses_ratios else ():
        if found != whole:
            broken.append(
                f"sampling.{name} must be {whole} with algorithm.loss = {c.algorithm.loss!r}, whose ratios are exact only "
                f"where every token can be sampled; found {found}: set it to {whole}, or lower sampling.temperature instead"
            )
    return broken


def broken_rollout_rules(c: Options) -> list[str]:
    """Sentences for what only a run with rollouts needs; supervised training has no samples and no pairs."""
    broken = broken_sampling_rules(c)
    if c.sampling.overlong_buffer > c.sampling.max_tokens:
        broken.append(
            f"sampling.overlong_buffer is of the last tokens before sampling.max_tokens and must not exceed it; found "
            f"{c.sampling.overlong_buffer} and {c.sampling.max_tokens}: lower it"
        )
    if c.sampling.overlong_penalty != 1.0 and not c.sampling.overlong_buffer:
        broken.append(
            f"sampling.overlong_penalty needs sampling.overlong_buffer, the tokens over which it grows; found "
            f"{c.sampling.overlong_penalty} and 0: set overlong_buffer, or remove it"
        )
    longest = c.data.max_prompt_tokens + c.sampling.max_tokens
    if longest > c.inference.max_model_tokens:
        broken.append(
            f"data.max_prompt_tokens + sampling.max_tokens must fit inference.max_model_tokens; found "
            f"{c.data.max_prompt_tokens} + {c.sampling.max_tokens} > {c.inference.max_model_tokens}: raise it to {longest}"
        )
    room = c.trainer.microbatch_tokens // c.trainer.row_block * c.trainer.row_block
    if longest > room:
        broken.append(
            f"trainer.microbatch_tokens must hold one sequence at full length; found {room} < {longest}: raise it, or lower "
            f"sampling.max_tokens"
        )
    judged = sorted({name for source in c.data.sources for name in source.rewards})
    if ("model" in judged) != (c.reward_model.path is not None):
        broken.append(
            f"reward_model.path and a source with reward = 'model' need each other; found {c.reward_model.path!r} and sources "
            f"with {', '.join(map(repr, judged))}: name the reward model's folder, or set data.reward = 'model', or remove both"
        )
    return broken
