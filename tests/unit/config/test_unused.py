"""No option is set in silence: each is looked at in every training run, or there is a run that refuses it, or tells by name
that it changes nothing there. A new option is in one of the two lists here, or the first test says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.load import load_config
from engine.config.options import LOSSES, Options
from engine.config.unused import unused_options
from engine.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
LEAST = "[run]\ndirectory = 'unused'\nsteps = 20\n[model]\npath = 'unused'\n[data]\ntrain = 'unused'\n"
REPLAY = ["data.replay=a.jsonl", "sync.sync_interval=never"]
HELD_OUT = ["data.held_out=a.jsonl"]
MODEL = ["data.reward=model", "reward_model.path=rm"]
GRPO, GROUP_DPO = ["algorithm.loss=grpo"], ["algorithm.loss=group_dpo"]
# Looked at in any run with rollouts. Not in the list is what means nothing without another option. `model.head`,
# `trainer.deterministic`, `trainer.layers` and `trainer.share_prompts` may ask for what is so anyway, which is then no less
# true; inference.threads and cluster.gpus_per_node are of machines without GPUs and with them, which the same file may be for.
USED = {
    *("run.directory", "run.seed", "run.steps", "run.restarts", "run.sinks", "model.path", "model.family", "model.dtype"),
    *("model.head", "data.train", "data.held_out", "data.template", "data.system", "data.columns", "data.reward", "data.mix"),
    *("data.prompts_per_step", "data.spare_prompts", "data.max_prompt_tokens", "data.chat_template", "data.replay"),
    *("algorithm.loss", "algorithm.samples_per_prompt", "algorithm.entropy_weight", "algorithm.reduction"),
    *("sync.sync_interval", "sync.semantics", "sync.bucket_mebibytes"),
    *("sampling.max_tokens", "sampling.truncated", "sampling.overlong_buffer"),
    *("trainer.tensor_parallel", "trainer.pipeline_parallel", "trainer.data_parallel", "trainer.distributed_optimizer"),
    *("trainer.recompute", "trainer.fused_lm_head", "trainer.microbatch_tokens", "trainer.threads", "trainer.layers"),
    *("trainer.timeout_seconds", "trainer.fuse_gradient_accumulation", "trainer.deterministic", "trainer.share_prompts"),
    *("optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.schedule", "optimizer.beta1", "optimizer.beta2"),
    *("optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.implementation"),
    *("inference.max_model_tokens", "checkpoint.every", "checkpoint.keep", "checkpoint.on_failure", "guard.action"),
    *("checkpoint.other_layout", "cluster.nodes", "cluster.gpus_per_node", "profile.tool", "sft.checkpoint_out"),
    # of a loss that has them
    *("algorithm.weight_low", "algorithm.weight_high", "algorithm.beta", "algorithm.preference_loss"),
    *("algorithm.average_log_probs", "algorithm.weight_pairs", "algorithm.nll_weight", "algorithm.pairing"),
    *("algorithm.alpha", "algorithm.value_beta", "algorithm.ratio_beta"),
}
# An option, a value that is not its default, and a run in which it would change nothing.
WITHOUT = [
    ("run.on_lost_node", "shrink", []),
    ("data.reward_weights", "[1.0, 2.0]", []),
    ("data.reward_combine", "min", []),
    *(("sync." + name, value, []) for name, value in (("auto_bound", "1.0"), ("auto_most", "3"), ("auto_metric", "ess_share"))),
    ("sync.reference", "follow", [*GRPO, "algorithm.kl_weight=0.0"]),
    ("sync.reference_mix", "0.5", []),
    ("sync.reference_log_probs", "rollouts", [*GRPO, "algorithm.kl_weight=0.0", "sync.sync_interval=never"]),
    ("sync.reference_log_probs", "rollouts", ["sync.reference=follow"]),
    ("sync.lookahead", "1", ["sync.sync_interval=never"]),
    ("sync.in_flight", "true", []),
    ("sync.streaming", "true", ["sync.sync_interval=2"]),
    *((f"sync.{name}", value, REPLAY) for name, value in (("transport", "gloo"), ("timeout_seconds", "9"))),
    *((f"sampling.{name}", value, REPLAY) for name, value in (("temperature", "0.5"), ("top_p", "0.5"), ("top_k", "5"))),
    *((f"sampling.{name}", value, REPLAY) for name, value in (("min_p", "0.5"), ("stop", "[7]"))),
    ("sampling.overlong_penalty", "2.0", []),
    ("trainer.virtual_pipeline", "2", []),
    ("trainer.first_stage_layers", "2", []),
    ("trainer.last_stage_layers", "2", []),
    ("trainer.sequence_parallel", "true", []),
    ("trainer.fp8", "current", []),
    ("trainer.fp8_parameters", "true", []),
    ("trainer.overlap_tensor_parallel", "true", []),
    ("trainer.gradient_dtype", "bfloat16", []),
    ("trainer.overlap_gradients", "true", []),
    ("trainer.reference_memory", "host", [*GRPO, "algorithm.kl_weight=0.0"]),
    ("trainer.reference_memory", "host", ["sync.reference=1"]),
    ("optimizer.decay_steps", "9", []),
    ("optimizer.floor_share", "0.5", []),
    ("optimizer.moment_dtype", "bfloat16", []),
    ("optimizer.offload_share", "0.5", []),
    ("optimizer.memory_while_sampling", "host", []),
    ("optimizer.memory_while_sampling", "host", [*REPLAY, "inference.placement=colocated"]),
    *((f"inference.{name}", "2", REPLAY) for name in ("engines", "tensor_parallel", "max_concurrent", "threads")),
    *((f"inference.{name}", value, REPLAY) for name, value in (("kv_cache", "1 GiB"), ("packed_weights", "true"))),
    *((f"inference.{name}", value, REPLAY) for name, value in (("timeout_seconds", "9"), ("placement", "colocated"))),
    ("inference.quantization", "fp8", [*REPLAY, "model.dtype=bfloat16"]),
    ("inference.vllm", "{enforce_eager = true}", REPLAY),
    ("rewards.unevaluated", "refuse", MODEL),
    ("rewards.function", "a.py:f", []),
    ("rewards.weights", "{format = 0.2}", REPLAY),
    ("rewards.environment", '["KEY"]', []),
    *((f"rewards.{name}", "3", MODEL) for name in ("workers", "concurrency", "deadline_seconds", "memory_mebibytes")),
    ("rewards.timeout_seconds", "9", []),
    ("reward_model.path", "rm", []),
    *((f"reward_model.{name}", "3", []) for name in ("max_tokens", "engines", "tensor_parallel", "timeout_seconds")),
    ("reward_model.dtype", "bfloat16", []),
    ("reward_model.kv_cache", "1 GiB", []),
    ("checkpoint.best_by", "reward", []),
    ("records.rollouts", "[]", REPLAY),
    ("records.keep_steps", "3", REPLAY),
    *((f"evaluation.{name}", "1", []) for name in ("samples", "temperature", "every", "max_problems")),
    ("evaluation.top_p", "0.5", []),
    ("evaluation.top_p", "0.5", [*HELD_OUT, "evaluation.temperature=0"]),
    *((f"guard.{name}_share", "0.7", ["guard.action=off"]) for name in ("entropy", "length", "truncated", "unjudged")),
    *((f"profile.{name}", value, []) for name, value in (("first_step", "1"), ("num_steps", "1"), ("ranks", "[]"))),
    ("profile.engines", "[]", []),
    ("profile.engines", "[]", [*REPLAY, "profile.tool=torch"]),
    ("sft.sequences_per_step", "3", []),
    ("algorithm.label_smoothing", "0.1", ["algorithm.preference_loss=ipo"]),
    ("algorithm.choose_truncated", "true", ["sampling.truncated=leave_out"]),
    *((f"algorithm.{name}", value, GRPO) for name, value in (("correction_level", "geometric"), ("correction_low", "0.5"))),
    ("algorithm.correction_high", "2.0", GRPO),
    ("algorithm.clip_ratio", "0.5", [*GRPO, "algorithm.clip_ratio_low=0.2", "algorithm.clip_ratio_high=0.3"]),
    *((f"algorithm.{name}", "0.7", GROUP_DPO) for name in ("clip_ratio_low", "clip_ratio_high", "kl_weight")),
    *((f"algorithm.{name}", value, GROUP_DPO) for name, value in (("dual_clip", "3.0"), ("ratio_level", "geometric"))),
    *((f"algorithm.{name}", value, GROUP_DPO) for name, value in (("normalize_length", "true"), ("correction", "mask"))),
    ("algorithm.normalize_advantages", "mean_std", GROUP_DPO),
]
SUPERVISED = {  # looked at in a supervised run
    *("run.directory", "run.seed", "run.steps", "run.sinks", "model.path", "model.family", "model.dtype", "model.head"),
    *("data.train", "data.template", "data.system", "data.columns", "data.max_prompt_tokens", "data.chat_template"),
    *("sft.sequences_per_step", "sft.checkpoint_out", "cluster.nodes", "cluster.gpus_per_node", "profile.tool"),
    *("profile.first_step", "profile.num_steps", "profile.ranks", "trainer.share_prompts", "sync.bucket_mebibytes"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(LEAST)
    return file


def keys() -> set[str]:
    """Every option of every table and loss."""
    tables: dict[str, Any] = {table: field.annotation for table, field in Options.model_fields.items()}
    found = {f"{table}.{name}" for table, section in tables.items() for name in section.model_fields}
    return found | {f"algorithm.{name}" for loss in LOSSES.names for name in LOSSES.load(loss).Options.model_fields}


def said(path: Path, *overrides: str) -> str:
    """What is told or refused."""
    try:
        return "\n".join(unused_options(load_config(path, list(overrides))))
    except ConfigError as error:
        return str(error)


def test_every_option_is_used_in_any_run_or_is_never_silent():
    named = {option for option, *_ in WITHOUT}
    assert not USED & named
    assert keys() - named == USED, "a new option is looked at in every run (USED), or refused or told where not (WITHOUT)"


@pytest.mark.parametrize(("option", "value", "run"), WITHOUT, ids=[f"{i} {one[0]}" for i, one in enumerate(WITHOUT)])
def test_what_would_be_ignored_is_refused_or_told_by_name(path, option, value, run):
    table, _, name = option.partition(".")
    sentences = said(path, *run, f"{option}={value}")
    assert option in sentences or (f"{table}." in sentences and f" {name} " in sentences.replace(",", " ")), "or with others"
    assert f"{option} = " not in said(path, *run), "as it is by default nothing is said of it"


def test_a_supervised_run_tells_all_that_it_does_not_look_at(path):
    values = {option: value for option, value, _ in WITHOUT}
    supervised = ["sft.checkpoint_out=out"]
    for option in keys() - SUPERVISED:
        table = option.partition(".")[0]
        if table in ("trainer", "optimizer") and option not in ("trainer.reference_memory", "optimizer.memory_while_sampling"):
            continue  # as in any training
        if option in values and table not in ("reward_model",):
            placement = ["inference.placement=colocated"] * (option == "optimizer.memory_while_sampling")  # else refused
            told = said(path, *supervised, *placement, f"{option}={values[option]}")
            assert option in told, (option, told)


@pytest.mark.parametrize("run", [["sft.checkpoint_out=out"], REPLAY], ids=["supervised", "replay"])
def test_what_acts_on_files_and_layers_is_not_called_unused_where_nothing_is_sampled(path, run):
    """Exports and checkpoints are gathered in buckets of so many bytes; prompts that are shared need local layers."""
    assert said(path, *run, "sync.bucket_mebibytes=1", "trainer.share_prompts=true") == ""


def test_a_file_may_keep_what_only_another_command_looks_at(path):
    path.write_text(f"{LEAST}[sft]\nsequences_per_step = 3\n")
    (sentence,) = unused_options(load_config(path))
    assert sentence.startswith("sft.sequences_per_step = 3 changes nothing in this run") and "sft.checkpoint_out" in sentence
    assert unused_options(load_config(path, ["sft.checkpoint_out=out"])) == []


def test_each_is_told_once_and_with_its_value(path):
    (sentence,) = unused_options(
        load_config(path, ["evaluation.samples=9", "evaluation.top_p=0.5", "evaluation.temperature=0"])
    )
    assert sentence.startswith("evaluation.samples = 9, evaluation.temperature = 0.0, evaluation.top_p = 0.5 change nothing")
    assert "data.held_out" in sentence
    assert unused_options(load_config(path, ["evaluation.samples=9", *HELD_OUT])) == []


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/**/*.toml")), ids=lambda file: file.stem)
def test_shipped_files_set_nothing_in_vain(file):
    expected = ["trainer.reference_memory"] if file.stem == "llama-3.1-8b-8x80" else []  # which it is made for with s > 1
    assert [sentence.partition(" = ")[0] for sentence in unused_options(load_config(file))] == expected
