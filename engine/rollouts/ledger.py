"""Reads rollouts back, a step at a time: those that `semion rollout` wrote, or a run's. They may be larger than memory, so
only where the steps of one segment lie is kept. It decides nothing about what is trained on.

Two forms: a folder of segments (core/segments.py), of which names and one segment are read, however many there are; or a file
of JSON lines with the tokens and log-probs in each, as older runs have it, which is read once to find its steps.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from engine.core.arrays import LogProbs, Numbers, TokenIds
from engine.core.columns import Batch, read_batches, read_columns
from engine.core.errors import DataError
from engine.core.jsonl import lines_in, parsed, step_of
from engine.core.segments import Segment, segments_of
from engine.core.types import Completion, Prompt, Rollout, RolloutGroup, Score, Status
from engine.inference.sampling import Sampled

if TYPE_CHECKING:
    import numpy as np

KINDS: dict[str, type[Numbers[Any]]] = {"token_ids": TokenIds, "log_probs": LogProbs}  # of the columns, by their names
COLUMNS = {name: kind.DTYPE for name, kind in KINDS.items()}  # as SegmentWriter is given them
AS_WRITTEN = "replay rollouts as they were written, or where a checkpoint keeps these, go on from an earlier one"  # the fix
_INTEGERS = TypeAdapter(list[Annotated[int, Field(ge=-(2**31), lt=2**31)]], config=ConfigDict(strict=True))
_FLOATS = TypeAdapter(list[float], config=ConfigDict(strict=True))


class RolloutRow(BaseModel):
    """One rollout as people read it; further fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    step: int = Field(ge=0)
    version: int = Field(ge=0)
    prompt_id: str
    sample_index: int = Field(ge=0)
    seed: int
    reward: float
    status: Status
    finish_reason: Literal["stop", "length"]
    text: str | None = None  # where the run keeps it
    num_tokens: int = Field(ge=1)
    reward_parts: dict[str, float] = {}  # the named ones that the reward was made of
    correct: bool | None = None  # where several rewards made it: what the first, verifiable one says
    temperature: float = Field(1.0, gt=0)  # of the log-probs
    prompt_tokens: str | None = None  # `token_digest` of the prompt; ledgers of before it was written have none
    spans: list[list[int]] = []  # with sync.in_flight: as Completion has them
    wave: int | None = Field(None, ge=0)  # with sync.streaming: in which part of the step it was complete and judged

    @field_validator("spans")
    @classmethod
    def _add_up(cls, spans: list[list[int]], info: ValidationInfo) -> list[list[int]]:
        whole = all(len(span) == 2 and span[1] > 0 for span in spans) and all(a[0] < b[0] for a, b in pairwise(spans))
        version, num_tokens = info.data.get("version"), info.data.get("num_tokens")
        if spans and not (whole and spans[0][0] == version and sum(count for _, count in spans) == num_tokens):
            raise ValueError("must be [version, tokens] each, rise from `version`, and add up to `num_tokens`")
        return spans


def token_ids_of(found: Any) -> TokenIds:
    """As columns hold them or as a list; ValueError for anything else."""
    return found if isinstance(found, TokenIds) else TokenIds.of(_INTEGERS.validate_python(found))


def _some_token_ids(found: Any) -> TokenIds:
    """At least one."""
    made = token_ids_of(found)
    if not made:
        raise ValueError("it must not be empty")
    return made


def log_probs_of(found: Any) -> LogProbs:
    """Finite ones, as columns hold them or as a list; ValueError for anything else."""
    import numpy as np

    made = found if isinstance(found, LogProbs) else LogProbs.of(_FLOATS.validate_python(found))
    if not np.isfinite(made.array).all():
        raise ValueError("it must hold finite numbers")
    return made


class LedgerRow(RolloutRow):
    """One rollout with all that a replay needs."""

    token_ids: Annotated[TokenIds, PlainValidator(_some_token_ids)]
    log_probs: Annotated[LogProbs, PlainValidator(log_probs_of)]

    def rollout(self) -> Rollout:
        """The rollout as it was sampled and judged."""
        completion = Completion(
            prompt_id=self.prompt_id,
            sample_index=self.sample_index,
            seed=self.seed,
            version=self.version,
            token_ids=self.token_ids,
            log_probs=self.log_probs,
            text=self.text or "",
            finish_reason=self.finish_reason,
            temperature=self.temperature,
            spans=tuple((version, num_tokens) for version, num_tokens in self.spans),
        )
        return Rollout(completion, Score(self.reward, self.status, tuple(self.reward_parts.items()), self.correct))


def token_digest(token_ids: Iterable[int]) -> str:
    """What says whether two prompts are the same tokens: 16 hex digits of the SHA-256 of the ids, written with commas."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]


class RolloutLedger:
    """The steps of a folder or a file. A last line without its newline is what a killed process leaves, and does not count."""

    def __init__(self, path: str | Path) -> None:
        """Looks at the names of segments; DataError where a segment does not follow the one before, or in a file a line has no
        step, or a step is not in one piece."""
        self.path = Path(path)
        self._segments = segments_of(self.path)
        self._firsts = [segment.first for segment in self._segments]
        self._index: _Index | None = None
        if not self.path.is_dir() and self._segments:
            self._index = _Index(self._segments[0])

    @property
    def steps(self) -> range:
        """From the first step to the last; `rows` says when one between them is missing."""
        return range(self._firsts[0], self._segments[-1].last_step() + 1) if self._segments else range(0)

    def __contains__(self, step: int) -> bool:
        index = self._index_of(step)
        return index is not None and step in index.spans

    def check_steps(self, num_steps: int) -> None:
        """DataError when a step below run.steps = `num_steps` is missing; of a folder as far as its segments' ends tell."""
        lacking = next((step for step in self._lacking() if step < num_steps), None)
        if lacking is not None:
            raise DataError(
                f"{self.path}: must hold every step below run.steps = {num_steps}; found no step {lacking}, and "
                f"{len(self.steps)} from {self.steps.start}: lower run.steps, or sample more with `semion rollout`"
            )

    def _lacking(self) -> Iterator[int]:
        """Steps that are missing: before the first, between two, after the last."""
        if not self._segments:
            yield 0
            return
        if self._index is not None and not self.path.is_dir():
            yield from (step for step in range(self.steps.stop + 1) if step not in self._index.spans)
            return
        yield from range(self._firsts[0])
        for one, other in pairwise(self._segments):
            yield from range(one.last_step() + 1, other.first)
        yield self.steps.stop

    def read(self, step: int) -> list[RolloutRow]:
        """The rows of a step in their order, as people read them; DataError names a line that is no rollout."""
        return [row_of(RolloutRow, value, where) for where, value in self.values(step)]

    def rows(self, step: int) -> list[LedgerRow]:
        """The same with tokens and log-probs; DataError also where they are not on record."""
        found = [(where, row_of(LedgerRow, value, where)) for where, value in self.with_columns(step)]
        for where, row in found:
            if len(row.token_ids) != len(row.log_probs):
                raise DataError(
                    f"{where}: `log_probs` must be one a token; found {len(row.log_probs)} for {len(row.token_ids)} tokens: "
                    f"replay a ledger as it was written"
                )
        return [row for _, row in found]

    def _index_of(self, step: int) -> _Index | None:
        """Where the steps of the segment lie that `step` would be in; None before the first."""
        place = bisect_right(self._firsts, step) - 1
        if place < 0:
            return None
        if self._index is None or self._index.segment is not self._segments[place]:
            self._index = _Index(self._segments[place])
        return self._index

    def values(self, step: int) -> list[tuple[str, Any]]:
        """(where, what it says) of the lines of a step. DataError where there is none of it, or one is no JSON."""
        index = self._index_of(step)
        if index is None or step not in index.spans:
            raise DataError(f"{self.path}: must hold step {step}; found none of it: use a ledger as it was written")
        return index.values(step)

    def with_columns(self, step: int) -> Iterator[tuple[str, Any]]:
        """The same, with tokens and log-probs in what each says; DataError also where they are not on record."""
        values, index = self.values(step), self._index
        assert index is not None
        columns = index.columns(step)
        for name, found in columns.items():
            if len(found) != len(values):
                raise DataError(
                    f"{index.segment.columns}, step {step}: `{name}` must be one list a rollout; found {len(found)} for "
                    f"{len(values)} rows: {AS_WRITTEN}"
                )
        for place, (where, value) in enumerate(values):
            if isinstance(value, dict):
                value |= {name: KINDS[name].copied(found[place]) for name, found in columns.items()}
                for name, kind in (("token_ids", "tokens"), ("log_probs", "log_probs")):
                    if name not in value and self.path.is_dir():
                        raise DataError(
                            f"{where}: `{name}` must be on record, for training on these rollouts needs them; found none: for "
                            f"a replay sample with {kind!r} in records.rollouts, or where a checkpoint keeps them go on from "
                            f"an earlier one"
                        )
            yield where, value

    def groups(self, step: int, prompts: Mapping[str, Prompt], num_prompts: int, samples: int) -> list[RolloutGroup]:
        """The step's groups with the prompts they were sampled for. DataError when it does not hold `samples` rollouts of
        each of `num_prompts` prompts, of one version that is not newer than the step (of several where it is told for each
        token), or a prompt is not among `prompts` or has other tokens there."""
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
        versions = sorted({row.version for row in rows if not row.spans} | {span[0] for row in rows for span in row.spans})
        if versions[-1] > step or (len(versions) > 1 and not all(row.spans for row in rows)):
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


class _Index:
    """Where the steps of one segment lie."""

    def __init__(self, segment: Segment) -> None:
        """Reads it once; DataError as `RolloutLedger`."""
        self.segment = segment
        self.spans: dict[int, tuple[int, int, int]] = {}  # first byte, byte after the last, number of the first line
        self._file = segment.open()
        last = segment.first
        for number, line in enumerate(lines_in(self._file, segment.rows), start=1):
            step = step_of(line)
            if step < last:
                raise DataError(f"{line.where}: steps must be in order; found {step} after {last}: sort the lines")
            start, _, first = self.spans.get(step, (line.offset, 0, number))
            self.spans[step] = start, line.end, first
            last = step
        self._batches: dict[int, Batch] | None = None

    def values(self, step: int) -> list[tuple[str, Any]]:
        """(where, what it says) of each line of a step."""
        start, end, first = self.spans[step]
        self._file.seek(start)
        lines = self._file.read(end - start).splitlines(keepends=True)
        places = [f"{self.segment.rows}, line {number}" for number in range(first, first + len(lines))]
        values = [(where, parsed(where, line)) for where, line in zip(places, lines, strict=True)]
        for _, value in values:
            if isinstance(value, dict) and "num_tokens" not in value and isinstance(value.get("token_ids"), list):
                value["num_tokens"] = len(value["token_ids"])  # as older versions have it
        return values

    def columns(self, step: int) -> dict[str, list[Any]]:
        """A step's columns by name; none where the segment has none beside its rows."""
        if self.segment.columns is None:
            return {}
        if self._batches is None:
            self._batches = {batch.step: batch for batch in read_batches(self.segment.columns)}
        if step not in self._batches:
            raise DataError(f"{self.segment.columns}: must hold the tokens of step {step}; found none: {AS_WRITTEN}")
        return dict(read_columns(self.segment.columns, self._batches[step]))


Form = TypeVar("Form", bound=BaseModel)


def row_of(
    form: type[Form],
    value: Any,
    where: str,
    whose: str = "a ledger",
    fix: str = "replay a file that `semion rollout` or a run wrote",
) -> Form:
    """What a line holds; DataError where it is not of this form, as `whose` lines are, with what to do then."""
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "row"
        raise DataError(
            f"{where}: `{field}` must be as {whose} has it ({first['msg'][0].lower() + first['msg'][1:]}); found "
            f"{str(first['input'])[:60]!r}: {fix}"
        ) from error


def rollout_rows(group: RolloutGroup, *, text: bool = True) -> list[dict[str, object]]:
    """One JSON row a rollout as people read it: what was asked, sampled and judged, and which weights sampled it; what is said
    where `text`."""
    prompt_tokens = token_digest(group.prompt.token_ids)
    return [
        {
            "step": group.step,
            "version": rollout.completion.version,
            **_spans(rollout.completion),
            **({} if group.wave is None else {"wave": group.wave}),
            "prompt_id": group.prompt.id,
            "prompt_tokens": prompt_tokens,
            "sample_index": rollout.completion.sample_index,
            "seed": rollout.completion.seed,
            "reward": rollout.score.value,
            "status": rollout.score.status,
            "finish_reason": rollout.completion.finish_reason,
            "num_tokens": len(rollout.completion.token_ids),
            **({"text": rollout.completion.text} if text else {}),
            **_temperature(rollout.completion),
            **_parts(rollout.score),
        }
        for rollout in group.rollouts
    ]


def columns_of(sampled: Iterable[Completion | Sampled]) -> dict[str, list[np.ndarray]]:
    """Tokens [T] int32 and log-probs [T] float32 of each, by the names of COLUMNS."""
    rows = list(sampled)
    return {name: [getattr(row, name).array for row in rows] for name in KINDS}


def ledger_rows(group: RolloutGroup) -> list[dict[str, object]]:
    """The same with tokens and log-probs, as a file of JSON lines has them."""
    return [
        row | {"token_ids": list(rollout.completion.token_ids), "log_probs": list(rollout.completion.log_probs)}
        for row, rollout in zip(rollout_rows(group), group.rollouts, strict=True)
    ]


def _spans(completion: Completion) -> dict[str, object]:
    """Versions by token, where they are told."""
    return {"spans": [list(span) for span in completion.spans]} if completion.spans else {}


def _temperature(completion: Completion) -> dict[str, object]:
    """That of the log-probs, where it is not 1."""
    return {} if completion.temperature == 1 else {"temperature": completion.temperature}


def _parts(score: Score) -> dict[str, object]:
    """What only rewards of several parts have."""
    parts: dict[str, object] = {"reward_parts": dict(score.parts)} if score.parts else {}
    return parts if score.right is None else parts | {"correct": score.right}
