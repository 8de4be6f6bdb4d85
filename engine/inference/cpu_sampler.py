"""vLLM's sampler on a CPU with the draw by a kernel of ours (csrc/sampling). vLLM draws a Gumbel number for every word of the
vocabulary and goes over the logits again for temperature, log-probs and rank; ours takes one uniform number a row.

`KernelSampler` is a vLLM Sampler. Its own pass covers what Semion asks for as a rule: all rows are sampled, neither top-k nor
top-p nor a processor of logits changes them, and the token's own log-prob is all that is wanted. Everything else goes vLLM's
way, where the draw alone is ours, from the same bits: a request's tokens do not depend on which way its batch went; of its
log-probs the last bit may, for vLLM sums them in another order. The worker puts it in the place of vLLM's own
(engine/inference/receiver.py).

Shape legend: T rows, one a request, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from engine.ops import sample_tokens

SEED_RANGE = 2**31  # of vLLM's seeds on a CPU
AHEAD = 64  # seeds of a request that are drawn at once
LOG_PROBS = ("raw_logprobs", "processed_logprobs")  # vLLM's modes that give log-probs and no logits
# Whether a processor of vLLM's own leaves all rows of this batch as they are; one of another class is taken to change them.
IDLE: dict[type[LogitsProcessor], Callable[[Any], bool]] = {
    MinPLogitsProcessor: lambda processor: not processor.min_p_count,
    LogitBiasLogitsProcessor: lambda processor: not processor.biases,
    MinTokensLogitsProcessor: lambda processor: not processor.min_toks,
}


class Seeds:
    """A seed for each row of each decoding step: of a request with a generator the numbers that torch.randint(0, 2**31, (1,))
    takes from it one after the other, as vLLM's sampler does. They are taken AHEAD at once, which gives the same numbers, for a
    call of torch a row and step costs more than the draw itself. A generator that a step does not ask for is put back to where
    single draws would have left it, so what is ahead is held for the requests of the last step alone."""

    def __init__(self) -> None:
        # The generator's state before they were drawn, and those that are left: the next one is the last.
        self._ahead: dict[torch.Generator, tuple[torch.Tensor, list[int]]] = {}

    def next(self, generators: dict[int, torch.Generator], num_rows: int) -> torch.Tensor:
        """[T] int64; `generators` are by row, and a row without one has its seed from torch's own."""
        seeds = [0] * num_rows
        if len(generators) < num_rows:
            seeds = torch.randint(0, SEED_RANGE, (num_rows,), dtype=torch.int64).tolist()
        for generator in self._ahead.keys() - set(generators.values()):
            state, left = self._ahead.pop(generator)
            generator.set_state(state)
            torch.randint(0, SEED_RANGE, (AHEAD - len(left),), generator=generator, dtype=torch.int64)
        for row, generator in generators.items():
            if generator not in self._ahead or not self._ahead[generator][1]:
                state = generator.get_state()
                drawn = torch.randint(0, SEED_RANGE, (AHEAD,), generator=generator, dtype=torch.int64)
                self._ahead[generator] = state, drawn.flip(0).tolist()
            seeds[row] = self._ahead[generator][1].pop()
        return torch.tensor(seeds, dtype=torch.int64)


class KernelTopKTopP(TopKTopPSampler):  # type: ignore[misc]
    """vLLM's masks of top-k and top-p, then our draw."""

    def __init__(self, logprobs_mode: str, seeds: Seeds) -> None:
        super().__init__(logprobs_mode)
        self.seeds = seeds

    def forward_cpu(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens [T] int64, what logprobs_mode wants of the processed logits) of logits [T, V], which may be written to."""
        logits = apply_top_k_top_p(logits, k, p)
        processed = None
        if self.logprobs_mode == "processed_logits":
            processed = logits
        elif self.logprobs_mode == "processed_logprobs":
            processed = logits.log_softmax(dim=-1, dtype=torch.float32)
        num_rows = logits.size(0)
        tokens, _, _ = sample_tokens(logits, torch.ones(num_rows), self.seeds.next(generators, num_rows))
        return tokens, processed


class KernelSampler(Sampler):  # type: ignore[misc]
    """vLLM's sampler, with one pass of ours where that is all there is to do."""

    def __init__(self, logprobs_mode: str) -> None:
        super().__init__(logprobs_mode)
        self.seeds = Seeds()
        self.topk_topp_sampler = KernelTopKTopP(logprobs_mode, self.seeds)

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> SamplerOutput:
        """Tokens, and what is asked for beside them, of logits [T, V]."""
        mode = logprobs_mode_override or self.logprobs_mode
        if predict_bonus_token or not is_plain(sampling_metadata, mode):
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        seeds = self.seeds.next(sampling_metadata.generators, logits.size(0))
        assert sampling_metadata.temperature is not None, "of rows that are all sampled"
        tokens, log_probs, ranks = sample_tokens(
            logits, sampling_metadata.temperature, seeds, raw_log_probs=mode == "raw_logprobs"
        )
        token_ids = tokens.to(torch.int32).unsqueeze(-1)
        if sampling_metadata.max_num_logprobs is None:
            return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=None)
        of_tokens = LogprobsTensors(token_ids.clone(), log_probs.unsqueeze(-1), ranks)  # vLLM may write to either's ids
        return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=of_tokens)


def is_plain(metadata: SamplingMetadata, mode: str) -> bool:
    """Whether a batch is its logits, temperatures and seeds, and asks for no more than each token's own log-prob."""
    holder = metadata.thinking_budget_state_holder
    processors = (*metadata.logitsprocs.non_argmax_invariant, *metadata.logitsprocs.argmax_invariant)
    return (
        metadata.all_random
        and metadata.top_k is None
        and metadata.top_p is None
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not metadata.logprob_token_ids
        and (metadata.max_num_logprobs is None or (metadata.max_num_logprobs == 0 and mode in LOG_PROBS))
        and (holder is None or not holder.has_tracked_requests())
        and all(type(one) in IDLE and IDLE[type(one)](one) for one in processors)
    )


def replaced(sampler: Sampler) -> Sampler:
    """Ours in the place of the sampler that vLLM's model runner made. One that draws in float64 stays, and so does another
    class's, as that of vLLM's second model runner."""
    ours = type(sampler) is Sampler and not sampler.use_fp64_gumbel
    return KernelSampler(sampler.logprobs_mode) if ours else sampler
