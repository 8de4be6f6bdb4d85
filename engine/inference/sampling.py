"""What is asked of an engine: one request a sample, each with its own counted seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from engine.core.seeds import counted_seed
from engine.core.types import Prompt


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to sample."""

    request_id: str  # unique among the requests an engine holds
    prompt_id: str
    sample_index: int
    seed: int
    token_ids: tuple[int, ...]  # of the prompt
    temperature: float
    top_p: float
    max_tokens: int
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0


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
