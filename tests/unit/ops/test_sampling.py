"""Sampled tokens against the exact inverse of the distribution function, in frequencies, and alone as beside others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import sample_tokens
from tests import reference_ops

BOUNDARY = 1e-5  # of the whole: how far rounding of large logits may move a boundary between two tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(
    st.integers(0, 9),
    st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1024, 3000])),  # of vectors and of blocks
    st.sampled_from([0.01, 1.0, 60.0]),
    st.sampled_from([0.6, 1.0, 2.0]),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_it_is_its_definition(
    dtype: torch.dtype, num_rows: int, width: int, size: float, temperature: float, raw: bool
) -> None:
    torch.manual_seed(width)
    logits = (size * torch.randn(num_rows, width + 3)).to(dtype)[:, :width]  # as a padded vocabulary is cut
    logits[:, ::3] = -math.inf
    logits[:, -1] = 0
    temperatures, seeds = torch.full((num_rows,), temperature), torch.randint(-(2**63), 2**63 - 1, (num_rows,))
    tokens, log_probs, ranks = sample_tokens(logits, temperatures, seeds, raw_log_probs=raw)
    assert tokens.dtype == ranks.dtype == torch.int64 and log_probs.dtype == torch.float32
    exact = logits.double()
    heights = torch.nn.functional.pad((exact / temperatures.double().unsqueeze(1)).softmax(-1).cumsum(-1), (1, 0))
    uniform, of_rows = reference_ops.uniforms(seeds), tokens.unsqueeze(1)
    assert (heights.gather(1, of_rows).squeeze(1) <= uniform + BOUNDARY).all()
    assert (uniform - BOUNDARY <= heights.gather(1, of_rows + 1).squeeze(1)).all()
    wanted, _, _ = reference_ops.sample_tokens(exact, temperatures, seeds)
    near = (heights - uniform.unsqueeze(1)).abs().amin(-1) < BOUNDARY
    assert torch.equal(tokens[~near], wanted[~near])
    scaled = exact if raw else exact / temperatures.double().unsqueeze(1)
    of_tokens = scaled.log_softmax(-1).gather(1, of_rows).squeeze(1)
    largest = float(scaled[scaled.isfinite()].abs().max()) if num_rows else 0.0  # quotients are rounded before their difference
    torch.testing.assert_close(log_probs.double(), of_tokens, rtol=2e-7, atol=2e-6 + 2e-7 * largest)
    assert torch.equal(ranks, (logits >= logits.gather(1, of_rows)).sum(-1))
    assert torch.isfinite(logits.gather(1, of_rows)).all(), "what is masked is never drawn"


def z_of(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """By how many standard deviations the chi-square of these draws exceeds its mean; bins that expect few draws are one."""
    expected, found = tokens.numel() * probabilities, torch.bincount(tokens, minlength=len(probabilities)).double()
    rare = expected < 20
    assert found[probabilities == 0].sum() == 0
    bins = (
        torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)]),
        torch.cat([found[~rare], found[rare].sum(0, keepdim=True)]),
    )
    kept = bins[0] > 0
    chi_square = ((bins[1] - bins[0]).square() / bins[0])[kept].sum()
    freedom = int(kept.sum()) - 1
    return float((chi_square - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize(("width", "num_draws"), [(8, 200_000), (4000, 40_000)])
def test_frequencies_are_the_probabilities(width: int, num_draws: int) -> None:
    """Of counted seeds and of vLLM's, numbers below 2^31 from a generator: a chi-square within four standard deviations."""
    torch.manual_seed(1)
    row, temperature = torch.randn(width), 0.8
    row[1::5] = -math.inf
    probabilities = (row.double() / temperature).softmax(-1)
    for seeds in (torch.arange(num_draws), torch.randint(0, 2**31, (num_draws,))):
        tokens = torch.cat(
            [
                sample_tokens(row.expand(len(some), width), torch.full((len(some),), temperature), some)[0]
                for some in seeds.split(10_000)
            ]
        )
        assert abs(z_of(tokens, probabilities)) < 4


def test_in_a_vocabulary_of_128k_words_each_part_is_drawn_as_often_as_it_weighs() -> None:
    torch.manual_seed(2)
    row, num_draws = 2 * torch.randn(128_256), 4000
    seeds = torch.randint(0, 2**31, (num_draws,))
    tokens = torch.cat([sample_tokens(row.expand(len(some), -1), torch.ones(len(some)), some)[0] for some in seeds.split(500)])
    parts = torch.arange(len(row)) // 2048
    weights = torch.zeros(int(parts.max()) + 1, dtype=torch.float64).index_add_(0, parts, row.double().softmax(-1))
    assert abs(z_of(parts[tokens], weights)) < 4


def test_a_row_is_drawn_alone_as_beside_others_and_by_any_number_of_threads() -> None:
    torch.manual_seed(0)
    logits, temperatures = 3 * torch.randn(40, 32_000), 0.5 + torch.rand(40)
    seeds, before = torch.randint(0, 2**31, (40,)), torch.get_num_threads()

    def found(threads: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(threads)
        return sample_tokens(logits, temperatures, seeds)

    try:
        one, three = found(1), found(3)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, three))
    for row in (0, 17, 39):
        alone = sample_tokens(logits[row : row + 1].clone(), temperatures[row : row + 1], seeds[row : row + 1])
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, one, strict=True))


def test_a_division_before_changes_no_bit() -> None:
    """vLLM divides by the temperature itself where something else is to be done to logits."""
    torch.manual_seed(0)
    logits, temperatures, seeds = 9 * torch.randn(64, 1000), 0.3 + torch.rand(64), torch.randint(0, 2**31, (64,))
    divided = sample_tokens(logits / temperatures.unsqueeze(1), torch.ones(64), seeds)
    assert all(map(torch.equal, sample_tokens(logits, temperatures, seeds), divided))


@pytest.mark.parametrize("width", [5, 20, 2000])
def test_a_row_that_is_no_distribution_has_no_log_prob_and_touches_no_other(width: int) -> None:
    torch.manual_seed(0)
    logits, ones, seeds = torch.randn(5, width), torch.ones(5), torch.arange(5)
    whole = sample_tokens(logits, ones, seeds)
    for place in (0, width // 2, width - 1):
        broken = logits.clone()
        broken[0, place], broken[1, place], broken[3] = math.nan, math.inf, -math.inf
        tokens, log_probs, ranks = sample_tokens(broken, ones, seeds)
        bad = torch.tensor([True, True, False, True, False])
        assert not tokens[bad].any() and log_probs[bad].isnan().all() and not ranks[bad].any()
        assert all(torch.equal(a[~bad], b[~bad]) for a, b in zip((tokens, log_probs, ranks), whole, strict=True))


@pytest.mark.parametrize(
    ("logits", "temperatures", "seeds", "message"),
    [
        (torch.ones(2, 0), torch.ones(2), torch.ones(2).long(), "logits must have a column at least"),
        (torch.ones(2, 3), torch.ones(3), torch.ones(2).long(), r"temperatures must have shape \[T\] = \[2\]"),
        (torch.ones(2, 3), torch.ones(2), torch.ones(2), "seeds must be int64; found float32"),
        (torch.ones(2, 3).double(), torch.ones(2), torch.ones(2).long(), "logits must be float32 or bfloat16 or float16"),
        (torch.ones(2, 3), torch.tensor([1.0, 0]), torch.ones(2).long(), r"temperatures\[1\] must be greater than 0"),
        (torch.ones(2, 3), torch.tensor([math.nan, 1]), torch.ones(2).long(), r"temperatures\[0\] must be .* found nan"),
    ],
)
def test_wrong_arguments_are_refused(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(logits, temperatures, seeds)
