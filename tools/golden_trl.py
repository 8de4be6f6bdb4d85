"""Runs TRL's own DPO and GRPO losses on made-up log-probs and writes inputs, losses and gradients, in float64, to
tests/unit/algorithms/golden_trl.json, which test_golden_trl.py beside it holds our losses against. TRL is no dependency of
ours: run this where `trl` and what it imports (accelerate, datasets, pandas) are installed. No model is run: the trainers' loss
functions are given the log-probs that a model would return.

    python tools/golden_trl.py [FILE]
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

FILE = Path(__file__).resolve().parents[1] / "tests" / "unit" / "golden_trl.json"
NUM_SEQUENCES, MAX_LENGTH, EPSILON, SEED = 12, 9, 0.2, 2506
LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "luspo")
KL_WEIGHTS, BETAS = (0.0, 0.001, 0.3), (0.01, 0.1, 1.0)
Rows = list[list[float]]


def main() -> None:
    draw = random.Random(SEED)
    lengths = [1, MAX_LENGTH, *(draw.randint(1, MAX_LENGTH) for _ in range(NUM_SEQUENCES - 2))]
    rollout = [[draw.uniform(-4.0, -0.1) for _ in range(length)] for length in lengths]
    policy = [[p + draw.uniform(-0.5, 0.5) for p in row] for row in rollout]  # ratios on both sides of the clip
    reference = [[p + draw.uniform(-0.5, 0.5) for p in row] for row in rollout]
    advantages = [draw.uniform(-1.5, 1.5) for _ in lengths]
    golden: dict[str, Any] = {
        "made_by": {"trl": trl.__version__, "torch": torch.__version__, "seed": SEED},
        "rollout": rollout,
        "policy": policy,
        "reference": reference,
        "advantages": advantages,
        "epsilon": EPSILON,
        "max_completion_length": MAX_LENGTH,
        "dpo": [dpo(policy, reference, beta) for beta in BETAS],
        "grpo": [grpo(policy, reference, rollout, advantages, loss_type, kl) for loss_type in LOSS_TYPES for kl in KL_WEIGHTS],
    }
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    entries = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    file.write_text(f"{{\n{entries}\n}}\n", encoding="utf-8")
    print(f"{file}: {len(golden['dpo'])} of DPO, {len(golden['grpo'])} of GRPO, by TRL {trl.__version__}")


def dpo(policy: Rows, reference: Rows, beta: float) -> dict[str, Any]:
    """The sigmoid loss of pairs (0, 1), (2, 3), ...: even rows are chosen."""
    order = [*range(0, NUM_SEQUENCES, 2), *range(1, NUM_SEQUENCES, 2)]  # TRL's batch: all chosen, then all rejected
    log_probs, mask = padded([policy[i] for i in order])
    log_probs.requires_grad_()
    mask_with_prompt = torch.cat([torch.zeros(NUM_SEQUENCES, 1, dtype=torch.int64), mask], 1)
    sums = torch.tensor([sum(reference[i]) for i in order], dtype=torch.float64)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=log_probs, mean_logits=log_probs, is_top1=mask.bool())
    trainer = SimpleNamespace(
        **surroundings(),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask_with_prompt),
        "completion_mask": mask_with_prompt,
        "ref_chosen_logps": sums[: NUM_SEQUENCES // 2],
        "ref_rejected_logps": sums[NUM_SEQUENCES // 2 :],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **arguments: outputs, inputs, False)
    loss.backward()
    gradients = {i: row for i, row in zip(order, gradient_rows(log_probs, [policy[i] for i in order]), strict=True)}
    return {"beta": beta, "loss": loss.item(), "gradients": [gradients[i] for i in range(NUM_SEQUENCES)]}


def grpo(
    policy: Rows, reference: Rows, rollout: Rows, advantages: list[float], loss_type: str, kl_weight: float
) -> dict[str, Any]:
    """The clipped loss with the k3 KL, reduced as `loss_type` says."""
    log_probs, mask = padded(policy)
    log_probs.requires_grad_()
    trainer = SimpleNamespace(
        **surroundings(),
        _get_per_token_logps_and_entropies=lambda *arguments, **named: (log_probs, log_probs.detach(), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl_weight,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=loss_type,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        use_vllm=False,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(NUM_SEQUENCES, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(NUM_SEQUENCES, 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": padded(rollout)[0],
        "ref_per_token_logps": padded(reference)[0],
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    gradients = gradient_rows(log_probs, policy)
    return {"loss_type": loss_type, "kl_weight": kl_weight, "loss": loss.item(), "gradients": gradients}


def surroundings() -> dict[str, Any]:
    """What both trainers' loss functions want beside their options: one process, in evaluation."""
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
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
