"""The trainer's layouts that fit so many GPUs by themselves, with the seconds of a step: of each number of GPUs the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.capacity.memory import estimate
from engine.core.errors import ConfigError
from engine.forecast.seconds import Regime
from engine.forecast.space import MANY, Space
from engine.forecast.training import Training, mean_step
from engine.models.checks import check_layout
from engine.models.sharding import trainer_layout

FREE_SHARE = 0.05  # of a GPU, for what the memory estimate does not see
STEPS = 2  # that the trainer's layouts are compared by
KEPT = 4  # of the trainer's layouts of so many GPUs


@dataclass(frozen=True, slots=True)
class TrainerChoice:
    """A layout of the trainer that fits by itself."""

    gpus: int
    options: Mapping[str, Any]
    seconds: float  # of an optimizer step
    kept_bytes: int  # of its fullest rank, in training


class TrainerLayouts:
    """The trainer's layouts of a space."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def choices(self, regime: Regime) -> Iterator[TrainerChoice]:
        """Of every number of GPUs the fastest few, with what a run of this regime holds and computes."""
        for size in self._space.sizes:
            found = [choice for tp in self._space.powers(self._space.per_node) for choice in self._shallowest(size, tp, regime)]
            yield from sorted(found, key=lambda choice: choice.seconds)[:KEPT]

    def _shallowest(self, size: int, tp: int, regime: Regime) -> Iterator[TrainerChoice]:
        """Of so many GPUs and tensor-parallel ranks, the fewest equal pipeline stages that fit, and the next more."""
        taken = 0
        layers = self._space.spec.shape.num_layers
        for pp in (stages for stages in range(1, min(size, layers) + 1) if layers % stages == 0):
            if size % (tp * pp) or taken == 2:
                continue
            choices = [self._trainer(size, tp, pp, tokens, regime) for tokens in self._microbatches]
            fitting = [choice for choice in choices if choice is not None]
            yield from fitting
            taken += bool(fitting)

    @property
    def _microbatches(self) -> list[int]:
        """Tokens of a row: the configuration's, and half and twice as many where a whole sequence fits."""
        own, config = self._space.config.trainer.microbatch_tokens, self._space.config
        if self._space.gpus > MANY:
            return [own]
        longest = config.data.max_prompt_tokens + config.sampling.max_tokens
        return [tokens for tokens in (own // 2, own, 2 * own) if tokens >= longest or tokens == own]

    def _trainer(self, size: int, tp: int, pp: int, tokens: int, regime: Regime) -> TrainerChoice | None:
        space, own = self._space, self._space.config.trainer
        dp = size // (tp * pp)
        options: dict[str, Any] = {
            "trainer.tensor_parallel": tp,
            "trainer.pipeline_parallel": pp,
            "trainer.data_parallel": dp,
            "trainer.virtual_pipeline": 1,
            "trainer.first_stage_layers": None,
            "trainer.last_stage_layers": None,
            "trainer.sequence_parallel": tp > 1,
            "trainer.overlap_tensor_parallel": tp > 1 and own.overlap_tensor_parallel,
            "trainer.distributed_optimizer": dp > 1 or own.distributed_optimizer,
            "trainer.overlap_gradients": dp > 1 and own.overlap_gradients,
            "trainer.microbatch_tokens": tokens,
        }
        for recompute in sorted({False, own.recompute}):
            for again in (recompute,) if recompute else (False, True):
                chosen = options | {"trainer.recompute": again}
                made = regime.asked_of(space.light(chosen))
                try:
                    check_layout(space.spec.shape, trainer_layout(made.trainer))
                    spec = space.assembled(made)
                    held = max(estimate(spec, space.channel, space.gpu_bytes).stages)
                    if held > space.gpu_bytes * (1 - FREE_SHARE):
                        continue
                    training = Training(spec, space.constants, space.rows)
                    compared = 1 if space.gpus > MANY else STEPS
                    step = mean_step([training.step(work.outlines) for work in space.works[:compared]])
                except ConfigError:
                    return None
                return TrainerChoice(size, chosen, step.seconds.total, held)
        return None
