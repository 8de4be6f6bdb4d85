"""Log-probs of a microbatch's targets from what the last stage computes at the positions that have one: logits, or with
trainer.fused_lm_head hidden states. It knows which columns of the vocabulary this rank has; the arithmetic is engine/ops's.

Shape legend: T tokens of a packed row, L of them with a target, V_local vocabulary columns of this rank, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from engine.algorithms.base import Slopes
from engine.config.load import RunConfig
from engine.core.types import Microbatch
from engine.observe.profiling.phases import Phase, phase
from engine.ops import Coefficients, lm_head_log_probs, log_square_probs, token_log_probs


class TargetLogProbs:
    """What the last stage's output says of the targets."""

    def __init__(
        self, config: RunConfig, weight: torch.Tensor, num_valid: int, tp_rank: int, tp_group: dist.ProcessGroup | None
    ) -> None:
        """`weight`: the output layer's on this rank [V_local, H]; `num_valid`: words of the vocabulary before it was padded."""
        self.weight = weight
        self.fused = config.trainer.fused_lm_head  # the output is hidden states
        self._float32_logits = config.model.head == "float32"
        fuses, widest = config.trainer.fuses_accumulation, config.trainer.gradient_dtype == "float32"
        self.into_main_grad = fuses and widest  # the weight's gradient to the gradient buffer itself, as the layers do
        self._vocabulary: dict[str, Any] = {  # which columns of the logits this rank has, and what they are divided by
            "vocab_start": tp_rank * weight.size(0),
            "num_valid": num_valid,
            "group": tp_group,
            "temperature": config.log_prob_temperature,
        }

    def __call__(
        self,
        output: torch.Tensor,
        microbatch: Microbatch,
        coefficients: torch.Tensor | Slopes | None = None,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(log-probs [T], 0 where the target is IGNORED, entropy [T] likewise) of the model's output at `target_positions`:
        logits [L, V_local] or hidden states [L, H]. Collective over the tensor-parallel ranks."""
        positions = microbatch.target_positions
        targets = microbatch.targets[positions]
        with phase(Phase.LOG_PROBS):
            if not self.fused:
                log_probs, entropy = token_log_probs(output, targets, with_entropy=with_entropy, **self._vocabulary)
                return _spread(log_probs, microbatch), None if entropy is None else _spread(entropy, microbatch)
            assert not with_entropy, "the configuration allows no entropy with trainer.fused_lm_head"
            log_probs = lm_head_log_probs(
                output,
                self.weight,
                targets,
                coefficients=_at(positions, coefficients),
                float32_logits=self._float32_logits,
                into_main_grad=self.into_main_grad,
                **self._vocabulary,
            )
            return _spread(log_probs, microbatch), None

    def log_squares(self, logits: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        """Logs of the sums of squared probabilities [T], 0 where the target is IGNORED, of logits [L, V_local]. Collective over
        the tensor-parallel ranks."""
        assert not self.fused, "the configuration allows no weights of pairs with trainer.fused_lm_head"
        with phase(Phase.LOG_PROBS):
            return _spread(log_square_probs(logits, **self._vocabulary), microbatch)


def _at(positions: torch.Tensor, coefficients: torch.Tensor | Slopes | None) -> Coefficients | None:
    """What a loss says of all tokens, of those at these positions [L]."""
    if coefficients is None:
        return None
    if isinstance(coefficients, torch.Tensor):
        return coefficients[positions]
    slopes = coefficients
    return lambda rows, log_probs: slopes(positions[rows], log_probs)


def _spread(values: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """Values [L] at the positions with a target, 0 at all others: [T]."""
    row = torch.zeros(microbatch.targets.shape, dtype=values.dtype, device=values.device)
    return row.index_copy(0, microbatch.target_positions, values)
