"""The samples of a step while engines are not done with them: what was asked, and what there is of each. With sync.in_flight
engines pause them to take new weights; rank 0 then holds them, and a checkpoint keeps them: a folder of segments, with a row a
sample, whose tokens and log-probs stand in the columns beside. It samples nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from engine.config.load import RunConfig
from engine.core.arrays import LogProbs, TokenIds
from engine.core.errors import DataError
from engine.core.segment_writer import SegmentWriter
from engine.core.types import Completion, Prompt
from engine.data.mixture import Mixture
from engine.inference.sampling import Part, Sampled, SampleRequest, sample_requests
from engine.rollouts.ledger import COLUMNS, RolloutLedger, columns_of, log_probs_of, row_of, token_digest, token_ids_of

PAUSED = "paused"  # its name in a checkpoint; older versions wrote a file of rows, paused.jsonl, which is still read


@dataclass(frozen=True, slots=True)
class Pending:
    """The samples of one step, in the order of its prompts."""

    prompts: Many[Prompt]
    asked: Many[SampleRequest]  # equally many of each prompt
    parts: Many[Part]  # of each: its completion, or the request to begin or to go on with

    @property
    def unfinished(self) -> list[SampleRequest]:
        """What engines are still to be asked for."""
        return [part for part in self.parts if isinstance(part, SampleRequest)]

    def with_found(self, found: Iterable[Part]) -> Pending:
        """The same with what has become of the unfinished ones, which `found` begins with in their order."""
        rest = iter(found)
        return replace(self, parts=[next(rest) if isinstance(part, SampleRequest) else part for part in self.parts])


def pending(step: int, prompts: Mixture, config: RunConfig) -> Pending:
    """What is to be asked for a step: a pure function of the configuration and the data."""
    own = prompts.at(step)
    asked = sample_requests(
        own,
        config.algorithm.samples_per_prompt,
        run_seed=config.run.seed,
        purpose="rollout",
        step=step,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        min_p=config.sampling.min_p,
        max_tokens=config.sampling.max_tokens,
    )
    return Pending(own, asked, asked)


class _Row(BaseModel):
    """One sample of a step."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    step: int = Field(ge=0)
    prompt_id: str
    prompt_tokens: str  # `token_digest` of the prompt
    sample_index: int = Field(ge=0)
    seed: int
    finish_reason: Literal["stop", "length"] | None  # None: it is not done
    text: str
    temperature: float = Field(gt=0)  # of the log-probs
    spans: list[list[int]]
    num_tokens: int = Field(ge=0)  # so far
    token_ids: Annotated[TokenIds, PlainValidator(token_ids_of)]
    log_probs: Annotated[LogProbs, PlainValidator(log_probs_of)]

    @model_validator(mode="after")
    def _add_up(self) -> _Row:
        spans = sum(span[-1] for span in self.spans)
        if not self.num_tokens == spans == len(self.token_ids) == len(self.log_probs):
            raise ValueError("`spans`, `token_ids` and `log_probs` must be of `num_tokens` tokens")
        return self

    def part(self, request: SampleRequest) -> Part:
        """What there is of the sample that `request` asked for."""
        spans = tuple((version, num_tokens) for version, num_tokens in self.spans)
        sampled = Sampled(self.token_ids, self.log_probs, spans)
        if self.finish_reason is None:
            return replace(request, sampled=sampled)
        return Completion(
            prompt_id=self.prompt_id,
            sample_index=self.sample_index,
            seed=self.seed,
            version=spans[0][0],
            token_ids=sampled.token_ids,
            log_probs=sampled.log_probs,
            text=self.text,
            finish_reason=self.finish_reason,
            temperature=self.temperature,
            spans=spans,
        )


def write_paused(folder: Path, held: Mapping[int, Pending], temperature: float) -> None:
    """Writes its folder into that of a checkpoint, where anything is held, and waits until it is on disk. `temperature`: of the
    log-probs. StorageError where the disk has no room."""
    if not held:
        return
    segments = SegmentWriter(folder / PAUSED, COLUMNS)
    try:
        for step in sorted(held):
            sampled = (_sampled(part) for part in held[step].parts)
            segments.append(step, _rows(step, held[step], temperature), columns_of(sampled))
        segments.sync()
    finally:
        segments.close()


def read_paused(path: Path, prompts: Mixture, config: RunConfig) -> dict[int, Pending]:
    """What `write_paused` wrote, by step. DataError where it is not whole, or not of what this run asks for."""
    ledger, found = RolloutLedger(path), {}
    for step in ledger.steps:
        own = [
            row_of(_Row, value, where, "a checkpoint", "use another checkpoint") for where, value in ledger.with_columns(step)
        ]
        samples = pending(step, prompts, config)
        asked = samples.asked
        require_temperature(path, step, {row.temperature for row in own}, config)
        there = [(row.prompt_id, row.prompt_tokens, row.sample_index, row.seed) for row in own]
        if there != [(r.prompt_id, token_digest(r.token_ids), r.sample_index, r.seed) for r in asked]:
            raise DataError(
                f"{path}, step {step}: must hold the {len(asked)} samples that this run asks for, in their order; found "
                f"{len(own)} that are others: set data, its template and algorithm as they were when it was written"
            )
        found[step] = replace(samples, parts=[row.part(request) for row, request in zip(own, asked, strict=True)])
    return found


def require_temperature(path: Path, step: int, found: Set[float], config: RunConfig) -> None:
    """DataError where log-probs that a checkpoint keeps of a step are of another temperature than the run's loss looks at."""
    if others := found - {config.log_prob_temperature}:
        raise DataError(
            f"{path}, step {step}: log-probs must be of temperature {config.log_prob_temperature}, which this run goes on "
            f"with; found {min(others)}: set algorithm and sampling as they were when it was written"
        )


def _rows(step: int, samples: Pending, temperature: float) -> Iterator[dict[str, Any]]:
    for part, request in zip(samples.parts, samples.asked, strict=True):
        row = {
            "step": step,
            "prompt_id": request.prompt_id,
            "prompt_tokens": token_digest(request.token_ids),
            "sample_index": request.sample_index,
            "seed": request.seed,
            "finish_reason": None,
            "text": "",
            "temperature": temperature,
        }
        if isinstance(part, Completion):
            row |= {"finish_reason": part.finish_reason, "text": part.text}
        sampled = _sampled(part)
        yield row | {"spans": [list(span) for span in sampled.spans], "num_tokens": len(sampled.token_ids)}


def _sampled(part: Part) -> Completion | Sampled:
    """What has its tokens."""
    return part if isinstance(part, Completion) else part.sampled
