"""Configuration: a user's mistake is one sentence with key, rule, value and fix; what is loaded can be dumped and
loaded again; and the list of options is a reviewed file, so that none appears unnoticed.

`python tests/unit/config/test_config.py` writes that file anew.
"""

import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.algorithms.base import Algorithm
from engine.config.load import RunConfig, dump_config, load_config, override, read_config
from engine.config.options import LOSSES
from engine.config.rewards import broken_reward_rules, broken_source_rules
from engine.config.rules import (
    broken_best_rules,
    broken_data_rules,
    broken_placement_rules,
    broken_profile_rules,
    broken_rollout_rules,
    broken_rules,
    broken_sampling_rules,
)
from engine.config.sync_rules import broken_lookahead_rules, broken_reference_rules
from engine.config.trainer_rules import broken_head_rules, broken_layout_rules, broken_library_rules, broken_optimizer_rules
from engine.config.unused import broken_unused_rules
from engine.core.errors import ConfigError
from tests.builders import config

OWN_LOSS = Path(__file__).resolve().parents[2] / "own_loss.py"
OPTIONS_FILE = Path(__file__).with_name("options.txt")
MAX_OPTIONS = 166

REQUIRED = """
[run]
directory = "runs/a"
steps = 20
[model]
path = "seed"
[data]
train = "train.jsonl"
[trainer]
microbatch_tokens = 8192
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(REQUIRED, encoding="utf-8")
    return path


def complaint(path, *overrides):
    """The first sentence that loading ends with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    sentence = str(caught.value.faults[0])
    assert "\n" not in sentence
    assert caught.value.exit_code == 2
    return sentence


def options() -> list[str]:
    """Every option with its default, one line each, in the order of the tree."""
    lines = []
    for name, section in RunConfig.model_fields.items():
        assert section.annotation is not None
        for key, field in section.annotation.model_fields.items():
            default = "required" if field.is_required() else f"default {field.default!r}"
            lines.append(f"{name}.{key}: {default}")
        if name == "algorithm":
            lines += options_of_losses(section.annotation.model_fields.keys())
    return lines


def options_of_losses(common) -> list[str]:
    """What single losses add to the table: each option once, with its default, which is the same in all that have it."""
    found: dict[str, list[str]] = {}
    for loss in LOSSES.names:
        for key, field in LOSSES.load(loss).Options.model_fields.items():
            if key not in common:
                found.setdefault(f"algorithm.{key}: default {field.default!r}", []).append(loss)
    return [f"{line} ({', '.join(losses)})" for line, losses in found.items()]


def test_further_sources_are_tables_that_survive_a_dump(path):
    more = REQUIRED + '[[data.mix]]\ntrain = "chat.jsonl"\nreward = "math"\ntemplate = "{problem}"\nprompts_per_step = 8\n'
    path.write_text(more, encoding="utf-8")
    config = load_config(path)
    assert [source.train for source in config.data.sources] == ["train.jsonl", "chat.jsonl"]
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    path.write_text(more.replace("prompts_per_step = 8", "prompts_per_step = 0"), encoding="utf-8")
    assert "data.mix" in complaint(path)


def test_the_options_are_the_reviewed_ones():
    reviewed = OPTIONS_FILE.read_text("utf-8").splitlines()
    assert options() == reviewed, "if meant so, run `python tests/unit/config/test_config.py` and have the difference reviewed"
    assert len(reviewed) <= MAX_OPTIONS


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sync.sync_intervall=1", ("sync.sync_intervall is not an option", "found 1", "did you mean sync.sync_interval?")),
        ("synch.sync_interval=1", ("synch is not an option", "found {'sync_interval': 1}", "did you mean sync?")),
        ("trainer.sync_interval=1", ("trainer.sync_interval is not an option", "did you mean sync.sync_interval?")),
        ("sync.colour=1", ("sync.colour is not an option", "the options there are auto_bound, ")),
        ("trainer.sequence_parallel=True", ("trainer.sequence_parallel: ", "boolean", "found 'True': write true")),
        ("trainer.sequence_parallel=no", ("found 'no': write false",)),
        ("sync.sync_interval=Never", ("found 'Never': write 'never'",)),
        ("trainer.layers=transformer-engine", ("found 'transformer-engine': write 'transformer_engine'",)),
        ("run.directory=2024", ("run.directory: ", "string", "write it in quotes, on a command line '\"2024\"'")),
        ("run=", ("'run='", "section.key=value")),
        ("model.path=", ("model.path is required and missing",)),
        ("sync.sync_interval=0", ("sync.sync_interval: ", "greater than 0", "'never'", "found 0", "1 online")),
        ("sync.sync_interval=1.5", ("sync.sync_interval: ", "integer", "'never'", "found 1.5")),
        ("run.steps=true", ("run.steps: ", "integer", "found True", "optimizer steps")),
        ("run.seed=-1", ("run.seed: ", "greater than or equal to 0", "found -1")),
        ("trainer.sequence_parallel=1", ("trainer.sequence_parallel: ", "boolean", "found 1")),
        (
            "algorithm.loss=ppo",
            ("algorithm.loss must be one of cispo, dpo, group_dpo, grpo, oapl, or", "found 'ppo'", "choose one"),
        ),
        ("algorithm.samples_per_prompt=1", ("algorithm.samples_per_prompt: ", "equal to 2", "found 1")),
        ("optimizer.learning_rate=inf", ("optimizer.learning_rate: ", "finite", "found inf")),
        ("optimizer.learning_rate=fast", ("optimizer.learning_rate: ", "number", "found 'fast'")),
        ("evaluation.top_p=1.5", ("evaluation.top_p: ", "less than or equal to 1", "found 1.5")),
        ("evaluation.max_problems=0", ("evaluation.max_problems: ", "greater than 0", "found 0")),
        ("model.path=3", ("model.path: ", "string", "found 3", "in quotes")),
        ("run.steps", ("'run.steps'", "section.key=value")),
        ("data.mix=3", ("data.mix: ", "tuple", "found 3", "further sources")),
        ("data.mix=[3]", ("data.mix[0]: ", "found 3", "further sources")),
        (
            'data.mix=[{train = "b", tempalte = "x"}]',
            ("data.mix[0].tempalte is not an option", "'x'", "did you mean data.mix[0].template?"),
        ),
        ('data.mix=[{train = "b"}, {reward = "math"}]', ("data.mix[1].train is required and missing: set it in the file",)),
        ('data.mix=[{train = "b", reward = "maths"}]', ("data.mix[0].reward must be one of", "'maths'", "your own as")),
        ('data.mix=[{train = "b"}, {train = 3}]', ("data.mix[1].train: ", "string", "found 3", "write it in quotes")),
        (
            'data.mix=[{train = "b", prompts_per_step = 0}]',
            ("data.mix[0].prompts_per_step: ", "found 0", "samples_per_prompt"),
        ),
        ("model=3", ("'model=3'", "section.key=value")),
        ("run.steps.more=3", ("'run.steps.more=3'", "run.steps is not a section", "section.key=value")),
        ("data.mix[0].train=a", ("'data.mix[0].train=a'", "one of the list's", "0 tables in data.mix")),
        ("run[0].steps=1", ("'run[0].steps=1'", "found no list in run")),
        ("data.mix[x].train=a", ("'data.mix[x].train=a'", "section.key=value")),
    ],
)
def test_a_wrong_option_is_one_sentence_with_key_rule_and_value(path, override, parts):
    sentence = complaint(path, override)
    for part in parts:
        assert part in sentence


HELD_OUT = ["data.held_out=a.jsonl"]
BEST_BY = ("checkpoint.best_by", "evaluation.every")
# overrides that break one rule; then the two options or the option it names, the value found, the fix
TRANSFORMER_ENGINE = ["trainer.layers=transformer_engine", "model.dtype=bfloat16"]
SEQUENCE_PARALLEL = ["trainer.sequence_parallel=true", "trainer.tensor_parallel=2"]
OVERLAP = [*TRANSFORMER_ENGINE, *SEQUENCE_PARALLEL, "trainer.overlap_tensor_parallel=true"]
SMALL_MOMENTS = [
    *("optimizer.implementation=te", "optimizer.moment_dtype=bfloat16"),
    *("trainer.distributed_optimizer=true", "model.dtype=bfloat16"),
]
FP8_PARAMETERS = [
    *(*TRANSFORMER_ENGINE, "trainer.fp8=blockwise"),
    *("trainer.distributed_optimizer=true", "trainer.fp8_parameters=true"),
]
COMBINATIONS = [
    (["sync.transport=ipc", "cluster.nodes=2"], "sync.transport", "disaggregated", "found cluster.nodes = 2", "use 'auto'"),
    (["sync.sync_interval=4", "checkpoint.every=10"], "checkpoint.every", "sync.sync_interval", "10 and 4", "use 8"),
    (["sync.sync_interval=4", "checkpoint.every=3"], "checkpoint.every", "sync.sync_interval", "3 and 4", "use 4"),
    (["checkpoint.best_by=reward", "checkpoint.every=4", "evaluation.every=2"], *BEST_BY, "None, 4 and 2", "set all"),
    (["checkpoint.best_by=reward", *HELD_OUT, "evaluation.every=2"], *BEST_BY, "end and 2", "remove best_by"),
    (["checkpoint.best_by=reward", *HELD_OUT, "checkpoint.every=4"], *BEST_BY, "4 and ends", "remove best_by"),
    (
        ["checkpoint.best_by=reward", *HELD_OUT, "checkpoint.every=4", "evaluation.every=3"],
        *(*BEST_BY, "'a.jsonl', 4 and 3", "remove best_by"),
    ),
    (["trainer.sequence_parallel=true"], "trainer.sequence_parallel", "trainer.tensor_parallel", "found 1", "false"),
    (
        ["trainer.share_prompts=true", "trainer.layers=transformer_engine", "model.dtype=bfloat16"],
        *("trainer.share_prompts", "trainer.layers = 'local'", "true with 'transformer_engine'", "'auto' or false"),
    ),
    (
        ["sync.reference_log_probs=rollouts", "sync.reference=follow", "sync.sync_interval=2", "data.replay=a.jsonl"],
        *("sync.reference_log_probs", "this run's reference", "data.replay = 'a.jsonl'", "'computed'"),
    ),
    (
        ["sync.reference_log_probs=rollouts", "sync.sync_interval=2"],
        *("sync.reference_log_probs", "sync.reference = 'never'", "step 2 it is version 0, and version 2", "'follow'"),
    ),
    (["trainer.virtual_pipeline=2"], "trainer.virtual_pipeline", "trainer.pipeline_parallel", "found 2", "set it to 1"),
    (["trainer.last_stage_layers=2"], "trainer.first_stage_layers", "trainer.pipeline_parallel", "None and 2", "remove"),
    (
        ["sync.sync_interval=never", "sync.lookahead=1"],
        "sync.lookahead",
        "sync.sync_interval = 'never'",
        "found 1",
        "lookahead = 0",
    ),
    (["sync.in_flight=true", "sync.lookahead=1"], "sync.in_flight", "sync.lookahead >= 2", "found 1", "set lookahead = 2"),
    (
        ["sync.in_flight=true", "sync.lookahead=2", 'sampling.stop=["END", 7]'],
        *("sync.in_flight", "sampling.stop", "'END'", "name the token ids"),
    ),
    (
        ["sync.in_flight=true", "sync.lookahead=2", "sync.sync_interval=never"],
        *("sync.lookahead", "sync.sync_interval = 'never'", "found 2", "lookahead = 0"),
    ),
    (
        ["sync.in_flight=true", "sync.lookahead=2", "inference.placement=colocated"],
        *("sync.lookahead", "'colocated'", "found 2", "'disaggregated'"),
    ),
    (
        [
            *("sync.in_flight=true", "sync.lookahead=2", "sync.sync_interval=2"),
            *("sync.reference=follow", "sync.reference_log_probs=rollouts"),
        ],
        *("sync.reference_log_probs", "to be what samples", "at step 2 it is version 2, and version 0", "'computed'"),
    ),
    (["sync.lookahead=2", "inference.placement=colocated"], "sync.lookahead", "'colocated'", "found 2", "'disaggregated'"),
    (["sync.sync_interval=never", "sync.reference=follow"], "sync.reference", "sync.sync_interval", "both", "'never'"),
    (["sync.reference_mix=0.5"], "sync.reference_mix", "sync.reference = 'never'", "found 0.5", "set sync.reference to 1"),
    (
        ["sync.reference=1", "sync.reference_mix=0.1", "model.dtype=bfloat16"],
        *("sync.reference_mix", "model.dtype = 'bfloat16'", "found 0.1", "mix less often"),
    ),
    (
        ["sync.reference=1", "sync.reference_mix=0.5", *FP8_PARAMETERS],
        *("sync.reference_mix", "trainer.fp8_parameters = false", "found 0.5 and true", "set one"),
    ),
    (
        ["inference.placement=colocated", "cluster.nodes=2", "trainer.pipeline_parallel=3", "cluster.gpus_per_node=2"],
        *("inference.placement = 'colocated'", "trainer.tensor_parallel * trainer.pipeline_parallel"),
        *("found 2 of them beside engine 0 on node 0", "divides cluster.gpus_per_node = 2, or set placement"),
    ),
    (
        ["inference.placement=colocated", "cluster.nodes=2", "trainer.data_parallel=17"],
        *("cluster.nodes * cluster.gpus_per_node", "2 * 8", "17 trainer ranks", "raise cluster.nodes"),
    ),
    (
        ["inference.placement=colocated", "sync.transport=nccl"],
        *("sync.transport = 'nccl'", "inference.placement", "found inference.placement = 'colocated'", "use 'auto'"),
    ),
    (["data.reward=function"], "data.reward = 'function'", "rewards.function", "found none", "path/to/file.py:name"),
    (["rewards.function=a.py:f"], "rewards.function", "'function'", "'a.py:f' and sources with 'math'", "remove it"),
    (['data.reward=["math", "maths"]'], "data.reward must be one of", "'function', 'math', 'model'", "found 'maths'", "choose"),
    (['data.reward=["a.py:f", "b.py:f"]'], "data.reward", "called differently", "a.py:f, b.py:f", "rename"),
    (['data.reward=["math", "a.py:f"]', "data.reward_weights=[1.0]"], "data.reward_weights", "1 for 2", "1 for 2", "add or"),
    (['data.reward=["math", "a.py:f"]', "data.reward_combine=max"], "data.reward_combine", "'min'", "'max'", "choose one"),
    (
        ['data.reward=["math", "a.py:f"]', "data.reward_weights=[1, 2]", "data.reward_combine=min"],
        *("data.reward_weights", "of a sum", "'min'", "remove one"),
    ),
    (["data.template=Solve it"], "data.template", "'figure4'", "found 'Solve it'", "add {problem}"),
    (['data.mix=[{train = "b", template = "x"}]'], "data.mix[0].template", "{problem}", "found 'x'", "add {problem}"),
    (["data.replay=a.jsonl"], "data.replay", "sync.sync_interval = 'never'", "1 with 'a.jsonl'", "'never'"),
    (
        ["data.replay=a.jsonl", "sync.sync_interval=never", "sft.checkpoint_out=out"],
        *("sft.checkpoint_out", "data.train alone", "0 further sources and data.replay = 'a.jsonl'", "remove them"),
    ),
    (["trainer.layers=transformer_engine"], "trainer.layers", "model.dtype = 'bfloat16'", "'float32'", "model.dtype"),
    (["trainer.fp8=current"], "trainer.fp8", "trainer.layers", "'current' with 'auto'", "fp8 = 'none'"),
    (
        [*TRANSFORMER_ENGINE, "trainer.overlap_tensor_parallel=true"],
        *("trainer.overlap_tensor_parallel", "sequence_parallel", "'transformer_engine' and False", "set both"),
    ),
    (
        [*TRANSFORMER_ENGINE, "trainer.fp8=delayed", "trainer.distributed_optimizer=true", "trainer.fp8_parameters=true"],
        *("trainer.fp8_parameters", "'current' or 'blockwise'", "found 'delayed', True and 0.0", "fp8_parameters = false"),
    ),
    (
        [*TRANSFORMER_ENGINE, "trainer.fp8=current", "trainer.fp8_parameters=true"],
        *("trainer.fp8_parameters", "trainer.distributed_optimizer", "found 'current', False and 0.0", "set all three"),
    ),
    (
        [*FP8_PARAMETERS, "optimizer.offload_share=0.5"],
        *("trainer.fp8_parameters", "optimizer.offload_share = 0", "found 'blockwise', True and 0.5", "set all three"),
    ),
    ([*OVERLAP, "trainer.fp8=blockwise"], "trainer.overlap_tensor_parallel", "'blockwise'", "found both", "'current'"),
    (["trainer.gradient_dtype=bfloat16"], "trainer.gradient_dtype", "model.dtype = 'bfloat16'", "found 'float32'", "set all"),
    (["trainer.overlap_gradients=true"], "trainer.overlap_gradients", "trainer.data_parallel > 1", "found 1", "= false"),
    (
        ["optimizer.memory_while_sampling=host"],
        *("optimizer.memory_while_sampling", "needs inference.placement = 'colocated'", "found 'disaggregated'", "= 'device'"),
    ),
    (
        [
            *SMALL_MOMENTS[2:],
            "optimizer.memory_while_sampling=host",
            "inference.placement=colocated",
            "optimizer.offload_share=0.5",
        ],
        *("optimizer.memory_while_sampling", "optimizer.offload_share = 0", "found 0.5", "set one of them otherwise"),
    ),
    (
        ["trainer.reference_memory=host", "sync.sync_interval=never"],
        *("trainer.reference_memory", "sync.reference other than", "found both 'never'", "= 'device'"),
    ),
    (
        [*OVERLAP, "trainer.fp8=delayed", "trainer.microbatch_tokens=8208"],
        *("trainer.microbatch_tokens", "trainer.overlap_tensor_parallel", "found 8208", "use 8224"),
    ),
    (
        ["optimizer.moment_dtype=fp8", "optimizer.implementation=te", "model.dtype=bfloat16"],
        *("optimizer.moment_dtype", "optimizer.implementation", "'te', False and 'bfloat16'", "moment_dtype = 'float32'"),
    ),
    (
        ["optimizer.offload_share=0.5", "trainer.distributed_optimizer=true"],
        *("optimizer.offload_share", "model.dtype = 'bfloat16'", "0.5 with True and 'float32'", "set both"),
    ),
    (
        [*SMALL_MOMENTS, "optimizer.offload_share=1.0"],
        *("optimizer.offload_share", "optimizer.moment_dtype", "1.0 with 'bfloat16'", "to 'float32'"),
    ),
    (["sampling.max_tokens=4000"], "data.max_prompt_tokens", "inference.max_model_tokens", "1024 + 4000", "5024"),
    (
        [*TRANSFORMER_ENGINE, "trainer.fp8=blockwise", "trainer.microbatch_tokens=3199", "sampling.max_tokens=2050"],
        *("trainer.microbatch_tokens", "one sequence", "3072 < 3074", "raise it"),
    ),
    (["trainer.microbatch_tokens=3071"], "trainer.microbatch_tokens", "one sequence", "3071 < 3072", "raise it"),
    (["algorithm.alpha=0.01"], "algorithm.alpha", "algorithm.loss = 'group_dpo'", "0.01 with 'dpo'", "remove it"),
    (["algorithm.pairing=best_worst", "algorithm.loss=grpo"], "algorithm.pairing", "'dpo'", "'best_worst' with", "remove"),
    (["algorithm.normalize_length=true"], "algorithm.normalize_length", "'grpo'", "True with 'dpo'", "remove it"),
    (
        ["algorithm.normalize_advantages=mean_std", "algorithm.loss=group_dpo"],
        *("algorithm.normalize_advantages", "normalize_length", "'mean_std' and False with 'group_dpo'", "'mean'"),
    ),
    (
        ["algorithm.entropy_weight=1e-4", "trainer.fused_lm_head=true"],
        *("algorithm.entropy_weight", "trainer.fused_lm_head", "found 0.0001 and true", "false"),
    ),
    (
        ["algorithm.weight_pairs=true", "trainer.fused_lm_head=true"],
        *("algorithm.weight_pairs", "trainer.fused_lm_head", "found both true", "set one to false"),
    ),
    (
        ["algorithm.loss=grpo", "algorithm.reduction=pairs"],
        *("algorithm.reduction = 'pairs'", "algorithm.loss", "found 'grpo'", "use 'prompts'"),
    ),
    (
        ["algorithm.loss=grpo", "algorithm.nll_weight=1.0"],
        *("algorithm.nll_weight", "'dpo' and 'group_dpo'", "found 1.0 with 'grpo'", "choose another loss"),
    ),
    (["reward_model.max_tokens=512"], "reward_model.max_tokens", "reward_model.path", "found 512 with none", "or remove it"),
    (
        ['rewards.environment=["KEY"]'],
        *("rewards.environment", "found ['KEY'] and no such function", "name one in data.reward", "or remove it"),
    ),
    (
        ["algorithm.loss=group_dpo", "algorithm.kl_weight=0.1", "algorithm.dual_clip=3.0"],
        *("algorithm.dual_clip", "algorithm.alpha adds", "found dual_clip = 3.0, kl_weight = 0.1 with", "remove them"),
    ),
    (
        ["algorithm.loss=grpo", "algorithm.clip_ratio=0.5", "algorithm.clip_ratio_low=0.2", "algorithm.clip_ratio_high=0.3"],
        *("algorithm.clip_ratio", "clip_ratio_low and clip_ratio_high", "found 0.5 beside 0.2 and 0.3", "remove it"),
    ),
    (["data.reward=model"], "reward_model.path", "reward = 'model'", "None and sources with 'model'", "name the reward"),
    (["reward_model.path=rm"], "reward_model.path", "reward = 'model'", "'rm' and sources with 'math'", "remove both"),
    (
        ["algorithm.loss=grpo", "algorithm.kl_weight=0.0", "sync.reference=follow"],
        *("sync.reference", "algorithm.kl_weight = 0", "found 'follow'", "set sync.reference = 'never'"),
    ),
    (["sampling.temperature=0"], "sampling.temperature", "algorithm.samples_per_prompt = 8", "found 0", "set it to 1"),
    (["sampling.temperature=0.001"], "sampling.temperature", "at least 0.01", "found 0.001", "raise it"),
    (
        ["algorithm.loss=grpo", "sampling.top_p=0.9"],
        *("sampling.top_p must be 1", "algorithm.loss = 'grpo'", "found 0.9", "set it to 1"),
    ),
    (
        ["model.head=float32", "model.dtype=bfloat16"],
        *("model.head = 'float32'", "trainer.fused_lm_head", "found false", "set trainer.fused_lm_head = true"),
    ),
    (
        [*("model.head=float32", "model.dtype=bfloat16"), "trainer.fused_lm_head=true", "inference.packed_weights=true"],
        *("model.head = 'float32'", "inference.packed_weights = false", "found true", "set it to false"),
    ),
    (
        ["inference.quantization=fp8"],
        *("inference.quantization = 'fp8'", "model.dtype = 'bfloat16'", "found 'float32'", "quantization to 'none'"),
    ),
    (
        ["inference.quantization=fp8", "model.dtype=bfloat16", "inference.packed_weights=true"],
        *("inference.quantization = 'fp8'", "inference.packed_weights = false", "found true", "quantization to 'none'"),
    ),
    (
        ["inference.quantization=fp8", "model.dtype=bfloat16", "sync.reference=follow", "sync.reference_log_probs=rollouts"],
        *("inference.quantization = 'fp8'", "reference_log_probs = 'computed'", "found 'rollouts'", "quantization to 'none'"),
    ),
    (["profile.tool=torch", "profile.first_step=18"], "profile.first_step", "run.steps", "18 + 3 > 20", "raise run.steps"),
    (["profile.tool=nsys", "profile.ranks=[0, 1]"], "profile.ranks", "trainer.tensor_parallel", "[0, 1]", "leave out"),
    (["profile.tool=nsys", "cluster.nodes=2"], "profile.tool = 'nsys'", "cluster.nodes = 1", "found 2", "set it to 'torch'"),
    (["profile.tool=torch", "profile.engines=[2]"], "profile.engines", "inference.engines", "[2] and 1", "leave out"),
]


@pytest.mark.parametrize(("overrides", "key", "beside", "found", "fix"), COMBINATIONS)
def test_an_impossible_combination_names_both_options_the_values_and_the_fix(path, overrides, key, beside, found, fix):
    sentence = complaint(path, *overrides)
    assert sentence.startswith(key)
    assert beside in sentence
    assert found in sentence
    assert fix in sentence[sentence.rindex(": ") :]


def test_every_rule_on_combinations_has_a_case():
    named = {case[1].split(" ")[0] for case in COMBINATIONS}
    losses = [Algorithm.broken_rules, *(LOSSES.load(name).broken_rules for name in LOSSES.names)]
    tables = (broken_rules, broken_best_rules, broken_layout_rules, broken_data_rules, broken_library_rules, *losses)
    tables += (broken_optimizer_rules, broken_placement_rules, broken_head_rules)
    tables += (broken_sampling_rules, broken_reference_rules, broken_unused_rules)
    rules = "".join(map(inspect.getsource, (*tables, broken_rollout_rules, broken_profile_rules, broken_reward_rules)))
    rules += inspect.getsource(broken_source_rules) + inspect.getsource(broken_lookahead_rules)
    assert len(COMBINATIONS) >= rules.count("broken.append(") >= len(named), "each rule has a case"


@pytest.mark.parametrize(
    "overrides",
    [
        ["sync.sync_interval=4", "checkpoint.every=8", "evaluation.every=6"],
        ["sync.sync_interval=never", "evaluation.every=6"],
        ["checkpoint.best_by=reward", *HELD_OUT, "checkpoint.every=6", "evaluation.every=3"],
        ["sync.sync_interval=never", "checkpoint.every=7"],
        ["trainer.sequence_parallel=true", "trainer.tensor_parallel=2"],
        ["trainer.virtual_pipeline=2", "trainer.pipeline_parallel=2"],
        ["trainer.first_stage_layers=3", "trainer.pipeline_parallel=2"],
        ["data.template=Solve {problem}"],
        ["data.template=figure5", "data.spare_prompts=8"],
        ["data.replay=a.jsonl", "sync.sync_interval=never"],
        ["data.reward=function", "rewards.function=judge.py:score", "rewards.unevaluated=refuse"],
        ["trainer.microbatch_tokens=3072", "algorithm.loss=grpo", "algorithm.reduction=tokens"],
        ["algorithm.loss=grpo", "algorithm.normalize_advantages=mean_std", "algorithm.normalize_length=true"],
        ["algorithm.loss=group_dpo", "algorithm.alpha=0.01", "algorithm.nll_weight=1.0", "algorithm.entropy_weight=3e-4"],
        ["algorithm.loss=group_dpo", "algorithm.alpha=0.001", "algorithm.normalize_length=true", "algorithm.reduction=pairs"],
        ["algorithm.pairing=length_matched", "algorithm.entropy_weight=1e-4"],
        [f"algorithm.loss={OWN_LOSS}:Regression", "algorithm.temperature=0.5", "algorithm.normalize_advantages=mean_std"],
        [f"algorithm.loss={OWN_LOSS}:ReferenceRegression", "algorithm.reduction=pairs", "sync.reference=follow"],
        ["profile.tool=torch", "profile.first_step=17", "profile.ranks=[1]", "trainer.tensor_parallel=2", "profile.engines=[]"],
        ["inference.placement=colocated", "sync.transport=ipc"],
        ["inference.placement=colocated", "sync.transport=ipc", "cluster.nodes=2"],
        ["inference.placement=colocated", "cluster.nodes=2", "trainer.pipeline_parallel=4", "trainer.data_parallel=4"],
        [*TRANSFORMER_ENGINE, "trainer.fp8=blockwise", "trainer.fuse_gradient_accumulation=true"],
        [*OVERLAP, "trainer.fp8=delayed"],
        ["trainer.gradient_dtype=bfloat16", "model.dtype=bfloat16", "trainer.reference_memory=host"],
        ["trainer.overlap_gradients=true", "trainer.data_parallel=2", "checkpoint.on_failure=continue"],
        SMALL_MOMENTS,
        FP8_PARAMETERS,
        [*FP8_PARAMETERS, *SMALL_MOMENTS],
        [*SMALL_MOMENTS[2:], "optimizer.implementation=apex", "optimizer.offload_share=0.5"],
        ["optimizer.memory_while_sampling=host", "inference.placement=colocated"],
        ['data.reward=["math", "a.py:f", "b.c:g"]', "data.reward_weights=[1, 0.5, 2.0]", 'rewards.weights={"a b"=0.5}'],
        ["data.reward=a.py:f", 'rewards.environment=["KEY"]', "rewards.concurrency=8"],
        ["data.reward=model", "reward_model.path=rm"],
        ["data.reward=model", "reward_model.path=rm", 'data.mix=[{train = "b"}]', "algorithm.pairing=best_worst"],
    ],
)
def test_what_is_possible_is_accepted(path, overrides):
    load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("section [run] is required",)),
        ("[run]\ndirectory = 'a'\n", ("run.steps is required", "set it")),
        ("run = 3\n", ("run: ", "found 3")),
        ("[run\n", ("run.toml is not TOML", "line 1")),
        ("x = '\udce9'", ("run.toml must be UTF-8", "found byte")),
    ],
)
def test_a_wrong_file_is_one_sentence(path, text, parts):
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    sentence = complaint(path)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("overrides", "temperature"),
    [
        ([], 1.0),
        (["sampling.temperature=0.7"], 1.0),
        (["algorithm.loss=group_dpo", "sampling.temperature=0.7", "sampling.top_p=0.9"], 1.0),
        (["algorithm.loss=group_dpo", "algorithm.alpha=0.1", "sampling.temperature=0.7"], 0.7),
        (["algorithm.loss=grpo", "sampling.temperature=0.7"], 0.7),
        (["algorithm.loss=grpo"], 1.0),
        ([f"algorithm.loss={OWN_LOSS}:Regression", "sampling.temperature=1.3"], 1.3),
        (["algorithm.loss=grpo", "sampling.temperature=0.7", "sft.checkpoint_out=a"], 1.0),
    ],
)
def test_log_probs_are_of_the_sampled_distribution_where_ratios_are_used(path, overrides, temperature):
    assert load_config(path, overrides).log_prob_temperature == temperature


@pytest.mark.parametrize("loss", ["grpo", "group_dpo", f"{OWN_LOSS}:Regression"])
def test_a_loss_with_ratios_asks_for_a_distribution_that_has_them(path, loss):
    """Also where rollouts are replayed; a preference loss does not ask."""
    replayed = ["data.replay=ledger.jsonl", "sync.sync_interval=never", f"algorithm.loss={loss}"]
    alpha = ["algorithm.alpha=0.1"] if loss == "group_dpo" else []
    assert "sampling.temperature must be at least 0.01" in complaint(path, *replayed, *alpha, "sampling.temperature=0")
    assert "sampling.top_p must be 1" in complaint(path, *replayed, *alpha, "sampling.top_p=0.5")
    if alpha:
        load_config(path, [*replayed, "sampling.temperature=0", "sampling.top_p=0.5"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path):
        assert str(path) in complaint(path)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["algorithm.loss=absent.py:Mine"], ("algorithm.loss must name a file that exists", "absent.py", "check the path")),
        ([f"algorithm.loss={OWN_LOSS}:Absent"], ("algorithm.loss", "no Absent there, but", "Regression", "check the name")),
        (["algorithm.loss=math:floor"], ("algorithm.loss must name a class that extends", "'math:floor'", "extend it")),
        (
            [f"algorithm.loss={OWN_LOSS}:Regression", "algorithm.beta=1"],
            ("algorithm.beta is an option of algorithm.loss = 'dpo' and 'group_dpo'", "own_loss.py:Regression", "remove it"),
        ),
        (
            [f"algorithm.loss={OWN_LOSS}:Regression", "algorithm.temperature=0"],
            ("algorithm.temperature: ", "greater than 0", "found 0", "of the regularised optimum"),
        ),
        (
            [f"algorithm.loss={OWN_LOSS}:Regression", "algorithm.temperatur=1"],
            ("algorithm.temperatur is not an option", "found 1", "did you mean algorithm.temperature?"),
        ),
        (
            [f"algorithm.loss={OWN_LOSS}:Regression", "sync.reference=follow"],
            ("sync.reference needs a loss that looks at the reference", "own_loss.py:Regression", "'never'"),
        ),
        (["algorithm.pairing=nearest"], ("algorithm.pairing must be one of random", "found 'nearest'", "choose one")),
        (["algorithm.pairing=absent.py:pair"], ("algorithm.pairing must name a file that exists", "absent.py")),
        (
            ["algorithm.loss=grpo", "algorithm.normalize_advantages=absent.py:centre"],
            ("algorithm.normalize_advantages must name a file that exists", "absent.py"),
        ),
        (["algorithm.loss=3"], ("algorithm.loss: ", "string", "found 3")),
        (["algorithm.loss=grpo", "algorithm.dual_clip=1.0"], ("algorithm.dual_clip: ", "greater than 1", "found 1.0")),
    ],
)
def test_a_part_of_the_users_own_is_refused_by_its_name(path, overrides, parts):
    sentence = complaint(path, *overrides)
    for part in parts:
        assert part in sentence


@pytest.mark.slow
def test_a_configuration_reaches_a_process_that_has_not_read_the_users_file(path):
    """As Ray sends it; by the user's class alone it could not be read there."""
    config = load_config(path, [f"algorithm.loss={OWN_LOSS}:Regression", "algorithm.temperature=0.5"])
    sent = path.with_suffix(".pickle")
    sent.write_bytes(pickle.dumps(config))
    code = f"import pickle; print(pickle.loads(open({str(sent)!r}, 'rb').read()).algorithm.temperature)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0.5", done.stderr


def test_overrides_win_in_order_and_keep_their_types(path):
    overrides = ["run.steps=5", "run.steps = 7", "run.directory=my runs/b", "optimizer.learning_rate=1e-5"]
    config = load_config(path, [*overrides, "sync.sync_interval=never", "trainer.recompute=true"])
    assert (config.run.steps, config.run.directory) == (7, "my runs/b")
    assert config.optimizer.learning_rate == 1e-5
    assert config.sync.sync_interval == "never"
    assert config.trainer.recompute is True


def test_an_override_without_a_value_is_as_if_the_file_did_not_set_the_option(path):
    path.write_text(path.read_text("utf-8") + "[optimizer]\nlearning_rate = 0.5\nbeta1 = 0.1\n", "utf-8")
    assert load_config(path).optimizer.learning_rate == 0.5
    config = load_config(path, ["optimizer.learning_rate=", "optimizer.eps=", "data.mix[3].train=", "sync.sync_interval= "])
    assert (config.optimizer.learning_rate, config.optimizer.beta1) == (1e-6, 0.1)
    assert config.sync.sync_interval == 1


def test_a_byte_order_mark_is_no_part_of_a_file(path):
    text = path.read_bytes()
    whole = load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert load_config(path) == whole


def test_an_override_reaches_into_a_list_of_tables(path):
    sources = 'data.mix=[{train = "b"}, {train = "c"}]'
    config = load_config(path, [sources, "data.mix[1].prompts_per_step=8", "data.mix[0].template={problem}"])
    assert [source.prompts_per_step for source in config.data.mix] == [64, 8]
    assert config.data.mix[0].template == "{problem}"


def test_every_fault_is_told(path):
    """Broken rules together, and wrong values together; each its own sentence."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["trainer.sequence_parallel=true", "data.reward=function", "data.template=x"])
    found = [str(fault) for fault in caught.value.faults]
    assert len(found) == 3 and str(caught.value) == "\n".join(found)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["run.steps=0", "sync.sync_interval=0", "sync.x=1", "beta=1"])
    assert len(caught.value.faults) == 4


def test_an_override_may_not_turn_a_value_into_a_section(path):
    path.write_text("run = 3\n", encoding="utf-8")
    assert "run is not a section" in complaint(path, "run.steps=3")


def test_nothing_changes_after_loading(path):
    config = load_config(path)
    with pytest.raises(ValidationError):
        config.run.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["sync.sync_interval=never", "sync.reference=2", "checkpoint.every=3"],
        ["sync.sync_interval=4", "sync.reference=8", "evaluation.max_problems=5", "data.held_out=test.jsonl"],
        ["algorithm.loss=group_dpo", "algorithm.alpha=0.5", "algorithm.clip_ratio=0.3"],
        [f"algorithm.loss={OWN_LOSS}:Regression", "algorithm.temperature=0.5"],
    ],
)
def test_what_is_dumped_loads_to_an_equal_configuration(path, tmp_path, overrides):
    config = load_config(path, overrides)
    dumped = tmp_path / "resolved.toml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config, "as the ranks get it"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(1e-300, 1e300))
def test_any_text_and_any_number_survive_the_dump(tmp_path_factory, text, number):
    path = tmp_path_factory.mktemp("dump") / "run.toml"
    path.write_text(REQUIRED, encoding="utf-8")
    loaded = load_config(path).model_dump()
    loaded["data"]["template"] = text + "{problem}"
    loaded["optimizer"]["learning_rate"] = number
    config = RunConfig.model_validate(loaded)
    path.write_bytes(dump_config(config).encode("utf-8"))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("overrides", "interval", "chunk"),
    [([], 1, 16), (["sync.sync_interval=never", "checkpoint.every=6"], "never", 6)],
)
def test_the_schedule_follows_the_options(path, overrides, interval, chunk):
    schedule = load_config(path, overrides).schedule
    assert (schedule.sync_interval, schedule.offline_chunk, schedule.num_steps) == (interval, chunk, 20)


def test_what_is_due_follows_the_options(path):
    """In fairseq2's count everything that comes every so many steps comes one early, with the syncs; ends stay ends."""
    every = ["sync.sync_interval=5", "checkpoint.every=10", *HELD_OUT, "evaluation.every=2"]
    steps = range(21)
    paper, theirs = (load_config(path, [*every, f"sync.semantics={name}"]) for name in ("paper", "fairseq2"))
    assert [step for step in steps if paper.checkpoint_due(step)] == [10, 20]
    assert [step for step in steps if theirs.checkpoint_due(step)] == [9, 19, 20]
    assert [step for step in steps if paper.evaluation_due(step)] == list(range(0, 21, 2))
    assert [step for step in steps if theirs.evaluation_due(step)] == [0, *range(1, 20, 2), 20]
    assert all(theirs.schedule.sync_due(step) for step in (9, 19))
    assert paper.evaluates_between_syncs
    ends = load_config(path, [*HELD_OUT, "checkpoint.every=end"])
    assert [step for step in steps if ends.evaluation_due(step)] == [0, 20]
    assert [step for step in steps if ends.checkpoint_due(step)] == [20]
    assert not ends.evaluates_between_syncs
    assert not load_config(path, [*every, "evaluation.every=10"]).evaluates_between_syncs
    assert not load_config(path, ["evaluation.every=2"]).evaluation_due(2), "nothing is held out"


def test_all_that_is_wrong_in_the_algorithm_is_told_at_once():
    with pytest.raises(ConfigError) as raised:
        override(config(), algorithm={"clip_ratio": 0.2, "alpha": 1.0, "beta": -1.0, "bta": 2.0})
    said = [str(fault).split()[0] for fault in raised.value.faults]
    assert said == ["algorithm.clip_ratio", "algorithm.alpha", "algorithm.beta:", "algorithm.bta"]


def test_a_loss_that_is_not_there_hides_nothing():
    with pytest.raises(ConfigError) as raised:
        override(config(), {"algorithm.loss": "dppo", "run.steps": 0, "sync.semantics": "papr"})
    said = [str(fault) for fault in raised.value.faults]
    assert len(said) == 2 and said[0].startswith("run.steps") and said[1].startswith("algorithm.loss must be one of cispo")
    with pytest.raises(ConfigError) as raised:
        override(config(), {"sync.semantics": "papr", "trainer.sequence_parallel": True})
    assert [str(fault).split()[0] for fault in raised.value.faults] == ["sync.semantics", "trainer.sequence_parallel"]


def test_what_can_be_read_is_there_beside_what_cannot(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        "[run]\nsteps = 0\n[model]\npath = 'm'\n[data]\ntrain = 't'\n[algorithm]\nloss = 'dppo'\n[unknown]\nx = 1\n"
    )
    reading = read_config(file)
    assert reading.unread == {"run", "algorithm", "unknown"} and len(reading.faults) == 4
    assert reading.config is not None and (reading.config.model.path, reading.config.data.train) == ("m", "t")


if __name__ == "__main__":
    OPTIONS_FILE.write_text("\n".join(options()) + "\n", encoding="utf-8")
    print(f"wrote {len(options())} options to {OPTIONS_FILE}")


def test_a_file_that_fails_while_it_is_imported_is_one_of_the_faults(tmp_path):
    """Whatever it raises, and beside what else is wrong."""
    (tmp_path / "torn.py").write_text("undefined_name\n")
    tree = {"run": {"directory": "r", "steps": 1}, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    said = r"algorithm\.loss must name a module that can be imported; found .*torn\.py with NameError"
    with pytest.raises(ConfigError, match=said):
        override(RunConfig.model_validate(tree), {"algorithm.loss": f"{tmp_path}/torn.py:Loss"})


def test_a_rule_for_several_rewards_needs_several():
    data = {"train": "t.jsonl", "reward_combine": "min"}
    with pytest.raises(ValidationError, match=r"data\.reward_combine puts several rewards together; found 'min' with one"):
        RunConfig.model_validate({"run": {"directory": "r", "steps": 1}, "model": {"path": "m"}, "data": data})
