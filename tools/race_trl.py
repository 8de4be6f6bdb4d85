"""TRL's side of tools/race.py: trains a few steps of GRPO or online DPO with TRL, sampling with vLLM in the trainer's own
processes, and writes the seconds of each step. It runs in an environment of its own that has `trl` and `accelerate` beside what
Semion runs on (docs/results.md says how it is made), one process or, under torch.distributed.run, several.

TRL's weight sync fails on vLLM's packed CPU weights, so its engine loads them as Semion's do (`engine.inference.plain_loader`),
and multiplies by them as torch does, without Semion's kernel for few rows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

ENGINE: dict[str, Any] = {  # what TRL leaves to vLLM, as Semion's engines have it
    "load_format": "semion_plain",
    "dtype": "float32",
    "kv_cache_memory_bytes": 256 << 20,
    "block_size": 32,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 8192,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["grpo", "online_dpo"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL with `problem` and `answer`")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompts", type=int, required=True, help="a step")
    parser.add_argument("--samples", type=int, required=True, help="a prompt")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--max-model-tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kl-weight", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--last-bit", action="store_true", help="rewards by tools/race_reward.py, not Math-Verify")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--output", required=True, help="JSON file to write")
    options = parser.parse_args()

    os.environ |= {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    plain_engine(options.loss, options.max_model_tokens, eager=options.eager)
    trainer = (make_grpo if options.loss == "grpo" else make_online_dpo)(options, processes)
    clock = stopwatch()
    trainer.add_callback(clock)
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        import accelerate
        import transformers
        import trl
        import vllm

        modules = (trl, accelerate, transformers, vllm, torch)
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        if options.loss == "online_dpo" and processes == 1:  # TRL logs none: a call of the reward is a step
            rewards = trainer.reward_funcs[0].means
        found = {"seconds": clock.seconds, "rewards": rewards, "versions": {m.__name__: m.__version__ for m in modules}}
        Path(options.output).write_text(json.dumps(found), encoding="utf-8")


def plain_engine(loss: str, max_model_tokens: int, *, eager: bool) -> None:
    """Has TRL make its vLLM with the options of ENGINE."""
    if loss == "grpo":
        from trl.generation import vllm_generation as maker
    else:
        from trl.experimental.online_dpo import online_dpo_trainer as maker

    import torch

    from engine.inference import plain_loader, receiver

    receiver.register()
    plain_loader.linear = torch.nn.functional.linear  # type: ignore[attr-defined,assignment]
    engine = maker.LLM

    def made(**options: Any) -> Any:
        return engine(**options | ENGINE | {"max_model_len": max_model_tokens, "enforce_eager": eager})

    maker.LLM = made


def rows_of(options: argparse.Namespace) -> Any:
    """The prompts as Semion words them (data.template = 'figure4')."""
    from datasets import Dataset

    from engine.data.templates import FIGURE4

    rows = [json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": FIGURE4.replace("{problem}", row["problem"])}],
                "solution": f"$\\boxed{{{row['answer']}}}$",
            }
            for row in rows[: options.steps * options.prompts]
        ]
    )


def shared_options(options: argparse.Namespace) -> dict[str, Any]:
    """What both trainers have: Semion's optimizer, in float32, and nothing written."""
    return {
        "output_dir": f"{options.output}.trl",
        "use_cpu": True,
        "bf16": False,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_vllm": True,
        "vllm_mode": "colocate",
        "temperature": 1.0,
        "seed": options.seed,
    }


def reward_of(options: argparse.Namespace) -> Any:
    """TRL's own, or the race's; the mean of each call is kept in its `means`."""
    from trl.rewards import accuracy_reward

    from tools.race_reward import last_bit

    means: list[float] = []

    def reward(completions: Any, **columns: Any) -> list[float]:
        if options.last_bit:
            found = [last_bit(messages[0]["content"]) for messages in completions]
        else:
            found = accuracy_reward(completions, **columns)
        known = [value for value in found if value is not None]
        means.append(sum(known) / len(known))
        return found

    reward.means = means  # type: ignore[attr-defined]
    return reward


def make_grpo(options: argparse.Namespace, processes: int) -> Any:
    """TRL's GRPO with Semion's loss: one microbatch a process, no scaling of advantages, the policy gradient as it is."""
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        **shared_options(options),
        per_device_train_batch_size=options.prompts * options.samples // processes,
        num_generations=options.samples,
        max_completion_length=options.max_tokens,
        vllm_max_model_length=options.max_model_tokens,
        vllm_importance_sampling_correction=False,
        loss_type="dr_grpo",
        scale_rewards="none",
        num_iterations=1,
        beta=options.kl_weight,
    )
    return GRPOTrainer(model=options.model, reward_funcs=reward_of(options), args=config, train_dataset=rows_of(options))


def make_online_dpo(options: argparse.Namespace, processes: int) -> Any:
    """TRL's online DPO: two samples a prompt, which is all it can."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    config = OnlineDPOConfig(
        **shared_options(options),
        per_device_train_batch_size=options.prompts // processes,
        max_new_tokens=options.max_tokens,
        beta=0.1,
    )
    from transformers import AutoTokenizer

    return OnlineDPOTrainer(
        model=options.model,
        reward_funcs=reward_of(options),
        args=config,
        train_dataset=rows_of(options),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
    )


def stopwatch() -> Any:
    """A callback that takes the seconds from the end of one step to the end of the next, sampling included."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._last = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._last = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.monotonic()
            self.seconds.append(now - self._last)
            self._last = now

    return Stopwatch()


if __name__ == "__main__":
    main()
