"""The values of a first configuration, section by section, each with its reason: the paper's for what it published, and what fits
the model and the machine for the rest. It chooses no layout and reads no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.api.initial import Found, Layout, Value, Values, Wishes

TABLE = "the paper, Table 4"


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
            "temperature": _v(1.0, "the paper"),
            "top_p": _v(1.0, "the paper"),
            "max_tokens": _v(response, _length_reason(wishes, found, response)),
        },
        "trainer": _trainer(wishes, layout, prompt + response),
        "optimizer": _optimizer(wishes, layout),
        "inference": _inference(layout, prompt + response),
    }
    if wishes.reward_model is not None:
        values["reward_model"] = {
            "path": _v(wishes.reward_model, "a Llama with a `score` head, or with Athene's `v_head`"),
            "dtype": _v("bfloat16" if layout else "float32", "half the memory" if layout else "for CPUs"),
        }
    elif wishes.reward != "math":
        values["rewards"] = {"workers": _v(4, "processes that judge beside each other: raise it for slow functions")}
    saved = "optimizer steps; what a restart or a preemption may cost"
    values["checkpoint"] = {"every": _v(every, f"{saved}; a multiple of sync_interval")}
    if wishes.held_out:
        best = "length_normalized_reward" if wishes.reward == "model" else "reward"
        values["checkpoint"]["best_by"] = _v(best, "keeps the checkpoint of the best held-out score too")
        values["evaluation"] = {
            "samples": _v(4, "completions of each problem; the paper's figures are of 50"),
            "temperature": _v(0.6, "the paper"),
            "top_p": _v(0.9, "the paper"),
            "every": _v(every, "optimizer steps, as checkpoints: each is judged"),
            "max_problems": _v(500, "problems of the file at each evaluation: a standard error of about 2 %"),
        }
    if layout is not None:
        values["cluster"] = {
            "nodes": _v(wishes.nodes, "machines" if wishes.nodes == 1 else "machines: start it by tools/slurm/train.sbatch"),
            "gpus_per_node": _v(wishes.gpus_per_node, "GPUs of each"),
        }
    return values


def _v(value: object, why: str) -> Value:
    from engine.api.initial import Value

    return Value(value, why)


def lengths(wishes: Wishes, found: Found) -> tuple[int, int]:
    """(longest prompt, longest response) in tokens: the paper's, or what the model has positions for."""
    from engine.api.initial import PROMPT_TOKENS

    positions = found.shape.max_positions
    prompt = min(PROMPT_TOKENS, positions // 3)
    return prompt, min(1024 if wishes.reward == "model" else 2048, positions - prompt)


def _length_reason(wishes: Wishes, found: Found, response: int) -> str:
    if response < (1024 if wishes.reward == "model" else 2048):
        return f"tokens; what the model's {found.shape.max_positions} positions leave (the paper: 2048)"
    return f"tokens; {TABLE}"


def _every(wishes: Wishes) -> int:
    """Steps between checkpoints: about a hundred, and a multiple of the interval."""
    interval = 1 if wishes.interval == "never" else wishes.interval
    return interval * max(1, round(100 / interval))


def _run(wishes: Wishes, found: Found) -> dict[str, Value]:
    steps = max(1000, 2 * _every(wishes))
    rows = f"{found.num_rows} rows" if found.is_whole else f"more than {found.num_rows} rows"
    return {
        "directory": _v(wishes.directory, "new for each run"),
        "steps": _v(steps, f"optimizer steps; ours: the paper trains for thousands. The file has {rows}"),
    }


def _model(wishes: Wishes, layout: Layout | None) -> dict[str, Value]:
    why = "what GPUs compute in; the optimizer keeps float32 originals" if layout else "CPUs compute bfloat16 slowly"
    return {
        "path": _v(wishes.model, "the seed model's folder"),
        "dtype": _v("bfloat16" if layout else "float32", why),
    }


def _data(wishes: Wishes, found: Found, prompt: int) -> dict[str, Value]:
    from engine.api.initial_values import _v as value

    template = {"math": "figure4", "model": "figure5"}.get(wishes.reward, "{problem}")
    data = {"train": value(wishes.train, "relative to where the command is started")}
    if wishes.held_out:
        data["held_out"] = value(wishes.held_out, "never trained on")
    if wishes.columns:
        data["columns"] = value(dict(wishes.columns), "what the file's columns are called")
    why = "the paper's words, which ask for \\boxed{}" if template == "figure4" else "the problem alone is the user's message"
    data["template"] = value(template, why)
    if not found.has_chat_template:
        data["chat_template"] = value("none", "the tokenizer has none: prompts are bare text, as for a base model")
    judge = "Math-Verify" if wishes.reward == "math" else "the reward model" if wishes.reward == "model" else "yours"
    data["reward"] = value(wishes.reward, judge)
    data["prompts_per_step"] = value(32 if wishes.reward == "model" else 64, f"prompts; {TABLE}")
    data["max_prompt_tokens"] = value(
        prompt, f"tokens; the longest of {found.num_rows} rows looked at has {found.longest_prompt}"
    )
    return data


def _algorithm(wishes: Wishes) -> dict[str, Value]:
    options = {"loss": _v(wishes.loss, "one of dpo, group_dpo, grpo")}
    if wishes.loss == "grpo":
        options["kl_weight"] = _v(0.001, f"{TABLE}")
        options["samples_per_prompt"] = _v(8, "completions; the best of 4, 8 and 12 in the paper's Table 5")
        return options
    options["beta"] = _v(0.01 if wishes.reward == "model" else 0.1, TABLE)
    options["samples_per_prompt"] = _v(8, "completions; ours, the paper does not say for DPO")
    return options


def _sync(wishes: Wishes) -> dict[str, Value]:
    regime = {"never": "offline: rollouts come from the seed model alone", 1: "online: new weights before every step"}
    why = regime.get(wishes.interval, "s, optimizer steps: semi-online, rollouts of s steps come from one version")
    if wishes.loss == "grpo" and wishes.interval != 1:
        why += "; the paper has GRPO with 1 alone"
    follows = wishes.loss != "grpo" and wishes.interval != "never" and wishes.reward != "model"
    return {
        "sync_interval": _v(wishes.interval, why),
        "reference": _v("follow" if follows else "never", f"{TABLE}, 'Ref model sync'"),
    }


def _trainer(wishes: Wishes, layout: Layout | None, longest: int) -> dict[str, Value]:
    rows = 1 if layout is None or wishes.loss == "grpo" else 2
    pair = "one pair at full length" if rows == 2 else "one sequence at full length"
    tokens = -(-rows * longest // 128) * 128
    if layout is None:
        return {"microbatch_tokens": _v(tokens, f"tokens; {pair}")}
    tp, dp = layout.trainer_tp, layout.data_parallel
    whole = "each rank has the whole model: only gradients and weights travel"
    options = {
        "tensor_parallel": _v(tp, whole if tp == 1 else f"ranks: what is needed for it to fit {wishes.gpu_gibibytes:g} GiB"),
        "data_parallel": _v(dp, "replicas that share each batch"),
        "microbatch_tokens": _v(tokens, f"tokens; {pair}"),
        "layers": _v("transformer_engine", "Transformer Engine's kernels"),
    }
    if tp > 1:
        options["sequence_parallel"] = _v(True, "tensor-parallel ranks share the activations too")
    if dp > 1 or "moment_dtype" in layout.savings or "offload_share" in layout.savings:
        options["distributed_optimizer"] = _v(True, f"1/{dp} of the optimizer's state on each rank")
    if "recompute" in layout.savings:
        options["recompute"] = _v(True, "without it activations do not fit; costs about a third of a step's time")
    if "fused_lm_head" in layout.savings:
        options["fused_lm_head"] = _v(True, "logits a few rows at a time: they do not fit whole")
    return options


def _optimizer(wishes: Wishes, layout: Layout | None) -> dict[str, Value]:
    judged = wishes.reward == "model"
    options = {
        "learning_rate": _v(1e-6, TABLE),
        "eps": _v(1e-8 if judged else 1e-4, f"AdamW's epsilon; {TABLE}"),
        "weight_decay": _v(0.1, "as the paper's public code"),
        "clip_norm": _v(0.1 if judged else 1.0, f"largest norm of the gradient; {TABLE}"),
    }
    if layout is not None:
        options["implementation"] = _v("te", "Transformer Engine's AdamW")
        if "moment_dtype" in layout.savings:
            options["moment_dtype"] = _v("bfloat16", "in float32 the moments do not fit")
        if "offload_share" in layout.savings:
            options["offload_share"] = _v(1.0, "the optimizer's state is in the host's memory: it does not fit the GPUs. Slow")
    return options


def _inference(layout: Layout | None, longest: int) -> dict[str, Value]:
    options = {
        "engines": _v(layout.engines if layout else 1, "each with the whole model"),
        "max_model_tokens": _v(longest, "tokens; data.max_prompt_tokens + sampling.max_tokens"),
        "kv_cache": _v("auto", "what max_concurrent requests at full length need, or what the device has left"),
    }
    if layout is not None:
        turns = "engines take turns with the trainer on its GPUs"
        apart = "engines have GPUs of their own and sample while the trainer trains"
        options["placement"] = _v(layout.placement, turns if layout.placement == "colocated" else apart)
        if layout.engine_tp > 1:
            options["tensor_parallel"] = _v(layout.engine_tp, "ranks of an engine: what is needed for it to fit")
    return options
