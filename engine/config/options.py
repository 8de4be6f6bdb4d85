"""Every option of the engine and its default, one class for each table of a configuration file. Rules across tables are
in engine/config/rules.py and the two files it names, reading and writing files in load.py; no default hides in another package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from engine.core.errors import ConfigError, SemionError
from engine.core.registry import Registry

MOST = 2**31 - 1  # what no count of anything exceeds, and every library can hold


@dataclass(frozen=True, slots=True)
class Unit:
    """What the number of an option counts or is measured in; every option that is a number has one."""

    name: str


def _held(number: int) -> int:
    """The number, where every library can hold it."""
    if number > MOST:
        raise PydanticCustomError("too_large", "input should be at most {most}", {"most": MOST})
    return number


PURE = Unit("no unit")  # a number that is compared with nothing
Positive = Annotated[int, Field(gt=0), AfterValidator(_held)]
NonNegative = Annotated[int, Field(ge=0), AfterValidator(_held)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Steps = Annotated[Positive, Unit("optimizer steps")]
StepsOrNone = Annotated[NonNegative, Unit("optimizer steps")]
Tokens = Annotated[Positive, Unit("tokens")]
Prompts = Annotated[Positive, Unit("prompts")]
Ranks = Annotated[Positive, Unit("ranks")]
Layers = Annotated[Positive, Unit("layers")]
Mebibytes = Annotated[Positive, Unit("MiB")]
Seconds = Annotated[PositiveFloat, Unit("seconds")]
Factor = Annotated[PositiveFloat, PURE]
Weight = Annotated[NonNegativeFloat, PURE]
Temperature = Annotated[NonNegativeFloat, PURE]
Probability = Annotated[float, Field(gt=0, le=1), Unit("of 1")]
Share = Annotated[float, Field(ge=0, le=1), Unit("of 1")]
Decay = Annotated[float, Field(gt=0, lt=1), PURE]  # of a running mean: at 1 it would never take anything in
BestBy = Literal["reward", "length_normalized_reward"]


class Section(BaseModel):
    """A table of the file: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Run(Section):
    """What the run is called, how long it is, and its one source of randomness."""

    directory: str = Field(description="new folder for checkpoints, metrics, rollouts, logs and the summary")
    seed: Annotated[NonNegative, PURE] = Field(0, description="of sampling, of the order of prompts and of random pairs")
    steps: Annotated[int, Field(gt=0, le=1_000_000), Unit("optimizer steps")] = Field(
        description="optimizer steps in all: updates of the weights"
    )
    restarts: Annotated[NonNegative, Unit("attempts")] = Field(
        3, description="to go on after a lost process, in a row without a new checkpoint; 0: none"
    )
    on_lost_node: Literal["wait", "shrink"] = Field(
        "wait",
        description="where a node is lost and no spare is there: wait for one until trainer.timeout_seconds, or go on from the "
        "newest checkpoint on the nodes left, with fewer data-parallel replicas or engines, which is not bit for bit",
    )
    sinks: tuple[str, ...] = Field(
        ("tensorboard",),
        strict=False,
        description="other programs that are told of the run: 'tensorboard', 'wandb', 'mlflow', or your own Sink as "
        "path/to/file.py:Name",
    )


class Model(Section):
    """The seed model."""

    path: str = Field(description="folder of a Hugging Face checkpoint with its tokenizer")
    family: str = Field(
        "auto", description="'llama', 'qwen3', or your own Family as path/to/file.py:Name; 'auto': by model_type in config.json"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of weights and products, of trainer and engines; bfloat16 is for GPUs"
    )
    head: Literal["model", "float32"] = Field(
        "model", description="type of the output layer's products and logits, of trainer and engines; 'model': model.dtype"
    )


Column = Literal["problem", "answer", "solution", "chosen", "rejected", "source", "id"]  # what a row may have


class Source(Section):
    """Prompts to train on, problems held out, and what judges their answers."""

    train: str = Field(
        description="JSONL or parquet file (or JSON, CSV, .gz), dataset folder, or hf://owner/name[:config][:split]"
    )
    held_out: str | None = Field(None, description="the same of problems that are never trained on; unset: no evaluation")
    template: str = Field(
        "figure4",
        description="what the user's message says: 'figure4' (the paper's, asks for \\boxed{}), 'figure5' (the problem alone), "
        "or a text with {problem} in it",
    )
    system: str = Field("", description="system message before every prompt; a conversation keeps its own")
    columns: dict[Column, str] | None = Field(
        None, description="what a file's columns are called, as answer = 'reward_model.ground_truth'; unset: by the usual names"
    )
    reward: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        "math", description="'math', 'model', 'function', your own as path/to/file.py:name, or a list of them"
    )
    reward_weights: tuple[Annotated[float, PURE], ...] | None = Field(
        None, strict=False, description="one for each reward of a list; unset: 1 each"
    )
    reward_combine: str = Field(
        "sum", description="how several rewards become one: 'sum', 'product', 'min', or path/to/file.py:name"
    )
    prompts_per_step: Prompts = Field(64, description="batch of one optimizer step; each is answered samples_per_prompt times")
    spare_prompts: Annotated[NonNegative, Unit("prompts")] = Field(
        0, description="sampled each step in addition, to fill the places of those without signal"
    )

    @property
    def rewards(self) -> tuple[str, ...]:
        """The names of what judges, one or several."""
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    @property
    def judge(self) -> str:
        """What the source's prompts call it: the reward's name, or of several (or weighted) ones how they are combined."""
        weights = self.reward_weights or (1.0,) * len(self.rewards)
        named = [name if weight == 1 else f"{weight:g}*{name}" for name, weight in zip(self.rewards, weights, strict=True)]
        return named[0] if len(named) == 1 else f"{self.reward_combine}({', '.join(named)})"


class Data(Source):
    """The first source of prompts, and further ones that every batch holds in exact proportion."""

    mix: tuple[Source, ...] = Field((), strict=False, description="[[data.mix]]: further sources, each with the options above")
    max_prompt_tokens: Tokens = Field(
        1024, description="longest prompt that is trained on; longer ones are left out and counted"
    )
    chat_template: str = Field("tokenizer", description="'tokenizer', 'none' (bare text, for a base model), or a Jinja file")
    replay: str | None = Field(
        None, description="a run's rollouts (its folder rollouts/, or a .jsonl file) or a preference file to train on instead"
    )

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources, the section's own first."""
        return (self, *self.mix)

    @property
    def files(self) -> dict[str, str]:
        """Every file or dataset that a run reads, by the option that names it."""
        named: list[tuple[str, str | None]] = [
            (f"{source_key(place)}.{name}", getattr(source, name))
            for place, source in enumerate(self.sources)
            for name in ("train", "held_out")
        ]
        template = self.chat_template if self.chat_template not in ("tokenizer", "none") else None
        named += [("data.replay", self.replay), ("data.chat_template", template)]
        return {key: path for key, path in named if path is not None}


def source_key(place: int) -> str:
    """What a source's options are called: data.*, or of a further one data.mix[0].* and on."""
    return f"data.mix[{place - 1}]" if place else "data"


# The losses by name, one file each; named by text, since what computes them stands above the configuration.
LOSSES: Registry[Any] = Registry(
    "algorithm.loss",
    "engine.algorithms",
    "engine.algorithms.base:Algorithm",
    support={"advantages", "entropy", "group", "nll", "off_policy", "pairs", "policy_gradient", "registry"},
)
DEFAULT_LOSS = "dpo"


def one_of(option: str, *names: str) -> AfterValidator:
    """Accepts one of our parts by name, or a user's own by where it stands."""

    def check(name: str) -> str:
        if name not in names and ":" not in name:
            raise ValueError(
                f"{option} must be one of {', '.join(names)}, or your own as path/to/file.py:Name or package.module:Name; "
                f"found {name!r}: choose one"
            )
        return name

    return AfterValidator(check)


Pairing = Annotated[str, one_of("algorithm.pairing", "random", "best_worst", "length_matched")]
Normalization = Annotated[str, one_of("algorithm.normalize_advantages", "mean", "mean_std", "leave_one_out", "batch_std")]


class AlgorithmOptions(Section):
    """What every loss has. Each loss adds options of its own, in its file of engine/algorithms."""

    loss: str = Field(
        DEFAULT_LOSS, description="'dpo', 'group_dpo', 'grpo', 'cispo', 'oapl', or your own as path/to/file.py:Name"
    )
    samples_per_prompt: Annotated[int, Field(ge=2), Unit("completions")] = Field(
        8, description="group size: completions sampled of each prompt (TRL: num_generations)"
    )
    entropy_weight: Weight = Field(
        0.0, description="of minus the mean next-token entropy over a response, added to the loss (verl: entropy_coeff)"
    )
    reduction: Literal["prompts", "pairs", "tokens"] = Field(
        "prompts", description="what the step's loss is divided by: its prompts, those that are compared, or target tokens"
    )

    @property
    def uses_ratios(self) -> bool:
        """Whether the loss weighs the policy's probabilities against those that sampled the tokens. All its log-probs are then
        of the distribution that was sampled: at sampling.temperature, for policy, rollouts and reference alike."""
        return True


def options_class(values: Mapping[str, Any]) -> type[AlgorithmOptions]:
    """The options of the loss that an [algorithm] table names."""
    name = values.get("loss", DEFAULT_LOSS)
    if not isinstance(name, str):
        return AlgorithmOptions
    loss = LOSSES.load(name)
    if ":" in name:
        _require_options(loss, name)
    found: type[AlgorithmOptions] = loss.Options
    return found


def _require_options(loss: Any, name: str) -> None:
    """ConfigError where a user's loss declares Options that the engine cannot read an [algorithm] table with."""
    found = loss.Options
    for base in loss.__mro__[1:]:
        wanted = vars(base).get("Options")
        if wanted is not None and not (isinstance(found, type) and issubclass(found, wanted)):
            raise ConfigError(
                f"algorithm.loss = {name!r} must have Options that extend {wanted.__name__}, since it extends "
                f"{base.__name__}; found {found!r}: extend {wanted.__module__}.{wanted.__name__}"
            )
    if any("loss" in vars(base).get("__annotations__", {}) for base in found.__mro__ if base is not AlgorithmOptions):
        raise ConfigError(
            f"algorithm.loss = {name!r} must leave the option `loss` of its Options as it is, which names the class; found it "
            f"defined anew in {found.__name__}: give your option another name"
        )


def _of_its_loss(values: Any, info: ValidationInfo) -> Any:
    """Reads the [algorithm] table with the class of its loss. ValidationError tells all that is wrong, also each option that
    only another loss has."""
    if not isinstance(values, dict):
        return values
    name = values.get("loss", DEFAULT_LOSS)
    try:
        options = options_class(values)
    except ConfigError as error:
        raise _complaints(_complaint("loss", name, str(error))) from error
    if not isinstance(name, str):
        return options.model_validate({"loss": name})
    others = _options_of_other_losses(values, options)
    own = {key: value for key, value in values.items() if key not in others}
    try:
        read = options.model_validate_json(json.dumps(own)) if info.mode == "json" else options.model_validate(own)
    except ValidationError as error:
        if not others:
            raise
        found = [_complaint(e["loc"], e["input"], e["msg"], e["type"]) for e in error.errors()]
        raise _complaints(*others.values(), *found) from error
    except SemionError:
        raise
    except Exception as error:  # of a validator of the user's
        text = f"algorithm.loss = {name!r} must read its Options; found that they fail with {error!r}: mend {options.__name__}"
        raise _complaints(_complaint("loss", name, text)) from error
    if others:
        raise _complaints(*others.values())
    return read


def _options_of_other_losses(values: Mapping[str, Any], options: type[AlgorithmOptions]) -> dict[str, InitErrorDetails]:
    """A complaint for each option of the table that its loss has not and another one has."""
    found = {}
    for key in values:
        losses = [] if key in options.model_fields else [name for name in LOSSES.names if key in _fields_of(name)]
        if losses:
            sentence = (
                f"algorithm.{key} is an option of algorithm.loss = {' and '.join(map(repr, losses))}; found {values[key]!r} "
                f"with {values.get('loss', DEFAULT_LOSS)!r}: remove it, or choose another loss"
            )
            found[key] = _complaint(key, values[key], sentence)
    return found


def _fields_of(loss: str) -> Collection[str]:
    found: Collection[str] = LOSSES.load(loss).Options.model_fields
    return found


def _complaint(place: str | tuple[int | str, ...], value: Any, text: str, kind: str = "value_error") -> InitErrorDetails:
    """As pydantic collects them; `kind` is its word for what is wrong."""
    error = PydanticCustomError(kind, "{text}", {"text": text})
    return InitErrorDetails(type=error, loc=place if isinstance(place, tuple) else (place,), input=value)


def _complaints(*found: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("algorithm", list(found))


Algorithm = Annotated[SerializeAsAny[AlgorithmOptions], BeforeValidator(_of_its_loss)]

SYNC_ATTEMPTS = 3  # of one weight sync: a fault that outlives two repetitions is no accident


class Sync(Section):
    """The regime: how often the generator and the reference take the policy's weights."""

    sync_interval: Steps | Literal["never", "auto"] = Field(
        1,
        description="s, between two weight syncs: 1 online, k semi-online, 'never' offline; 'auto': as many as measured drift "
        "allows, decided at every sync",
    )
    auto_metric: Literal["log_prob_gap_mean", "ess_share"] = Field(
        "log_prob_gap_mean", description="with sync_interval = 'auto': the metric of a step that drift is measured by"
    )
    auto_bound: Factor | None = Field(
        None,
        description="with sync_interval = 'auto', which needs it: log_prob_gap_mean is to be at most this, or ess_share at "
        "least, up to the last step of an interval",
    )
    auto_most: Steps = Field(16, description="with sync_interval = 'auto': the largest s")
    reference: Steps | Literal["never", "follow"] = Field(
        "never",
        description="when the reference takes the policy's weights: 'never', 'follow' (at every weight sync), or every N",
    )
    reference_mix: Annotated[float, Field(gt=0, le=1), Unit("of 1")] = Field(
        1.0,
        description="of the policy in the reference when that takes its weights: 1 copies them; less leaves the rest as it "
        "was, with reference = 1 a running mean (TR-DPO; TRL: ref_model_mixup_alpha, ref_model_sync_steps)",
    )
    reference_log_probs: Literal["computed", "rollouts"] = Field(
        "computed",
        description="'rollouts': take those that the rollouts were sampled with, where the same weights are the reference: no "
        "pass and no second copy, but the engine's rounding in place of the trainer's",
    )
    semantics: str = Field(
        "paper",
        description="which steps sync: 'paper', 'fairseq2' (the paper's public code, which counts steps from 1: syncs at 0, "
        "s - 1, 2s - 1, ...), or your own Schedule as path/to/file.py:Name",
    )
    lookahead: Annotated[NonNegative, Unit("sync intervals")] = Field(
        0,
        description="L, sampled ahead: engines sample while the trainer trains, from the weights of L syncs before, so that "
        "answers are L * s to (L + 1) * s - 1 steps old; 0: the paper's",
    )
    in_flight: bool = Field(
        False,
        description="in-flight weight updates, with lookahead >= 2: a sync waits only for the answers that are trained next; "
        "engines pause the others and go on with them from the new weights, so that each token has its own version",
    )
    streaming: bool = Field(
        False,
        description="with sync_interval = 1 and lookahead = 0: compute the gradients of groups that are complete while engines "
        "still sample the rest of the step; the step is the same but for the order of sums",
    )
    bucket_mebibytes: Mebibytes = Field(64, description="weights sent in one message, and gathered together for a save")
    transport: str = Field(
        "auto",
        description="'gloo', 'nccl', 'ipc' (one machine's memory), or your own Transport as path/to/file.py:Name; 'auto': ipc "
        "on one machine's CPU and where colocated, else NCCL or gloo",
    )
    timeout_seconds: Seconds = Field(120.0, description="longest attempt at a weight sync; there are three")


LEAST_TEMPERATURE = 0.01  # vLLM samples at this where less is asked for, and greedily at 0


class Sampling(Section):
    """How an engine samples rollouts."""

    temperature: Temperature = Field(
        1.0, description="of rollouts, at least 0.01; below 1 sharper than the model's own distribution"
    )
    top_p: Probability = Field(1.0, description="only the likeliest tokens that make up this share are sampled; 1 with ratios")
    top_k: Annotated[NonNegative, Unit("tokens")] = Field(
        0, description="only so many of the likeliest tokens are sampled; 0: all, which ratios need"
    )
    min_p: Share = Field(
        0.0,
        description="only tokens at least this share as likely as the likeliest are sampled; 0: all, which ratios need",
    )
    stop: tuple[Annotated[str, Field(min_length=1)] | Annotated[NonNegative, Unit("token ids")], ...] = Field(
        (),
        strict=False,
        description="texts and token ids that end an answer, of rollouts and held-out ones, beside the model's end tokens; "
        "what ends it stays in it",
    )
    max_tokens: Tokens = Field(2048, description="longest completion; what is longer is cut off there")
    truncated: Literal["judge", "wrong", "leave_out"] = Field(
        "judge",
        description="a response cut off at max_tokens: judged as any other (as the paper's public code does), wrong "
        "whatever it says, or left out of its group",
    )
    overlong_buffer: Annotated[NonNegative, Unit("tokens")] = Field(
        0, description="last tokens before max_tokens over which the reward falls linearly by overlong_penalty (DAPO); 0: none"
    )
    overlong_penalty: Annotated[PositiveFloat, Unit("of the reward")] = Field(
        1.0, description="taken from the reward at max_tokens, with overlong_buffer"
    )


FP8_ROWS = {"none": 1, "delayed": 16, "current": 16, "blockwise": 128}  # rows of a matrix that FP8 products ask for


class Trainer(Section):
    """Layout of the policy over trainer ranks: world size = tensor * pipeline * data."""

    tensor_parallel: Ranks = Field(1, description="that share every matrix; inside one node")
    pipeline_parallel: Annotated[Positive, Unit("stages")] = Field(1, description="that share the layers, one after another")
    virtual_pipeline: Annotated[Positive, Unit("chunks")] = Field(1, description="of the model in each pipeline stage")
    first_stage_layers: Layers | None = Field(None, description="of the first stage; unset: as the others")
    last_stage_layers: Layers | None = Field(None, description="of the last stage; unset: as the others")
    data_parallel: Annotated[Positive, Unit("replicas")] = Field(1, description="of the policy, which share each batch")
    sequence_parallel: bool = Field(
        False, description="tensor-parallel ranks share the tokens between the matrices; needs tensor_parallel > 1"
    )
    distributed_optimizer: bool = Field(
        False, description="data-parallel ranks share the optimizer's state; saves memory with data_parallel > 1"
    )
    recompute: bool = Field(False, description="recompute activations in the backward, layer by layer")
    fused_lm_head: bool = Field(False, description="log-probs from hidden states, a few rows of logits at a time")
    microbatch_tokens: Tokens = Field(
        8192, description="packed into one forward and backward at most; larger groups are spread"
    )
    share_prompts: Literal["auto"] | bool = Field(
        "auto",
        description="compute a prompt once for all its samples in a microbatch; 'auto': with layers = 'local', whose attention "
        "can do it",
    )
    threads: Annotated[Positive, Unit("CPU threads")] = Field(
        1,
        description="of one rank: of all that it computes on CPUs, and on GPUs of AdamW with optimizer.offload_share; another "
        "number may round sums otherwise",
    )
    timeout_seconds: Seconds = Field(600.0, description="longest wait of a trainer rank for another")
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        "auto",
        description="megatron-core's own ('local'), or Transformer Engine's, which are faster on GPUs and need bfloat16; "
        "'auto': these on GPUs with model.dtype = 'bfloat16', else local",
    )
    fp8: Literal["none", "delayed", "current", "blockwise"] = Field(
        "none", description="scaling of FP8 products, with layers = 'transformer_engine'; none: no FP8"
    )
    fp8_parameters: bool = Field(False, description="the layers' matrices kept and gathered in FP8 alone")
    overlap_tensor_parallel: bool = Field(False, description="Transformer Engine's overlap of products and communication")
    fuse_gradient_accumulation: Literal["auto"] | bool = Field(
        "auto",
        description="the product itself adds a weight's gradient to the sum over microbatches, unrounded; 'auto': on GPUs",
    )
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="in which gradients are summed over microbatches and data-parallel ranks; bfloat16 halves their memory and "
        "traffic, and rounds every sum",
    )
    overlap_gradients: bool = Field(
        False, description="data-parallel ranks sum gradients while the last backward of a step still runs"
    )
    deterministic: bool = Field(
        False,
        description="GPUs add in one order, so that equal runs have equal bits there too; slower. CPUs do so anyway",
    )
    reference_memory: Literal["device", "host"] = Field(
        "device",
        description="where the reference's weights are; host: copied to the device to score a step, with sync.streaming each "
        "part of it, the same bits",
    )

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def uses_te(self) -> bool:
        """Whether layers are Transformer Engine's; of 'auto' it is known only where the run is resolved, on which machine."""
        return self.layers == "transformer_engine"

    @property
    def layer_spec(self) -> Literal["local", "transformer_engine"]:
        """megatron-core's name of the layers' modules."""
        return "transformer_engine" if self.uses_te else "local"

    @property
    def shares_prompts(self) -> bool:
        """Whether rows hold a prompt once for all its samples in them."""
        return not self.uses_te if self.share_prompts == "auto" else self.share_prompts

    @property
    def fuses_accumulation(self) -> bool:
        """Whether products add weight gradients up. Only for a run that is resolved: before, nobody knows what 'auto' is."""
        assert self.fuse_gradient_accumulation != "auto", "trainer.fuse_gradient_accumulation must be settled"
        return self.fuse_gradient_accumulation

    @property
    def row_block(self) -> int:
        """Packed tokens that cannot be cut: sequence-parallel ranks get equal parts, FP8 products whole blocks each."""
        return FP8_ROWS[self.fp8] * (self.tensor_parallel if self.sequence_parallel else 1)

    @property
    def row_multiple(self) -> int:
        """What the length of every packed row is a multiple of; overlap's buffers have one length for all rows."""
        return self.microbatch_tokens if self.overlap_tensor_parallel else self.row_block


class Optimizer(Section):
    """AdamW with linear warm-up to a learning rate that stays or decays."""

    learning_rate: Factor = Field(1e-6, description="the highest, after the warm-up; the paper's is 1e-6")
    warmup_steps: StepsOrNone = Field(0, description="over which the learning rate rises from 0")
    schedule: str = Field(
        "constant",
        description="the learning rate after the warm-up: 'constant', 'linear', 'cosine', or your own LearningRate as "
        "path/to/file.py:Name",
    )
    decay_steps: Steps | None = Field(
        None, description="linear, cosine, which need it: step from which on the rate stays at its floor"
    )
    floor_share: Share = Field(0.0, description="linear, cosine: the floor as a share of learning_rate")
    beta1: Decay = Field(0.9, description="AdamW's decay of the gradient's running mean")
    beta2: Decay = Field(0.95, description="AdamW's decay of the squared gradient's running mean")
    eps: Factor = Field(1e-4, description="AdamW's epsilon; a large one calms DPO (paper: 1e-4 on math, 1e-8 on chat)")
    weight_decay: Weight = Field(0.1, description="AdamW's; times the learning rate at each step")
    clip_norm: Factor = Field(1.0, description="largest norm of the gradient of a step; a longer one is scaled down to it")
    implementation: Literal["torch", "te", "apex"] = Field(
        "torch", description="whose AdamW; te: Transformer Engine's, the fastest on GPUs"
    )
    moment_dtype: Literal["float32", "bfloat16", "fp8"] = Field("float32", description="of both moments, kept by te's AdamW")
    offload_share: Share = Field(0.0, description="of the optimizer's state, kept and updated in the host's memory")
    memory_while_sampling: Literal["device", "host"] = Field(
        "device",
        description="where colocated engines find the optimizer's state while they sample; host: moved there before they wake, "
        "and back for the update, the same bits",
    )


SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(MiB|GiB)")
UNIT_BYTES = {"MiB": 1 << 20, "GiB": 1 << 30}


def size_of(option: str) -> BeforeValidator:
    """Accepts 'auto', or a number with its unit."""

    def check(value: Any) -> str:
        if isinstance(value, str) and (value == "auto" or (SIZE.fullmatch(value) and size_bytes(value))):
            return value
        number = value if isinstance(value, (int, float)) else 24
        raise ValueError(
            f"{option} must be 'auto' or a size with its unit, MiB or GiB, above 0; found {value!r}: write 'auto', or such as "
            f"'{number} MiB' or '{number} GiB'"
        )

    return BeforeValidator(check)


def size_bytes(text: str) -> int | None:
    """The bytes of a size such as "24 GiB"; None for "auto"."""
    if (found := SIZE.fullmatch(text)) is None:
        return None
    return round(float(found[1]) * UNIT_BYTES[found[2]])


BATCHED, CACHED = "max_num_batched_tokens", "kv_cache_dtype"  # of vLLM's arguments those that memory is counted by
BATCHED_TOKENS = 8192  # vLLM runs at least as many together, where the lengths of single requests allow fewer


class Inference(Section):
    """The pool of vLLM engines."""

    engines: Annotated[Positive, Unit("engines")] = Field(1, description="that share the prompts, each with the whole model")
    placement: Literal["disaggregated", "colocated"] = Field(
        "disaggregated", description="engines on devices of their own, or on the trainer's, taking turns with it"
    )
    tensor_parallel: Ranks = Field(1, description="of one engine, which share every matrix")
    max_model_tokens: Tokens = Field(4096, description="prompt and completion together; at least the longest of both")
    max_concurrent: Annotated[Positive, Unit("requests")] = Field(256, description="decoded together in one engine at most")
    kv_cache: Annotated[str, size_of("inference.kv_cache")] = Field(
        "auto",
        description="KV cache of each rank of an engine, as '24 GiB' or '512 MiB'; 'auto': what max_concurrent requests at "
        "full length need, or what the engine's GPU has left (on CPUs at most 1 GiB)",
    )
    threads: Annotated[Positive, Unit("CPU threads")] = Field(1, description="of one engine on CPUs; a GPU engine ignores it")
    packed_weights: bool = Field(False, description="let vLLM repack weights for speed; a sync then reloads full tensors")
    quantization: Literal["none", "fp8"] = Field(
        "none",
        description="'fp8': engines multiply with the layers' matrices in FP8, a scale a row and a token, made anew at each "
        "sync; the trainer's weights stay as they are",
    )
    timeout_seconds: Seconds = Field(600.0, description="longest wait for a step's rollouts, an evaluation or start-up")
    vllm: dict[Annotated[str, Field(pattern=r"^\w+$")], JsonValue] = Field(
        {},
        description="[inference.vllm]: further arguments of the installed vLLM (its EngineArgs), such as enforce_eager, "
        "attention_backend, cudagraph_capture_sizes, kv_cache_dtype or max_num_batched_tokens",
    )

    @property
    def batched_tokens(self) -> int:
        """Tokens of one forward of an engine at most (vLLM's max_num_batched_tokens); a prompt is not cut."""
        asked = self.vllm.get(BATCHED)
        return asked if isinstance(asked, int) else max(BATCHED_TOKENS, self.max_model_tokens)

    @property
    def stored_dtype(self) -> str | None:
        """What the KV cache stores keys and values in, where vLLM was told; None: model.dtype."""
        asked = self.vllm.get(CACHED)
        return asked if isinstance(asked, str) and asked != "auto" else None


class Rewards(Section):
    """The verifier, and the user's own functions, in worker processes."""

    unevaluated: Literal["accept", "refuse"] = Field(
        "accept", description="an expression left to compute, such as 17*23, where a number was asked; the paper accepts"
    )
    function: str | None = Field(None, description="for a reward 'function': path/to/file.py:name or package.module:name")
    weights: dict[str, Annotated[float, PURE]] | None = Field(
        None, description="of the named parts that a function returns, as {format = 0.2}; unset: 1 each"
    )
    environment: tuple[str, ...] = Field((), strict=False, description="variables that functions may see, such as an API key")
    workers: Annotated[Positive, Unit("processes")] | None = Field(
        None,
        description="of each reward on each node; unset: one a core that the others leave, 64 at most, which rewards share",
    )
    concurrency: Annotated[Positive, Unit("answers")] = Field(
        1, description="judged at once in each worker: awaited, or in as many processes"
    )
    deadline_seconds: Seconds = Field(
        2.0,
        description="longest judging of an answer, else a counted timeout: CPU time of 'math', wall-clock time of a function",
    )
    timeout_seconds: Seconds = Field(600.0, description="longest call of the score of a Reward class of your own")
    memory_mebibytes: Mebibytes = Field(3072, description="address space of one worker")


class RewardModel(Section):
    """The model that judges the sources whose reward is 'model', on vLLM engines of its own."""

    path: str | None = Field(None, description="folder of a Llama with a `score` head, or with Athene's `v_head` and CLS token")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of its weights and products")
    max_tokens: Tokens = Field(4096, description="prompt and completion in its chat template; longer ones are not judged")
    kv_cache: Annotated[str, size_of("reward_model.kv_cache")] = Field(
        "auto", description="KV cache of its engine, as '16 GiB' or '512 MiB'; 'auto': what it judges at a time needs"
    )
    engines: Annotated[Positive, Unit("engines")] = Field(
        1, description="that share the answers, each with the whole model on GPUs of its own"
    )
    tensor_parallel: Ranks = Field(
        1, description="of one engine, which share every matrix, inside one node; scores depend on it in their last bits"
    )
    timeout_seconds: Seconds = Field(600.0, description="longest wait for a step's rewards, an evaluation's or start-up")

    @property
    def batched_tokens(self) -> int:
        """Tokens of one forward of its engine at most (vLLM's max_num_batched_tokens); a conversation is not cut."""
        return max(BATCHED_TOKENS, self.max_tokens)

    @property
    def patience_seconds(self) -> float:
        """Longest wait for its rewards: an engine may be lost once and is then asked again. 0 without a reward model."""
        return 2 * self.timeout_seconds if self.path is not None else 0.0


class Checkpoint(Section):
    """When the run's state is committed to disk."""

    every: Steps | Literal["end"] = Field(
        "end",
        description="between two checkpoints; a multiple of sync_interval, with 'auto' at the first sync from there on; 'end': "
        "only one, after the last step",
    )
    keep: Annotated[Positive, Unit("checkpoints")] = Field(2, description="that are kept, the newest ones")
    best_by: BestBy | None = Field(
        None,
        description="keep the best checkpoint too: by accuracy where answers are right or wrong, and by this where they are "
        "graded; unset: not kept",
    )
    on_failure: Literal["end", "continue"] = Field(
        "end",
        description="where a checkpoint cannot be written, as on a full disk: end the run, or tell it and go on to the next "
        "one; the last whole checkpoint stands either way",
    )
    other_layout: Literal["refuse", "allow"] = Field(
        "refuse",
        description="a resume with another split over trainer ranks and engines than the checkpoint's: what follows is "
        "equivalent, not bit for bit the same, for sums have another order",
    )


class Evaluation(Section):
    """Held-out accuracy: the mean over seeds and its standard error."""

    samples: Annotated[Positive, Unit("completions")] = Field(4, description="of each problem, one seed each (the paper: 50)")
    temperature: Temperature = Field(0.6, description="of held-out answers (the paper's 0.6); 0: greedy")
    top_p: Probability = Field(0.9, description="of held-out answers (the paper's 0.9)")
    every: Steps | Literal["ends"] = Field(
        "ends", description="between two evaluations, of the newest weights whatever s is; 'ends': before and after only"
    )
    max_problems: Annotated[Positive, Unit("problems")] | None = Field(
        None, description="of each held-out set, the first ones; unset: all"
    )


class Guard(Section):
    """What is done when entropy or length collapses, rewards explode or are no numbers, no prompt gives a signal, or too many
    rollouts are cut off or not judged. Where nothing is judged at all the run ends, unless action is "off"."""

    action: Literal["off", "warn", "stop"] = Field("warn", description="on a finding: say nothing, say it, or end the run")
    entropy_share: Annotated[PositiveFloat, Unit("of 1")] = Field(
        0.1, description="entropy collapses: 5 steps' mean of it below this share of the first 5 steps'"
    )
    length_share: Annotated[PositiveFloat, Unit("of 1")] = Field(
        0.3, description="length collapses: the same of completion_tokens_mean"
    )
    truncated_share: Probability = Field(0.5, description="told: over 5 steps, more than this share of rollouts is cut off")
    unjudged_share: Probability = Field(0.2, description="told: over 5 steps, more than this share could not be judged")


class Cluster(Section):
    """The machines of the run. More than one: `semion` runs inside a Ray cluster that is already there (tools/slurm)."""

    nodes: Annotated[Positive, Unit("machines")] = Field(1, description="of the run, each with gpus_per_node GPUs")
    gpus_per_node: Annotated[Positive, Unit("GPUs")] = Field(
        8, description="of each machine, where there are any; trainer ranks and engines fill nodes in order"
    )


class RolloutRecords(Section):
    """What is kept of rollouts on disk; nothing of it changes what is trained."""

    rollouts: tuple[Literal["text", "tokens", "log_probs"], ...] = Field(
        ("text", "tokens", "log_probs"),
        strict=False,
        description="kept beside rewards, versions and lengths; to train from them again needs tokens and log_probs",
    )
    keep_steps: Steps | None = Field(
        None, description="the rollouts of so many last steps stay, with up to 64 MiB of older ones; unset: all stay"
    )

    @property
    def text(self) -> bool:
        """Whether what rollouts say is kept."""
        return "text" in self.rollouts

    @property
    def tokens(self) -> bool:
        """Whether their token ids are kept."""
        return "tokens" in self.rollouts

    @property
    def log_probs(self) -> bool:
        """Whether the log-probs of their tokens are kept."""
        return "log_probs" in self.rollouts


class Profile(Section):
    """A profile of a window of steps, by phase; `tools/nsys` sets it."""

    tool: Literal["off", "torch", "nsys"] = Field("off", description="what records: torch's profiler, or Nsight Systems")
    first_step: StepsOrNone = Field(5, description="number of the first step that is profiled, from 0")
    num_steps: Steps = Field(3, description="that are profiled")
    ranks: tuple[Annotated[NonNegative, Unit("rank numbers")], ...] = Field(
        (0,), strict=False, description="trainer ranks that are profiled, from 0"
    )
    engines: tuple[Annotated[NonNegative, Unit("engine numbers")], ...] = Field(
        (0,), strict=False, description="engines that are profiled, from 0"
    )


class Supervised(Section):
    """`semion sft`: NLL on worked solutions."""

    sequences_per_step: Annotated[Positive, Unit("sequences")] = Field(64, description="batch of one optimizer step")
    checkpoint_out: str | None = Field(None, description="folder for the Hugging Face checkpoint; makes the run supervised")


class Options(Section):
    """The whole tree."""

    run: Run
    model: Model
    data: Data
    algorithm: Algorithm = Field(default={}, validate_default=True)
    sync: Sync = Sync()
    sampling: Sampling = Sampling()
    trainer: Trainer = Trainer()
    optimizer: Optimizer = Optimizer()
    inference: Inference = Inference()
    rewards: Rewards = Rewards()
    reward_model: RewardModel = RewardModel()
    checkpoint: Checkpoint = Checkpoint()
    records: RolloutRecords = RolloutRecords()
    evaluation: Evaluation = Evaluation()
    guard: Guard = Guard()
    cluster: Cluster = Cluster()
    profile: Profile = Profile()
    sft: Supervised = Supervised()

    @property
    def uses_engines(self) -> bool:
        """Whether training samples anything: rollouts, unless they are replayed, and held-out answers; nothing where it is
        supervised."""
        held_out = any(source.held_out is not None for source in self.data.sources)
        return self.sft.checkpoint_out is None and (self.data.replay is None or held_out)

    @property
    def may_use_te(self) -> bool:
        """Whether layers are Transformer Engine's, or trainer.layers = 'auto' makes them that on GPUs or where options ask."""
        t = self.trainer
        return t.uses_te or (t.layers == "auto" and self.model.dtype == "bfloat16" and t.share_prompts is not True)

    @property
    def log_prob_temperature(self) -> float:
        """What logits are divided by before any log-prob that the loss sees, in trainer and engines: sampling.temperature for
        a loss that uses ratios; 1, the model's own distribution, for preference losses and supervised training."""
        ratios = self.sft.checkpoint_out is None and self.algorithm.uses_ratios
        return self.sampling.temperature if ratios else 1.0
