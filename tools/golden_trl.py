"""Runs TRL's own DPO, GRPO and CISPO losses, DPO's variants and GRPO's corrections among them, on made-up log-probs and writes
inputs, losses and gradients, in float64, to tests/unit/algorithms/golden_trl.json, which test_golden_trl.py beside it holds
our losses against. TRL is no dependency of ours: run this where `trl` and what it imports (accelerate, datasets, pandas)
are installed. No model is run: the trainers' loss functions are given the log-probs that a model would return. The
importance weights of its corrections have no function of their own there: those lines of its trainer's method are cut out
and run as they are.

    python tools/golden_trl.py [FILE]
"""

from __future__ import annotations

import inspect
import json
import math
import random
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

FILE = Path(__file__).resolve().parents[1] / "tests" / "unit" / "algorithms" / "golden_trl.json"
NUM_SEQUENCES, MAX_LENGTH, EPSILON, SEED = 12, 9, 0.2, 2506
EPSILON_OF_RESPONSES = 0.05  # of the geometric mean of a response's ratios, which is nearer to 1
LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "luspo")
KL_WEIGHTS, BETAS = (0.0, 0.001, 0.3), (0.01, 0.1, 1.0)
VARIANTS = (("ipo", 0.0), ("sigmoid_norm", 0.0), ("aot", 0.1))  # aot of one pair, which needs no sorting, is cDPO
CORRECTIONS = (  # mode, smallest and largest weight
    ("token_truncate", None, 1.2),
    ("token_truncate", 0.8, 1.2),
    ("token_mask", 0.8, 1.2),
    ("token_mask", None, 1.1),
    ("sequence_truncate", None, 1.5),
    ("sequence_mask", 0.5, 1.5),
)
KINDS = ("dpo", "grpo", "dpo_variants", "wpo", "gspo", "cispo", "corrected")
WEIGHTED = ("use_vllm and self.vllm_importance_sampling_correction:\n", "# Compute the per-token log probabilities for the ref")
Rows = list[list[float]]


def main() -> None:
    draw = random.Random(SEED)
    lengths = [1, MAX_LENGTH, *(draw.randint(1, MAX_LENGTH) for _ in range(NUM_SEQUENCES - 2))]
    rollout = [[draw.uniform(-4.0, -0.1) for _ in range(length)] for length in lengths]
    policy = [[p + draw.uniform(-0.5, 0.5) for p in row] for row in rollout]  # ratios on both sides of the clip
    reference = [[p + draw.uniform(-0.5, 0.5) for p in row] for row in rollout]
    advantages = [draw.uniform(-1.5, 1.5) for _ in lengths]
    squares = [[draw.uniform(-2.0, -0.1) for _ in row] for row in rollout]  # logs of sums of squared probabilities
    golden: dict[str, Any] = {
        "made_by": {"trl": trl.__version__, "torch": torch.__version__, "seed": SEED},
        "rollout": rollout,
        "policy": policy,
        "reference": reference,
        "advantages": advantages,
        "epsilon": EPSILON,
        "epsilon_of_responses": EPSILON_OF_RESPONSES,
        "max_completion_length": MAX_LENGTH,
        "dpo": [dpo(policy, reference, beta) for beta in BETAS],
        "grpo": [grpo(policy, reference, rollout, advantages, loss_type, kl) for loss_type in LOSS_TYPES for kl in KL_WEIGHTS],
        "dpo_variants": [
            dpo(policy, reference, beta, loss_type, smoothing) for loss_type, smoothing in VARIANTS for beta in BETAS
        ],
        "squares": squares,
        "wpo": [dpo(policy, reference, beta, squares=squares) for beta in BETAS],
        "gspo": [grpo(policy, reference, rollout, advantages, "grpo", kl, level="sequence") for kl in (0.0, 0.3)],
        "cispo": [grpo(policy, reference, rollout, advantages, "cispo", kl, epsilon_high=1.2) for kl in (0.0, 0.3)],
        "corrected": [
            corrected(policy, reference, rollout, advantages, kl, *correction)
            for correction in CORRECTIONS
            for kl in (0.0, 0.3)
        ],
    }
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    entries = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    file.write_text(f"{{\n{entries}\n}}\n", encoding="utf-8")
    print(f"{file}: {', '.join(f'{len(v)} of {k}' for k, v in golden.items() if k in KINDS)}, by TRL {trl.__version__}")


def dpo(
    policy: Rows,
    reference: Rows,
    beta: float,
    loss_type: str = "sigmoid",
    smoothing: float = 0.0,
    squares: Rows | None = None,
) -> dict[str, Any]:
    """A loss of pairs (0, 1), (2, 3), ...: even rows are chosen. Each pair by itself where TRL's sorts the batch."""
    pairs = [[i, i + 1] for i in range(0, NUM_SEQUENCES, 2)]
    batches = pairs if loss_type == "aot" else [[i for i, _ in pairs] + [j for _, j in pairs]]  # all chosen, all rejected
    loss, gradients = 0.0, dict[int, list[float]]()
    for order in batches:
        part, slopes = dpo_batch(policy, reference, order, beta, loss_type, smoothing, squares)
        loss += part / len(batches)
        gradients |= {i: [slope / len(batches) for slope in row] for i, row in zip(order, slopes, strict=True)}
    more = {} if loss_type == "sigmoid" else {"loss_type": loss_type, "label_smoothing": smoothing}
    return {"beta": beta, **more, "loss": loss, "gradients": [gradients[i] for i in range(NUM_SEQUENCES)]}


def dpo_batch(
    policy: Rows,
    reference: Rows,
    order: list[int],
    beta: float,
    loss_type: str,
    smoothing: float,
    squares: Rows | None,
) -> tuple[float, Rows]:
    """(loss, gradients in this order) of a batch of TRL's."""
    half = len(order) // 2
    log_probs, mask = padded([policy[i] for i in order])
    log_probs.requires_grad_()
    mask_with_prompt = torch.cat([torch.zeros(len(order), 1, dtype=torch.int64), mask], 1)
    sums = torch.tensor([sum(reference[i]) for i in order], dtype=torch.float64)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=log_probs, mean_logits=log_probs, is_top1=mask.bool())
    outputs.log_sum_sq_probs = None if squares is None else padded([squares[i] for i in order])[0]
    trainer = SimpleNamespace(
        **surroundings(),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        label_smoothing=smoothing,
        loss_weights=[1.0],
        beta=beta,
        use_weighting=squares is not None,
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask_with_prompt),
        "completion_mask": mask_with_prompt,
        "ref_chosen_logps": sums[:half],
        "ref_rejected_logps": sums[half:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **arguments: outputs, inputs, False)
    loss.backward()
    return loss.item(), gradient_rows(log_probs, [policy[i] for i in order])


def grpo(
    policy: Rows,
    reference: Rows,
    rollout: Rows,
    advantages: list[float],
    loss_type: str,
    kl_weight: float,
    *,
    level: str = "token",
    epsilon_high: float = EPSILON,
    weights: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The clipped loss with the k3 KL, reduced as `loss_type` says. With `weights` its ratio is to the policy itself."""
    log_probs, mask = padded(policy)
    log_probs.requires_grad_()
    trainer = SimpleNamespace(
        **surroundings(),
        _get_per_token_logps_and_entropies=lambda *arguments, **named: (log_probs, log_probs.detach(), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=kl_weight,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=loss_type,
        epsilon_low=EPSILON_OF_RESPONSES if level == "sequence" else EPSILON,
        epsilon_high=EPSILON_OF_RESPONSES if level == "sequence" else epsilon_high,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(NUM_SEQUENCES, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(NUM_SEQUENCES, 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": padded(rollout)[0] if weights is None else log_probs.detach(),
        "ref_per_token_logps": padded(reference)[0],
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    gradients = gradient_rows(log_probs, policy)
    return {"loss_type": loss_type, "kl_weight": kl_weight, "loss": loss.item(), "gradients": gradients}


def corrected(
    policy: Rows,
    reference: Rows,
    rollout: Rows,
    advantages: list[float],
    kl_weight: float,
    mode: str,
    low: float | None,
    high: float | None,
) -> dict[str, Any]:
    """ "luspo", the mean over responses of their sums, with TRL's weights of the policy against the rollouts."""
    begin, end = WEIGHTED
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).split(end)[0].rpartition(begin)[2]
    options = {"mode": mode, "clip_min": low, "clip_max": high}
    known: dict[str, Any] = {
        "torch": torch,
        "math": math,
        "self": SimpleNamespace(**{f"vllm_importance_sampling_{key}": value for key, value in options.items()}),
        "tool_mask": None,
        "completion_mask": padded(policy)[1],
        "old_per_token_logps": padded(policy)[0],
        "sampling_per_token_logps": padded(rollout)[0],
    }
    exec(textwrap.dedent(lines), known)
    weights = known["vllm_importance_sampling_ratio"]
    found = grpo(policy, reference, rollout, advantages, "luspo", kl_weight, weights=weights)
    return options | found


def surroundings() -> dict[str, Any]:
    """What both trainers' loss functions want beside their options: one process, in evaluation."""
    accelerator = SimpleNamespace(
        device="cpu", num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    model = SimpleNamespace(training=False)
    metrics: dict[str, dict[str, list[float]]] = {"eval": defaultdict(list)}
    return {"accelerator": accelerator, "model": model, "_metrics": metrics, "aux_loss_enabled": False}


def padded(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, mask), [sequences, longest], zeros after each row's end."""
    values = torch.zeros(len(rows), MAX_LENGTH, dtype=torch.float64)
    mask = torch.zeros(len(rows), MAX_LENGTH, dtype=torch.int64)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[i, : len(row)] = 1
    return values, mask


def gradient_rows(log_probs: torch.Tensor, rows: Rows) -> Rows:
    """The gradient by each log-prob, padding left out."""
    assert log_probs.grad is not None
    return [log_probs.grad[i, : len(row)].tolist() for i, row in enumerate(rows)]


if __name__ == "__main__":
    main()
