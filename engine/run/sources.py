"""The training loop's source of batches, as every trainer rank has it. Rank 0 asks the run's `StepSource` for a step and
deals its sequences, of which each data-parallel rank is sent its own; what a step is made of is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from engine.config.load import RunConfig
from engine.core.types import Batch
from engine.megatron.parallel_state import ParallelState
from engine.megatron.scatter import scatter_batch
from engine.rollouts.base import StepData, StepSource, Waiting
from engine.run.agreement import Agreement
from engine.run.metrics import TARGET_TOKENS

Answer = TypeVar("Answer")
COUNTED = ("num_prompts", "num_groups", "num_target_tokens", "num_sequence_tokens", "num_saved_tokens")  # of a Batch


class DealtSource:
    """Rank 0 has the rollouts and deals them; each rank receives and packs its own part of the step."""

    def __init__(
        self,
        config: RunConfig,
        parallel: ParallelState,
        rollouts: StepSource | None,
        agreement: Agreement,
        attention: float = 0.0,
        *,
        cuts_groups: bool = False,
    ) -> None:
        """`rollouts` on rank 0, None on every other rank. `attention`: the model's ModelShape.attention_cost, by which long
        sequences weigh more when they are dealt; `cuts_groups`: whether the loss of a group can be computed over several
        ranks."""
        self._config, self._parallel, self._rollouts, self._agreement = config, parallel, rollouts, agreement
        self._attention, self._cuts_groups = attention, cuts_groups
        self._before: list[Batch] = []  # with sync.streaming: the counts of what was handed out of the step so far

    def open(self, steps: range, until: int) -> None:
        """Submits the rollouts of these steps for sampling, of which engines complete those before `until`."""
        if self._rollouts is not None:
            self._rollouts.open(steps, until)

    def finish(self, steps: range) -> None:
        """Waits until engines have sampled these steps."""
        for step in steps:
            self._await(step, lambda rollouts, step, waiting: rollouts.finish(step, waiting))

    def drain(self, steps: range) -> None:
        """Waits until these steps are complete."""
        for step in steps:
            self._await(step, lambda rollouts, step, waiting: rollouts.drain(step, waiting))

    def early(self, step: int) -> Batch | None:
        """With sync.streaming: this rank's microbatches of the next part of the step that is complete before the others; None
        where what is left is `next`'s."""
        if not self._config.sync.streaming:
            return None
        data = self._await(step, lambda rollouts, step, waiting: rollouts.early(step, waiting))
        if not self._agreement.number(float(data is not None)):
            return None
        batch = self._dealt(step, data)
        self._before.append(replace(batch, microbatches=()))
        return batch

    def next(self, step: int) -> tuple[Batch, dict[str, float]]:
        """This rank's microbatches of the step, less those that `early` has handed out, with the counts of the whole step; and
        on rank 0 what was measured of its rollouts."""
        data = self._await(step, lambda rollouts, step, waiting: rollouts.next(step, waiting))
        batch, metrics = self._dealt(step, data), data.metrics if data else {}
        before, self._before = self._before, []
        if before:
            batch = replace(batch, **{name: sum(getattr(one, name) for one in (*before, batch)) for name in COUNTED})
        return batch, metrics | {TARGET_TOKENS.name: float(batch.num_target_tokens)}

    def _dealt(self, step: int, data: StepData | None) -> Batch:
        """This rank's part of what rank 0 has."""
        sequences, num_prompts = (data.sequences, data.num_prompts) if data else (None, 0)
        return scatter_batch(
            sequences,
            num_prompts,
            step,
            self._config.trainer,
            self._parallel,
            attention=self._attention,
            cuts_groups=self._cuts_groups,
        )

    def _await(self, step: int, ask: Callable[[StepSource, int, Waiting], Answer]) -> Answer | None:
        """What rank 0 asks of its rollouts, while the other ranks wait; None there."""
        if self._rollouts is None:
            self._agreement.listen()
            return None
        answer = ask(self._rollouts, step, self._agreement.heartbeat)
        self._agreement.done()
        return answer
