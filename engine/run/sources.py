"""The training loop's source of batches, as every trainer rank has it. Rank 0 asks the run's `StepSource` for a step and
deals its sequences, of which each data-parallel rank is sent its own; in supervised training every rank reads the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from engine.config.load import RunConfig
from engine.config.options import LOSSES
from engine.core.errors import ConfigError
from engine.core.types import Batch, Judging
from engine.data.ends import written_end
from engine.data.mixture import load_prompts
from engine.data.prompts import PromptOrder
from engine.data.supervised import supervised_sequence
from engine.data.tokens import stays_text
from engine.megatron.packing import make_batch
from engine.megatron.parallel_state import ParallelState
from engine.megatron.scatter import scatter_batch
from engine.rollouts.base import StepData, StepSource, Waiting
from engine.run.agreement import Agreement
from engine.run.metrics import TARGET_TOKENS
from engine.run.spec import Spec

if TYPE_CHECKING:
    from engine.data.templates import Tokenizer

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)
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
    ) -> None:
        """`rollouts` on rank 0, None on every other rank. `attention`: the model's ModelShape.attention_cost, by which long
        sequences weigh more when they are dealt."""
        self._config, self._parallel, self._rollouts, self._agreement = config, parallel, rollouts, agreement
        self._attention = attention
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
            cuts_groups=LOSSES.load(self._config.algorithm.loss).splits_groups(),
        )

    def _await(self, step: int, ask: Callable[[StepSource, int, Waiting], Answer]) -> Answer | None:
        """What rank 0 asks of its rollouts, while the other ranks wait; None there."""
        if self._rollouts is None:
            self._agreement.listen()
            return None
        answer = ask(self._rollouts, step, self._agreement.heartbeat)
        self._agreement.done()
        return answer


class SupervisedSource:
    """Worked solutions in the seeded order; every rank reads the file and packs its own part."""

    def __init__(self, spec: Spec, parallel: ParallelState, tokenizer: Tokenizer) -> None:
        """`tokenizer`: the run's (model_tokenizer). ConfigError when a solution is longer than a microbatch or the model's
        positions."""
        config = spec.config
        self._config, self._parallel = config, parallel
        self._attention = spec.shape.attention_cost
        unjudged = Judging(verifiable=False, needs_answer=False, wants_row=False)
        loaded = load_prompts(config, config.data, config.data.train, unjudged, tokenizer)
        end = written_end(tokenizer)
        prompts = [prompt for prompt in loaded.prompts if stays_text(tokenizer, prompt.solution, end)]
        num_special = loaded.num_special + len(loaded.prompts) - len(prompts)
        if parallel.rank == 0 and loaded.warning:
            log.warning("data.train: %s", loaded.warning)
        if parallel.rank == 0 and num_special:
            log.warning(
                "data.train: left out: %d rows that spell special tokens, which the tokenizer cannot keep text", num_special
            )
        spell = f", {num_special} that spell special tokens" if num_special else ""
        left_out = f"{loaded.num_dropped} too long, {loaded.num_duplicates} that came before{spell}"
        self.told = f"data.train: {len(prompts)} worked solutions; left out: {left_out}"
        self._sequences = [supervised_sequence(prompt, tokenizer) for prompt in prompts]
        limit = min(config.trainer.microbatch_tokens, spec.shape.max_positions)
        for prompt, sequence in zip(prompts, self._sequences, strict=True):
            if sequence.num_tokens > limit:
                raise ConfigError(
                    f"trainer.microbatch_tokens and the model's positions must hold every prompt with its solution; found "
                    f"{sequence.num_tokens} tokens in {prompt.id} and a limit of {limit}: raise trainer.microbatch_tokens, or "
                    f"shorten or remove the row"
                )
        self._order = PromptOrder(len(prompts), config.run.seed)

    def open(self, steps: range, until: int) -> None:
        """Nothing to open."""

    def finish(self, steps: range) -> None:
        """Nothing to wait for."""

    def drain(self, steps: range) -> None:
        """Nothing to wait for."""

    def early(self, step: int) -> None:
        """A step is there as a whole."""

    def next(self, step: int) -> tuple[Batch, dict[str, float]]:
        """This rank's microbatches of the step."""
        sequences = [self._sequences[i] for i in self._order.at(step, self._config.sft.sequences_per_step)]
        batch = make_batch(
            sequences,
            step=step,
            num_prompts=len(sequences),
            trainer=self._config.trainer,
            dp_rank=self._parallel.dp_rank,
            attention=self._attention,
        )
        return batch, {TARGET_TOKENS.name: float(batch.num_target_tokens)}
