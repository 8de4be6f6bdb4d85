"""What is asked of an engine: one request a sample, each with its own counted seed; and what has been sampled for it, where
engines paused it to take new weights (sync.in_flight).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine.core.arrays import NO_LOG_PROBS, NO_TOKENS, LogProbs, TokenIds
from engine.core.seeds import counted_seed
from engine.core.types import Completion, Prompt, Spans


@dataclass(frozen=True, slots=True)
class Sampled:
    """The first tokens of a completion, with what a Completion has of them."""

    token_ids: TokenIds = NO_TOKENS
    log_probs: LogProbs = NO_LOG_PROBS
    spans: Spans = ()

    def followed_by(self, token_ids: Iterable[int], log_probs: Iterable[float], version: int) -> Sampled:
        """These tokens, and then others of one version, which is no older."""
        more = token_ids if isinstance(token_ids, TokenIds) else TokenIds.of(token_ids)
        found = log_probs if isinstance(log_probs, LogProbs) else LogProbs.of(log_probs)
        spans = (*self.spans, (version, len(more))) if more else self.spans
        if len(spans) > 1 and spans[-2][0] == version:
            spans = (*spans[:-2], (version, spans[-2][1] + len(more)))
        return Sampled(TokenIds.joined([self.token_ids, more]), LogProbs.joined([self.log_probs, found]), spans)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to sample, or to go on with."""

    request_id: str  # unique among the requests an engine holds
    prompt_id: str
    sample_index: int
    seed: int
    token_ids: TokenIds  # of the prompt
    temperature: float
    top_p: float
    max_tokens: int
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    sampled: Sampled = Sampled()  # what there is of it, where it was paused

    @property
    def engine_seed(self) -> int:
        """What an engine seeds its generator with: `seed`, or where it goes on another one for each number of tokens, so that
        no state of a generator needs to be kept."""
        begun = len(self.sampled.token_ids)
        return counted_seed(self.seed, "resumed", begun) if begun else self.seed

    def paused(self, token_ids: Iterable[int], log_probs: Iterable[float], version: int) -> SampleRequest:
        """The same to go on with, after `version` has sampled these tokens of it."""
        return replace(self, sampled=self.sampled.followed_by(token_ids, log_probs, version))


Part = Completion | SampleRequest  # a sample that is done, or one that is to be begun or gone on with


def sample_requests(
    prompts: Iterable[Prompt],
    samples: int,
    *,
    run_seed: int,
    purpose: str,
    step: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    top_k: int = 0,
    min_p: float = 0.0,
) -> list[SampleRequest]:
    """`samples` requests for each prompt; seeds are pure functions of (run seed, purpose, step, prompt id, index).

    A prompt that comes again in the same step counts its samples on, so that it never repeats itself.
    """
    asked: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        for index in range(asked[prompt.id], asked[prompt.id] + samples):
            requests.append(
                SampleRequest(
                    request_id=f"{purpose}:{step}:{prompt.id}:{index}",
                    prompt_id=prompt.id,
                    sample_index=index,
                    seed=counted_seed(run_seed, purpose, step, prompt.id, index),
                    token_ids=prompt.token_ids,
                    temperature=temperature,
                    top_p=top_p,
                    max_tokens=max_tokens,
                    top_k=top_k,
                    min_p=min_p,
                )
            )
        asked[prompt.id] += samples
    return requests
