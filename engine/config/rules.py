"""What options may not be combined, across the tables of a configuration: each broken rule is a sentence with keys, rule,
values found and fix. Those of [sync] stand in sync_rules.py, those of [trainer] and [optimizer] in trainer_rules.py; a table's
own bounds in engine/config/options.py.
"""

from __future__ import annotations

from engine.config.learning_rates.registry import broken_learning_rate_rules
from engine.config.options import LEAST_TEMPERATURE, LOSSES, Options, source_key
from engine.config.placement import colocation
from engine.config.rewards import broken_reward_rules
from engine.config.schedules.registry import schedule_of
from engine.config.sync_rules import (
    broken_lookahead_rules,
    broken_pilot_rules,
    broken_reference_rules,
    broken_reference_source_rules,
    broken_streaming_rules,
)
from engine.config.trainer_rules import (
    broken_head_rules,
    broken_layout_rules,
    broken_library_rules,
    broken_optimizer_rules,
)
from engine.config.transport import refusal
from engine.config.unused import broken_unused_rules
from engine.config.vllm_arguments import broken_vllm_rules
from engine.core.errors import ConfigError
from engine.core.places import CONTROL, UNEXPANDED
from engine.core.registry import called


def broken_rules(config: Options) -> list[str]:
    """Sentences for combinations that cannot work: keys, rule, values found, fix."""
    c = config
    never_syncs, broken = False, list[str]()
    try:
        schedule = schedule_of(c)
        broken += broken_reference_source_rules(c, schedule) + broken_pilot_rules(c) + broken_streaming_rules(c, schedule)
        never_syncs = schedule.never_syncs
        broken += schedule.broken_rules(c.checkpoint.every)
    except ConfigError as error:
        broken.append(str(error))
    broken += broken_best_rules(c) + broken_layout_rules(c)
    broken += broken_name_rules(c) + broken_reference_rules(c)
    broken += broken_placement_rules(c) + broken_shrinking_rules(c) + broken_vllm_rules(c)
    broken += broken_data_rules(c) + broken_library_rules(c) + broken_optimizer_rules(c) + broken_head_rules(c)
    broken += broken_quantization_rules(c) + broken_unused_rules(c)
    broken += broken_reward_rules(c) + broken_learning_rate_rules(c.optimizer)
    return broken + broken_lookahead_rules(c, never_syncs=never_syncs) + broken_profile_rules(c)


def broken_best_rules(c: Options) -> list[str]:
    """Sentences for a best checkpoint that is chosen among some that nobody judges."""
    every, broken = c.checkpoint.every, list[str]()
    judged = any(source.held_out for source in c.data.sources)
    spans = every != "end" and c.evaluation.every != "ends" and every % c.evaluation.every == 0
    if c.checkpoint.best_by is not None and not (judged and spans):
        broken.append(
            f"checkpoint.best_by needs data.held_out, and checkpoint.every a multiple of evaluation.every, so that every "
            f"checkpoint is judged; found data.held_out = {c.data.held_out!r}, {every} and {c.evaluation.every}: set all "
            f"three, or remove best_by"
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
