"""The values of a first configuration, section by section, each with its reason: the paper's for what it published, and what
fits the model and the machine for the rest. It chooses no layout and reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from engine.config.options import LOSSES
from engine.models.base import ModelShape

PROMPT_TOKENS, RESPONSE_TOKENS, GRADED_TOKENS = 1024, 2048, 1024  # at most; responses as the paper, graded ones too
TABLE = "the paper, Table 4"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a person wants and has."""

    model: str
    train: str
    held_out: str | None = None
    columns: Mapping[str, str] | None = None
    gpus_per_node: int = 0  # 0: CPUs
    nodes: int = 1
    gpu_gibibytes: float = 139.0
    loss: str = "dpo"  # a name that the losses are registered by
    interval: int | Literal["never"] = 10
    reward: str = "math"  # or 'model', or a function as path/to/file.py:name
    reward_model: str | None = None
    directory: str = "runs/first"


@dataclass(frozen=True, slots=True)
class Found:
    """What the files say."""

    shape: ModelShape
    reward_shape: ModelShape | None
    has_chat_template: bool
    num_rows: int  # that were looked at
    is_whole: bool  # whether they are all
    longest_prompt: int  # tokens, of those


class Value(NamedTuple):
    """A value and why it is that, or its unit."""

    value: Any
    why: str


Values = dict[str, dict[str, Value]]  # by section and option


@dataclass(frozen=True, slots=True)
class Layout:
    """Trainer ranks and engines on a machine, and what a step does to fit."""

    placement: Literal["colocated", "disaggregated"]
    trainer_tp: int
    data_parallel: int
    engines: int
    engine_tp: int
    savings: Mapping[str, Any]

    @property
    def trainer_gpus(self) -> int:
        """GPUs of the trainer."""
        return self.trainer_tp * self.data_parallel


def values_of(wishes: Wishes, found: Found, layout: Layout | None) -> Values:
    """Every value that is set; without a layout those of one trainer rank and one engine on CPUs."""
    prompt, response = lengths(wishes, found)
    every = _every(wishes)
    values = {
        "run": _run(wishes, found),
        "model": _model(wishes, layout),
        "data": _data(wishes, found, prompt),
        "algorithm": _algorithm(wishes),
        "sync": _sync(wishes),
        "sampling": {
            "temperature": Value(1.0, "the paper"),
            "top_p": Value(1.0, "the paper"),
            "max_tokens": Value(response, _length_reason(wishes, found, response)),
        },
        "trainer": _trainer(wishes, layout, prompt + response),
        "optimizer": _optimizer(wishes, layout),
        "inference": _inference(layout, prompt + response),
    }
    if wishes.reward_model is not None:
        values["reward_model"] = {
            "path": Value(wishes.reward_model, "a Llama with a `score` head, or with Athene's `v_head`"),
            "dtype": Value("bfloat16" if layout else "float32", "half the memory" if layout else "for CPUs"),
        }
    elif wishes.reward != "math":
        values["rewards"] = {"workers": Value(4, "processes that judge beside each other: raise it for slow functions")}
    saved = "optimizer steps; what a restart or a preemption may cost"
    values["checkpoint"] = {"every": Value(every, f"{saved}; a multiple of sync_interval")}
    if wishes.held_out:
        best = "length_normalized_reward" if wishes.reward == "model" else "reward"
        values["checkpoint"]["best_by"] = Value(best, "keeps the checkpoint of the best held-out score too")
        values["evaluation"] = {
            "samples": Value(4, "completions of each problem; the paper's figures are of 50"),
            "temperature": Value(0.6, "the paper"),
            "top_p": Value(0.9, "the paper"),
            "every": Value(every, "optimizer steps, as checkpoints: each is judged"),
            "max_problems": Value(500, "problems of the file at each evaluation: a standard error of about 2 %"),
        }
    if layout is not None:
        values["cluster"] = {
            "nodes": Value(wishes.nodes, "machines" if wishes.nodes == 1 else "machines: start it by tools/slurm/train.sbatch"),
            "gpus_per_node": Value(wishes.gpus_per_node, "GPUs of each"),
        }
    return values


def lengths(wishes: Wishes, found: Found) -> tuple[int, int]:
    """(longest prompt, longest response) in tokens: the paper's, or what the model has positions for."""
    positions = found.shape.max_positions
    wanted = max(positions // 3, -(-found.longest_prompt // 32) * 32)  # also what a short model's data need
    prompt = min(PROMPT_TOKENS, wanted, positions * 3 // 4)
    return prompt, min(_response(wishes), positions - prompt)


def _response(wishes: Wishes) -> int:
    return GRADED_TOKENS if wishes.reward == "model" else RESPONSE_TOKENS


def _length_reason(wishes: Wishes, found: Found, response: int) -> str:
    if response < _response(wishes):
        return f"tokens; what the model's {found.shape.max_positions} positions leave (the paper: {_response(wishes)})"
    return f"tokens; {TABLE}"


def template_of(wishes: Wishes) -> str:
    """data.template: the paper's for Math-Verify, which reads a box, and for a reward model; bare for a function."""
    return {"math": "figure4", "model": "figure5"}.get(wishes.reward, "{problem}")


def _every(wishes: Wishes) -> int:
    """Steps between checkpoints: about a hundred, and a multiple of the interval."""
    interval = 1 if wishes.interval == "never" else wishes.interval
    return interval * max(1, round(100 / interval))


def _run(wishes: Wishes, found: Found) -> dict[str, Value]:
    steps = max(1000, 2 * _every(wishes))
    rows = f"{found.num_rows} rows" if found.is_whole else f"more than {found.num_rows} rows"
    return {
        "directory": Value(wishes.directory, "new for each run"),
        "steps": Value(steps, f"optimizer steps; ours: the paper trains for thousands. The file has {rows}"),
    }


def _model(wishes: Wishes, layout: Layout | None) -> dict[str, Value]:
    why = "what GPUs compute in; the optimizer keeps float32 originals" if layout else "CPUs compute bfloat16 slowly"
    return {
        "path": Value(wishes.model, "the seed model's folder"),
        "dtype": Value("bfloat16" if layout else "float32", why),
    }


def _data(wishes: Wishes, found: Found, prompt: int) -> dict[str, Value]:
    template = template_of(wishes)
    data = {"train": Value(wishes.train, "relative to where the command is started")}
    if wishes.held_out:
        data["held_out"] = Value(wishes.held_out, "never trained on")
    if wishes.columns:
        data["columns"] = Value(dict(wishes.columns), "what the file's columns are called")
    why = "the paper's words, which ask for \\boxed{}" if template == "figure4" else "the problem alone is the user's message"
    data["template"] = Value(template, why)
    if not found.has_chat_template:
        data["chat_template"] = Value("none", "the tokenizer has none: prompts are bare text, as for a base model")
    judge = "Math-Verify" if wishes.reward == "math" else "the reward model" if wishes.reward == "model" else "yours"
    data["reward"] = Value(wishes.reward, judge)
    data["prompts_per_step"] = Value(32 if wishes.reward == "model" else 64, f"prompts; {TABLE}")
    longest = f"tokens; the longest of {found.num_rows} rows looked at has {found.longest_prompt}"
    data["max_prompt_tokens"] = Value(prompt, longest)
    return data


def _algorithm(wishes: Wishes) -> dict[str, Value]:
    options = {"loss": Value(wishes.loss, f"one of {', '.join(LOSSES.names)}")}
    if makes_pairs(wishes.loss):
        options["beta"] = Value(0.01 if wishes.reward == "model" else 0.1, TABLE)
        options["samples_per_prompt"] = Value(8, "completions; ours, the paper does not say for DPO")
        return options
    if "kl_weight" in LOSSES.load(wishes.loss).Options.model_fields:
        of_grpo = TABLE if wishes.loss == "grpo" else f"{TABLE}, of GRPO"
        options["kl_weight"] = Value(0.001, of_grpo)
    best = "completions; the best of 4, 8 and 12 in the paper's Table 5"
    options["samples_per_prompt"] = Value(8, best if wishes.loss == "grpo" else f"{best}, for GRPO")
    return options


def makes_pairs(loss: str) -> bool:
    """Whether it trains on a chosen and a rejected response, as DPO does: then it has DPO's beta."""
    return "beta" in LOSSES.load(loss).Options.model_fields


def _sync(wishes: Wishes) -> dict[str, Value]:
    regime = {"never": "offline: rollouts come from the seed model alone", 1: "online: new weights before every step"}
    why = regime.get(wishes.interval, "s, optimizer steps: semi-online, rollouts of s steps come from one version")
    if wishes.loss == "grpo" and wishes.interval != 1:
        why += "; the paper has GRPO with 1 alone"
    follows = makes_pairs(wishes.loss) and wishes.interval != "never" and wishes.reward != "model"
    return {
        "sync_interval": Value(wishes.interval, why),
        "reference": Value("follow" if follows else "never", _about_reference(wishes.loss)),
    }


def _about_reference(loss: str) -> str:
    found = f"{TABLE}, 'Ref model sync'"
    if makes_pairs(loss) or loss == "grpo":
        return found
    return f"{found}, of GRPO" if "kl_weight" in LOSSES.load(loss).Options.model_fields else "this loss looks at none"


def _trainer(wishes: Wishes, layout: Layout | None, longest: int) -> dict[str, Value]:
    rows = 2 if layout is not None and makes_pairs(wishes.loss) else 1
    pair = "one pair at full length" if rows == 2 else "one sequence at full length"
    tokens = -(-rows * longest // 128) * 128
    if layout is None:
        return {"microbatch_tokens": Value(tokens, f"tokens; {pair}")}
    tp, dp = layout.trainer_tp, layout.data_parallel
    whole = "each rank has the whole model: only gradients and weights travel"
    options = {
        "tensor_parallel": Value(tp, whole if tp == 1 else f"ranks: what is needed for it to fit {wishes.gpu_gibibytes:g} GiB"),
        "data_parallel": Value(dp, "replicas that share each batch"),
        "microbatch_tokens": Value(tokens, f"tokens; {pair}"),
        "layers": Value("transformer_engine", "Transformer Engine's kernels"),
    }
    if tp > 1:
        options["sequence_parallel"] = Value(True, "tensor-parallel ranks share the activations too")
    if dp > 1 or "moment_dtype" in layout.savings or "offload_share" in layout.savings:
        options["distributed_optimizer"] = Value(True, f"1/{dp} of the optimizer's state on each rank")
    if "recompute" in layout.savings:
        options["recompute"] = Value(True, "without it activations do not fit; costs about a third of a step's time")
    if "fused_lm_head" in layout.savings:
        options["fused_lm_head"] = Value(True, "logits a few rows at a time: they do not fit whole")
    return options


def _optimizer(wishes: Wishes, layout: Layout | None) -> dict[str, Value]:
    judged = wishes.reward == "model"
    options = {
        "learning_rate": Value(1e-6, TABLE),
        "eps": Value(1e-8 if judged else 1e-4, f"AdamW's epsilon; {TABLE}"),
        "weight_decay": Value(0.1, "as the paper's public code"),
        "clip_norm": Value(0.1 if judged else 1.0, f"largest norm of the gradient; {TABLE}"),
    }
    if layout is not None:
        options["implementation"] = Value("te", "Transformer Engine's AdamW")
        if "moment_dtype" in layout.savings:
            options["moment_dtype"] = Value("bfloat16", "in float32 the moments do not fit")
        if "offload_share" in layout.savings:
            options["offload_share"] = Value(1.0, "its state, kept in the host's memory: it does not fit the GPUs, and is slow")
    return options


def _inference(layout: Layout | None, longest: int) -> dict[str, Value]:
    options = {
        "engines": Value(layout.engines if layout else 1, "each with the whole model"),
        "max_model_tokens": Value(longest, "tokens; data.max_prompt_tokens + sampling.max_tokens"),
        "kv_cache": Value("auto", "what max_concurrent requests at full length need, or what the device has left"),
    }
    if layout is not None:
        turns = "engines take turns with the trainer on its GPUs"
        apart = "engines have GPUs of their own and sample while the trainer trains"
        options["placement"] = Value(layout.placement, turns if layout.placement == "colocated" else apart)
        if layout.engine_tp > 1:
            options["tensor_parallel"] = Value(layout.engine_tp, "ranks of an engine: what is needed for it to fit")
    return options
