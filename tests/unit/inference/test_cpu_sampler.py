"""An engine's sampler on a CPU: vLLM's own where ours has no pass, the same draws either way, and vLLM's interfaces as it takes
them to be. That a real engine has it, and repeats itself, is in tests/e2e/test_engine_options.py."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from engine.inference import cpu_sampler
from engine.inference.cpu_sampler import KernelSampler, Seeds, is_plain, replaced
from tests import reference_ops

B, V = 6, 1000


class Unchanged:
    """A processor of logits that nobody knows, and that leaves them as they are."""

    def is_argmax_invariant(self):
        return True

    def apply(self, logits):
        return logits


def metadata(**fields):
    """Of B rows at several temperatures, each with a generator of its own and its log-prob asked for."""
    idle = [kind.__new__(kind) for kind in BUILTIN_LOGITS_PROCESSORS]
    for one in idle:
        one.__dict__ |= {"min_toks": {}, "biases": {}, "min_p_count": 0}
    none = torch.zeros(B)
    made = SamplingMetadata(
        temperature=torch.linspace(0.5, 1.5, B),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={row: torch.Generator().manual_seed(40 + row) for row in range(B)},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none + 1,
        output_token_ids=[[] for _ in range(B)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(idle),
    )
    return replace(made, **fields)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(B, V)


def test_vllm_s_sampler_is_the_one_that_ours_was_written_for():
    """Where one of these fails: read vLLM's sampler anew, and what it has come to do put into is_plain or the passes."""
    assert {field.name for field in dataclasses.fields(SamplingMetadata)} == {
        "temperature", "all_greedy", "all_random", "top_p", "top_k", "generators", "max_num_logprobs", "no_penalties",
        "prompt_token_ids", "frequency_penalties", "presence_penalties", "repetition_penalties", "output_token_ids",
        "allowed_token_ids_mask", "bad_words_token_ids", "logitsprocs", "logprob_token_ids", "spec_token_ids",
        "thinking_budget_state_holder",
    }  # fmt: skip
    for ours, theirs in (
        (KernelSampler.forward, Sampler.forward),
        (cpu_sampler.KernelTopKTopP.forward_cpu, TopKTopPSampler.forward_cpu),
    ):
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert set(BUILTIN_LOGITS_PROCESSORS) == set(cpu_sampler.IDLE)
    for kind, attribute in zip(cpu_sampler.IDLE, ("min_p_count", "biases", "min_toks"), strict=True):
        assert f"if self.{attribute}:" in (text := inspect.getsource(kind.apply)) or f"if not self.{attribute}:" in text


def test_seeds_are_what_vllm_takes_from_the_requests_generators():
    """Row by row and step by step, with requests that come later, change rows, pause, and a row that has no generator."""
    mine, theirs = ([torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2))
    seeds = Seeds()
    batches: list[dict[int, int]] = [{0: 0, 2: 1}, {0: 1, 1: 0, 2: 2}, {1: 2}, {}]  # of which row which generator
    for step in range(6 * cpu_sampler.AHEAD):
        rows = batches[step // 50 % 4]
        wanted = {row: int(torch.randint(0, 2**31, (1,), generator=theirs[n], dtype=torch.long)) for row, n in rows.items()}
        torch.manual_seed(step)
        found = seeds.next({row: mine[n] for row, n in rows.items()}, 4)
        assert {row: int(found[row]) for row in rows} == wanted
        torch.manual_seed(step)
        assert found[3] == torch.randint(0, 2**31, (4,))[3]
    assert seeds.next({}, 0).shape == (0,)
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("mode", cpu_sampler.LOG_PROBS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_draw_the_same_and_answer_as_vllm(logits, mode, dtype):
    logits, sampler = logits.to(dtype), KernelSampler(mode)
    plain = sampler(logits.clone(), metadata())
    unknown = sampler(logits.clone(), metadata(logitsprocs=LogitsProcessors([Unchanged()])))
    vllm = Sampler(mode)(logits.clone(), metadata())
    assert torch.equal(plain.sampled_token_ids, unknown.sampled_token_ids)
    for found in (plain, unknown):
        assert found.sampled_token_ids.shape == vllm.sampled_token_ids.shape == (B, 1)
        for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
            one, other = (getattr(answer.logprobs_tensors, name) for answer in (found, vllm))
            assert one.shape == other.shape and one.dtype == other.dtype, name
    torch.testing.assert_close(plain.logprobs_tensors.logprobs, unknown.logprobs_tensors.logprobs)
    assert torch.equal(plain.logprobs_tensors.selected_token_ranks, unknown.logprobs_tensors.selected_token_ranks)
    wanted = reference_ops.sample_tokens(
        logits.double(), metadata().temperature, Seeds().next(metadata().generators, B), raw_log_probs=mode == "raw_logprobs"
    )
    assert torch.equal(plain.sampled_token_ids[:, 0].long(), wanted[0])
    torch.testing.assert_close(plain.logprobs_tensors.logprobs[:, 0].double(), wanted[1], rtol=1e-6, atol=1e-6)
    assert sampler(logits.clone(), metadata(max_num_logprobs=None)).logprobs_tensors is None


def test_a_row_s_token_depends_on_no_other_row(logits):
    sampler, many = KernelSampler("raw_logprobs"), metadata()
    tokens = sampler(logits.clone(), many).sampled_token_ids
    alone = replace(metadata(), temperature=many.temperature[3:4], generators={0: torch.Generator().manual_seed(43)})
    assert torch.equal(sampler(logits[3:4].clone(), alone).sampled_token_ids, tokens[3:4])
    mixed = metadata(all_random=False, temperature=torch.where(torch.arange(B) == 1, 0.0, many.temperature))
    found = sampler(logits.clone(), mixed).sampled_token_ids
    assert found[1] == logits[1].argmax() and torch.equal(found[2:], tokens[2:]), "beside a greedy row"
    greedy = sampler(logits.clone(), metadata(all_random=False, all_greedy=True, temperature=None, generators={}))
    assert torch.equal(greedy.sampled_token_ids[:, 0].long(), logits.argmax(-1))


def test_what_vllm_masks_is_never_drawn(logits):
    sampler = KernelSampler("raw_logprobs")
    best = logits.topk(3).indices
    cut = metadata(top_k=torch.full((B,), 3), temperature=torch.full((B,), 50.0))
    seen: list[set[int]] = [set() for _ in range(B)]
    for _ in range(60):
        found = sampler(logits.clone(), replace(cut, top_k=torch.full((B,), 3)))
        for row, token in enumerate(found.sampled_token_ids[:, 0].tolist()):
            seen[row].add(token)
        assert (found.logprobs_tensors.logprobs < -0.01).all(), "log-probs of all tokens, not of those left"
    assert [set(row) for row in best.tolist()] == seen
    allowed = torch.ones(B, V, dtype=torch.bool)
    allowed[:, 7] = False  # of vLLM's mask: what is true is masked
    assert (sampler(logits.clone(), metadata(allowed_token_ids_mask=allowed)).sampled_token_ids == 7).all()


def test_what_ours_has_no_pass_for_is_told():
    busy = metadata().logitsprocs.argmax_invariant[0]
    busy.min_p_count = 1
    others: list[dict[str, object]] = [
        {"all_random": False},
        {"top_k": torch.ones(B)},
        {"top_p": torch.ones(B)},
        {"max_num_logprobs": 2},
        {"no_penalties": False},
        {"allowed_token_ids_mask": torch.zeros(B, V, dtype=torch.bool)},
        {"bad_words_token_ids": {0: [[1]]}},
        {"logprob_token_ids": {0: [1]}},
        {"logitsprocs": LogitsProcessors([Unchanged()])},
        {"logitsprocs": LogitsProcessors([busy])},
        {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
    ]
    assert is_plain(metadata(), "raw_logprobs") and is_plain(metadata(max_num_logprobs=None), "raw_logits")
    assert not any(is_plain(metadata(**fields), "raw_logprobs") for fields in others)
    assert not is_plain(metadata(), "raw_logits") and not is_plain(metadata(), "processed_logits")


def test_a_sampler_of_another_kind_stays():
    exact, other = Sampler(use_fp64_gumbel=True), SimpleNamespace(use_fp64_gumbel=False)
    assert replaced(exact) is exact and replaced(other) is other
    ours = replaced(Sampler("processed_logprobs"))
    assert type(ours) is KernelSampler and ours.logprobs_mode == ours.topk_topp_sampler.logprobs_mode == "processed_logprobs"
    assert replaced(ours) is ours
