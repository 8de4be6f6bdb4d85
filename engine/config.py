"""One typed tree for a run: a TOML file with dotted overrides becomes a `RunConfig`, checked across fields before
anything starts. Every option of the engine is here and nowhere else; no default hides in another room.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import ConfigError
from engine.schedule import SyncSchedule

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
Pairing = Literal["random", "best_worst", "length_matched"]


class Section(BaseModel):
    """A table of the file: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Run(Section):
    """What the run is called, how long it is, and its one source of randomness."""

    directory: str = Field(description="where checkpoints, metrics, rollouts and the summary go")
    seed: NonNegative = 0
    steps: Positive = Field(description="optimizer steps in all")


class Model(Section):
    """The seed model."""

    path: str = Field(description="folder of a Hugging Face Llama checkpoint")
    dtype: Literal["float32", "bfloat16"] = "float32"


class Data(Section):
    """Prompts to train on and problems held out."""

    train: str = Field(description="JSONL or parquet file in the NuminaMath schema")
    held_out: str | None = Field(None, description="problems never trained on, for evaluation")
    template: str = Field("figure4", description="'figure4' (the paper's), or a text with {problem} in it")
    prompts_per_step: Positive = 64
    max_prompt_tokens: Positive = 1024


class Algorithm(Section):
    """The loss and how groups become training sequences."""

    loss: Literal["dpo", "group_dpo", "grpo"] = "dpo"
    pairing: Pairing = Field("random", description="DPO's pair: of correct and wrong, of extreme rewards, or of near lengths")
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    beta: PositiveFloat = Field(0.1, description="DPO's inverse temperature")
    clip_ratio: PositiveFloat = Field(0.2, description="GRPO's epsilon")
    kl_weight: NonNegativeFloat = Field(0.001, description="GRPO's KL to the reference (k3)")
    alpha: NonNegativeFloat = Field(0.0, description="GRPO's weight beside GroupDPO, over the same group")
    normalize_advantages: Literal["mean", "mean_std", "leave_one_out"] = "mean"
    normalize_length: bool = Field(False, description="divide GRPO's sum over a response by its number of tokens")
    nll_weight: NonNegativeFloat = Field(0.0, description="DPO's NLL on the chosen response")
    entropy_weight: NonNegativeFloat = Field(0.0, description="of minus the mean next-token entropy over a response")
    reduction: Literal["prompts", "pairs", "tokens"] = "prompts"

    @property
    def uses_advantages(self) -> bool:
        """Whether GRPO is the loss or part of it."""
        return self.loss == "grpo" or self.alpha > 0


SYNC_ATTEMPTS = 3  # of one weight sync: a fault that outlives two repetitions is no accident


class Sync(Section):
    """The regime: how often the generator and the reference take the policy's weights."""

    sync_interval: Positive | Literal["never"] = Field(1, description="s: 1 online, k semi-online, 'never' offline")
    reference: Positive | Literal["never", "follow"] = "never"
    bucket_mebibytes: Positive = Field(64, description="weights sent together in one message")
    transport: Literal["auto", "gloo", "nccl", "ipc"] = Field(
        "auto", description="'ipc': shared memory of one machine; 'auto': NCCL where there are GPUs, else gloo"
    )
    timeout_seconds: PositiveFloat = Field(120.0, description="longest attempt at a weight sync; there are three")


class Sampling(Section):
    """How an engine samples rollouts."""

    temperature: NonNegativeFloat = 1.0
    top_p: Probability = 1.0
    max_tokens: Positive = 2048


class Trainer(Section):
    """Layout of the policy over trainer ranks: world size = tensor * pipeline * data."""

    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    virtual_pipeline: Positive = Field(1, description="model chunks per pipeline stage")
    first_stage_layers: Positive | None = Field(None, description="layers of the first stage; unset: as the others")
    last_stage_layers: Positive | None = Field(None, description="layers of the last stage; unset: as the others")
    data_parallel: Positive = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = Field(False, description="recompute activations in the backward, layer by layer")
    fused_lm_head: bool = Field(False, description="log-probs from hidden states, a few rows of logits at a time")
    microbatch_tokens: Positive = Field(8192, description="packed tokens in one microbatch at most; larger groups are spread")
    timeout_seconds: PositiveFloat = Field(600.0, description="longest wait of a trainer rank for another")

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


class Optimizer(Section):
    """AdamW with linear warm-up to a constant learning rate."""

    learning_rate: PositiveFloat = 1e-6
    warmup_steps: NonNegative = 0
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    eps: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat = 1.0


class Inference(Section):
    """The pool of vLLM engines."""

    engines: Positive = 1
    tensor_parallel: Positive = Field(1, description="ranks of one engine")
    max_model_tokens: Positive = Field(4096, description="prompt and completion together")
    max_concurrent: Positive = Field(256, description="requests decoded together in one engine")
    kv_cache_mebibytes: Positive = Field(1024, description="KV cache of one engine")
    threads: Positive = Field(1, description="CPU threads of one engine; a GPU engine ignores it")
    packed_weights: bool = Field(False, description="let vLLM repack weights for speed; a sync then reloads full tensors")
    timeout_seconds: PositiveFloat = Field(600.0, description="longest wait for a step's rollouts, an evaluation or start-up")


class Rewards(Section):
    """The Math-Verify workers."""

    workers: Positive = 1
    deadline_seconds: PositiveFloat = Field(2.0, description="an answer not judged by then is a counted timeout")
    memory_mebibytes: Positive = Field(3072, description="address space of one worker")


class Checkpoint(Section):
    """When the run's state is committed to disk."""

    every: Positive | Literal["end"] = Field("end", description="steps between checkpoints; a multiple of sync_interval")
    keep: Positive = Field(2, description="newest checkpoints kept")


class Evaluation(Section):
    """Held-out accuracy: the mean over seeds and its standard error."""

    samples: Positive = Field(4, description="completions per problem, one seed each")
    temperature: NonNegativeFloat = 0.6
    top_p: Probability = 0.9
    every: Positive | Literal["ends"] = Field("ends", description="steps between evaluations, or before and after only")
    max_problems: Positive | None = None


class Supervised(Section):
    """`semion sft`: NLL on worked solutions."""

    sequences_per_step: Positive = 64
    checkpoint_out: str | None = Field(None, description="folder for the Hugging Face checkpoint; makes the run supervised")


class RunConfig(Section):
    """Everything a run is; equal configurations and equal data give equal runs."""

    run: Run
    model: Model
    data: Data
    algorithm: Algorithm = Algorithm()
    sync: Sync = Sync()
    sampling: Sampling = Sampling()
    trainer: Trainer = Trainer()
    optimizer: Optimizer = Optimizer()
    inference: Inference = Inference()
    rewards: Rewards = Rewards()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    sft: Supervised = Supervised()

    @property
    def schedule(self) -> SyncSchedule:
        """The regime as arithmetic. Offline generates as many steps at once as a checkpoint spans, 16 by default."""
        chunk = 16 if self.checkpoint.every == "end" else self.checkpoint.every
        return SyncSchedule(self.sync.sync_interval, self.sync.reference, self.run.steps, chunk)

    @property
    def run_directory(self) -> Path:
        """`run.directory` as a path."""
        return Path(self.run.directory)

    @model_validator(mode="after")
    def _checked(self) -> RunConfig:
        always = _broken_rules(self) + _broken_algorithm_rules(self)
        for broken in always + ([] if self.sft.checkpoint_out else _broken_rollout_rules(self)):
            raise ValueError(broken)
        return self


def _broken_rules(config: RunConfig) -> list[str]:
    """Sentences for combinations that cannot work: keys, rule, values found, fix."""
    c, broken = config, []
    s, every = c.sync.sync_interval, c.checkpoint.every
    if s != "never" and every != "end" and every % s:
        broken.append(
            f"checkpoint.every must be a multiple of sync.sync_interval, so that a checkpoint holds the generator's "
            f"weights too; found {every} and {s}: use {s * max(1, every // s)}"
        )
    if c.evaluation.every != "ends" and (s == "never" or c.evaluation.every % s):
        broken.append(
            f"evaluation.every must be a multiple of sync.sync_interval, so that it judges the newest weights; "
            f"found {c.evaluation.every} and {s!r}: use 'ends' or a multiple"
        )
    if c.trainer.sequence_parallel and c.trainer.tensor_parallel == 1:
        broken.append("trainer.sequence_parallel needs trainer.tensor_parallel > 1; found 1: set it to false")
    if c.trainer.virtual_pipeline > 1 and c.trainer.pipeline_parallel == 1:
        broken.append(
            f"trainer.virtual_pipeline needs trainer.pipeline_parallel > 1; found {c.trainer.virtual_pipeline} "
            f"with 1 stage: set it to 1"
        )
    ends = (c.trainer.first_stage_layers, c.trainer.last_stage_layers)
    if ends != (None, None) and c.trainer.pipeline_parallel == 1:
        broken.append(
            f"trainer.first_stage_layers and trainer.last_stage_layers need trainer.pipeline_parallel > 1; found {ends[0]} "
            f"and {ends[1]} with 1 stage: remove them"
        )
    if c.data.template != "figure4" and "{problem}" not in c.data.template:
        broken.append(f"data.template must be 'figure4' or hold {{problem}}; found {c.data.template!r}: add {{problem}}")
    if s == "never" and c.sync.reference == "follow":
        broken.append(
            "sync.reference = 'follow' copies the policy at weight syncs, and sync.sync_interval = 'never' has none; found "
            "both: set sync.reference to 'never' or a number of steps"
        )
    return broken


def _broken_algorithm_rules(c: RunConfig) -> list[str]:
    """The same for what the losses cannot be combined with."""
    a, broken = c.algorithm, []
    if a.loss == "grpo" and a.reduction == "pairs":
        broken.append("algorithm.reduction = 'pairs' needs algorithm.loss with pairs; found 'grpo': use 'prompts' or 'tokens'")
    if a.loss == "grpo" and a.nll_weight:
        broken.append(f"algorithm.nll_weight is DPO's; found {a.nll_weight} with 'grpo': set it to 0")
    if a.loss == "grpo" and not a.kl_weight and c.sync.reference != "never":
        broken.append(
            f"sync.reference needs a loss that looks at the reference; found {c.sync.reference!r} with algorithm.kl_weight "
            f"= 0: set sync.reference = 'never'"
        )
    if a.loss != "group_dpo" and a.alpha:
        broken.append(
            f"algorithm.alpha adds GRPO to algorithm.loss = 'group_dpo'; found {a.alpha} with {a.loss!r}: set alpha to 0, or "
            f"the loss to 'group_dpo'"
        )
    if a.loss != "dpo" and a.pairing != "random":
        broken.append(
            f"algorithm.pairing chooses the one pair of algorithm.loss = 'dpo'; found {a.pairing!r} with {a.loss!r}: leave "
            f"it at 'random'"
        )
    if not a.uses_advantages and (a.normalize_length or a.normalize_advantages != "mean"):
        broken.append(
            f"algorithm.normalize_advantages and algorithm.normalize_length are GRPO's; found {a.normalize_advantages!r} and "
            f"{a.normalize_length} with {a.loss!r}: leave them at 'mean' and false"
        )
    if a.entropy_weight and c.trainer.fused_lm_head:
        broken.append(
            f"algorithm.entropy_weight needs the logits, which trainer.fused_lm_head never makes; found {a.entropy_weight} "
            f"and true: set trainer.fused_lm_head to false"
        )
    return broken


def _broken_rollout_rules(c: RunConfig) -> list[str]:
    """The same for what only a run with rollouts needs; supervised training has no samples and no pairs."""
    broken = []
    longest = c.data.max_prompt_tokens + c.sampling.max_tokens
    if longest > c.inference.max_model_tokens:
        broken.append(
            f"data.max_prompt_tokens + sampling.max_tokens must fit inference.max_model_tokens; found "
            f"{c.data.max_prompt_tokens} + {c.sampling.max_tokens} > {c.inference.max_model_tokens}: raise it to {longest}"
        )
    if longest > c.trainer.microbatch_tokens:
        broken.append(
            f"trainer.microbatch_tokens must hold one sequence at full length; found {c.trainer.microbatch_tokens} < "
            f"{longest}: raise it, or lower sampling.max_tokens"
        )
    return broken


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a TOML file, applies `section.key=value` overrides (values as TOML, bare words as strings), validates.

    Raises ConfigError in one sentence that names key, rule, value and fix.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not TOML: {error}; mend that line") from error
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error, tree)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"override {override!r} must read section.key=value, such as sync.sync_interval=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section = tree.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(f"override {override!r}: {parts[0]} is not a section; see `semion check` for the sections")
    section[parts[1]] = value


def _sentence(error: ValidationError, tree: dict[str, Any]) -> str:
    """The first complaint of pydantic as one sentence with key, rule, value and fix."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if str(part) not in ("int", "constrained-int") and "[" not in str(part)]
    key = ".".join(location[:2]) or "configuration"
    if first["type"] == "extra_forbidden":
        names = sorted(_known_keys(location[:-1]))
        return f"{key} is not an option; found {first['input']!r}: the options there are {', '.join(names)}"
    if first["type"] == "missing" and len(location) == 1:
        return f"section [{key}] is required and missing: add it to the file"
    if first["type"] == "missing":
        return f"{key} is required and missing: set it in the file or as {key}=..."
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    rules = "; or ".join(
        dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in error.errors() if e["loc"][:2] == first["loc"][:2])
    )
    return f"{key}: {rules}; found {first['input']!r}: change the value ({_description(location)})"


def _known_keys(location: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        model = RunConfig.model_fields[part].annotation  # type: ignore[assignment]
    return list(model.model_fields)


def _description(location: list[str]) -> str:
    section = RunConfig.model_fields[location[0]].annotation
    if len(location) < 2 or section is None or location[1] not in section.model_fields:
        return f"section [{location[0]}]"
    return section.model_fields[location[1]].description or f"see section [{location[0]}]"


def dump_config(config: RunConfig) -> str:
    """The resolved tree as TOML that `load_config` reads back to an equal configuration."""
    lines = []
    for name, section in config.model_dump().items():
        lines.append(f"[{name}]")
        lines += [f"# {key} is unset" if value is None else f"{key} = {_toml(value)}" for key, value in section.items()]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
