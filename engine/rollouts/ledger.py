"""Reads a rollout ledger back, a step at a time: what `semion rollout` writes, or a run's rollouts.jsonl. A ledger may be
larger than memory, so only where each step lies is kept. It decides nothing about what is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.core.errors import DataError
from engine.core.jsonl import Line, parsed, read_lines, step_of
from engine.core.types import Completion, Prompt, Rollout, RolloutGroup, Score, Status


class LedgerRow(BaseModel):
    """One rollout of a ledger; further fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    step: int = Field(ge=0)
    version: int = Field(ge=0)
    prompt_id: str
    sample_index: int = Field(ge=0)
    seed: int
    reward: float
    status: Status
    finish_reason: Literal["stop", "length"]
    text: str
    token_ids: list[int] = Field(min_length=1)
    log_probs: list[float]
    reward_parts: dict[str, float] = {}  # the named ones that the reward was made of
    correct: bool | None = None  # where several rewards made it: what the first, verifiable one says
    prompt_tokens: str | None = None  # `token_digest` of the prompt; ledgers of before it was written have none

    def rollout(self) -> Rollout:
        """The rollout as it was sampled and judged."""
        completion = Completion(
            prompt_id=self.prompt_id,
            sample_index=self.sample_index,
            seed=self.seed,
            version=self.version,
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            text=self.text,
            finish_reason=self.finish_reason,
        )
        return Rollout(completion, Score(self.reward, self.status, tuple(self.reward_parts.items()), self.correct))


def token_digest(token_ids: Iterable[int]) -> str:
    """What says whether two prompts are the same tokens: 16 hex digits of the SHA-256 of the ids, written with commas."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]


class RolloutLedger:
    """A ledger's steps. A last line without its newline is what a killed process leaves, and does not count."""

    def __init__(self, path: str | Path) -> None:
        """Reads the file once to find its steps; DataError where a line has none, or a step is not in one piece."""
        self.path = Path(path)
        self._spans: dict[int, tuple[int, int, int]] = {}  # first byte, byte after the last, number of the first line
        last = -1
        for number, line in enumerate(read_lines(self.path), start=1):
            step = step_of(line)
            if step < last:
                raise DataError(f"{line.where}: steps must be in order; found {step} after {last}: sort the lines")
            start, _, first = self._spans.get(step, (line.offset, 0, number))
            self._spans[step] = start, line.end, first
            last = step

    @property
    def steps(self) -> range:
        """From the first step to the last; `rows` says when one between them is missing."""
        return range(min(self._spans), max(self._spans) + 1) if self._spans else range(0)

    def __contains__(self, step: int) -> bool:
        return step in self._spans

    def check_steps(self, num_steps: int) -> None:
        """DataError when a step below run.steps = `num_steps` is missing."""
        lacking = next((step for step in range(num_steps) if step not in self), None)
        if lacking is not None:
            raise DataError(
                f"{self.path}: must hold every step below run.steps = {num_steps}; found no step {lacking}, and "
                f"{len(self.steps)} from {self.steps.start}: lower run.steps, or sample more with `semion rollout`"
            )

    def rows(self, step: int) -> list[LedgerRow]:
        """The rows of a step in their order; DataError names a line that is no rollout."""
        start, end, first = self._spans[step]
        lines = takewhile(lambda line: line.end <= end, read_lines(self.path, start))
        return [_row(line, f"{self.path}, line {number}") for number, line in enumerate(lines, start=first)]

    def groups(self, step: int, prompts: Mapping[str, Prompt], num_prompts: int, samples: int) -> list[RolloutGroup]:
        """The step's groups with the prompts they were sampled for. DataError when it does not hold `samples` rollouts of
        each of `num_prompts` prompts, of one version that is not newer than the step, or a prompt is not among `prompts` or has
        other tokens there."""
        rows = self.rows(step)
        parts = [rows[start : start + samples] for start in range(0, len(rows), samples)]
        whole = all(
            [(row.prompt_id, row.sample_index) for row in part]
            == [(part[0].prompt_id, part[0].sample_index + i) for i in range(samples)]
            for part in parts
        )
        if len(parts) != num_prompts or not whole:
            raise DataError(
                f"{self.path}, step {step}: must hold algorithm.samples_per_prompt = {samples} rollouts of each of "
                f"{num_prompts} prompts; found {len(rows)} rows of {len({row.prompt_id for row in rows})}: set data and "
                f"algorithm as they were when it was written"
            )
        versions = sorted({row.version for row in rows})
        if len(versions) > 1 or versions[0] > step:
            raise DataError(
                f"{self.path}, step {step}: `version` must be one, and no newer than the step; found {versions}: replay a "
                f"ledger as it was written"
            )
        missing = [row.prompt_id for row in rows if row.prompt_id not in prompts]
        if missing:
            raise DataError(
                f"{self.path}, step {step}: `prompt_id` must name a prompt of data.train or data.mix; found {missing[0]!r}: "
                f"name the data that it was sampled from, and the same data.max_prompt_tokens"
            )
        self._check_tokens(step, rows, prompts)
        return [RolloutGroup(prompts[part[0].prompt_id], step, tuple(row.rollout() for row in part)) for part in parts]

    def _check_tokens(self, step: int, rows: Iterable[LedgerRow], prompts: Mapping[str, Prompt]) -> None:
        """DataError where a row was sampled from other tokens than its prompt has now."""
        digests = {name: token_digest(prompts[name].token_ids) for name in {row.prompt_id for row in rows}}
        for row in rows:
            if row.prompt_tokens not in (None, digests[row.prompt_id]):
                raise DataError(
                    f"{self.path}, step {step}: `prompt_tokens` of prompt {row.prompt_id!r} must be those it has in this run, "
                    f"{digests[row.prompt_id]}; found {row.prompt_tokens}: set the template and the model's tokenizer as they "
                    f"were when it was written"
                )


def _row(line: Line, where: str) -> LedgerRow:
    """The rollout that a line holds; DataError where it is none."""
    try:
        row = LedgerRow.model_validate(parsed(where, line.data))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "row"
        raise DataError(
            f"{where}: `{field}` must be as a ledger has it ({first['msg'][0].lower() + first['msg'][1:]}); found "
            f"{str(first['input'])[:60]!r}: replay a file that `semion rollout` or a run wrote"
        ) from error
    if len(row.token_ids) != len(row.log_probs):
        raise DataError(
            f"{where}: `log_probs` must be one a token; found {len(row.log_probs)} for {len(row.token_ids)} tokens: replay "
            f"a ledger as it was written"
        )
    return row


def ledger_rows(group: RolloutGroup) -> list[dict[str, object]]:
    """One JSON row a rollout: what was asked, sampled and judged, and which weights sampled it."""
    prompt_tokens = token_digest(group.prompt.token_ids)
    return [
        {
            "step": group.step,
            "version": rollout.completion.version,
            "prompt_id": group.prompt.id,
            "prompt_tokens": prompt_tokens,
            "sample_index": rollout.completion.sample_index,
            "seed": rollout.completion.seed,
            "reward": rollout.score.value,
            "status": rollout.score.status,
            "finish_reason": rollout.completion.finish_reason,
            "text": rollout.completion.text,
            "token_ids": list(rollout.completion.token_ids),
            "log_probs": list(rollout.completion.log_probs),
            **_parts(rollout.score),
        }
        for rollout in group.rollouts
    ]


def _parts(score: Score) -> dict[str, object]:
    """What only rewards of several parts have."""
    parts: dict[str, object] = {"reward_parts": dict(score.parts)} if score.parts else {}
    return parts if score.right is None else parts | {"correct": score.right}
