"""Attention to an engine's cache against its definition in float64: what is cached, what is read, and what changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import cached_attention
from tests import reference_ops

PLACES, BLOCKS, SCALE = 32, 40, 0.2


class Requests:
    """Requests with some tokens in the cache already, and their next ones; every slot that holds none is NaN."""

    def __init__(self, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int) -> None:
        self.lengths, self.kv_heads, self.dim = lengths, kv_heads, dim
        longest = max(before + new for before, new in lengths)
        self.angles = torch.randn(longest, dim)
        self.table = torch.randperm(BLOCKS)[: len(lengths) * 6].view(len(lengths), 6).to(torch.int32)
        self.cache = torch.full((BLOCKS, kv_heads, PLACES, 2 * dim), torch.nan)
        self.qkv = 2 * torch.randn(sum(new for _, new in lengths), (heads + 2 * kv_heads) * dim)
        self.positions = torch.cat([torch.arange(before, before + new) for before, new in lengths])
        self.starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0).to(torch.int32)
        owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([new for _, new in lengths]))
        self.slots = self.table[owners, self.positions // PLACES].long() * PLACES + self.positions % PLACES
        self.before = [torch.randn(2, before, kv_heads, dim) for before, _ in lengths]
        for request, (keys, values) in enumerate(self.before):
            for position in range(len(keys)):
                self.put(int(self.table[request, position // PLACES]), position % PLACES, keys[position], values[position])

    def views(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [blocks, M, D, places] and values [blocks, M, places, D] in the cache."""
        keys, values = cache.flatten(2).chunk(2, -1)
        return keys.unflatten(-1, (self.dim, PLACES)), values.unflatten(-1, (PLACES, self.dim))

    def put(self, block: int, place: int, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = self.views(self.cache)
        keys[block, :, :, place], values[block, :, place] = key, value

    def arguments(self) -> tuple[Any, ...]:
        return self.qkv, self.positions, self.slots, self.starts, self.table, self.angles, self.cache.clone(), SCALE

    def only(self, request: int) -> tuple[Any, ...]:
        """The same of one request alone."""
        mine = slice(int(self.starts[request]), int(self.starts[request + 1]))
        starts = torch.tensor([0, mine.stop - mine.start], dtype=torch.int32)
        table = self.table[request : request + 1]
        return self.qkv[mine], self.positions[mine], self.slots[mine], starts, table, self.angles, self.cache.clone(), SCALE


@given(
    st.lists(st.tuples(st.integers(0, 130), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (7, 1), (6, 2)]),
    st.sampled_from([32, 64, 96]),
)
@settings(max_examples=40, deadline=None)
def test_it_is_its_definition(lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int) -> None:
    torch.manual_seed(dim)
    requests = Requests(lengths, *heads, dim)
    arguments = requests.arguments()
    found, cache = cached_attention(*arguments), arguments[6]
    for request, before in enumerate(requests.before):
        mine = slice(int(requests.starts[request]), int(requests.starts[request + 1]))
        wanted = reference_ops.cached_attention(
            requests.qkv[mine].double(),
            requests.positions[mine],
            requests.angles.double(),
            before[0].double(),
            before[1].double(),
            SCALE,
        )
        torch.testing.assert_close(found[mine].double(), wanted, rtol=1e-4, atol=3e-5)
    keys, values = requests.views(cache)
    new = requests.qkv.unflatten(1, (-1, dim))[:, heads[0] :]
    blocks, places = requests.slots // PLACES, requests.slots % PLACES
    assert torch.equal(values[blocks, :, places], new[:, heads[1] :])
    rotary = [part.unsqueeze(1) for part in requests.angles[requests.positions].chunk(2, -1)]
    torch.testing.assert_close(keys[blocks, :, :, places], reference_ops._turned(new[:, : heads[1]], *rotary))
    untouched = torch.ones(BLOCKS, PLACES, dtype=torch.bool)
    untouched[blocks, places] = False
    for after, was in zip((keys.transpose(-1, -2), values), (v for v in requests.views(requests.cache)), strict=True):
        was = was if was.shape == after.shape and after is values else was.transpose(-1, -2)
        assert torch.equal(after.movedim(1, 2)[untouched].nan_to_num(7), was.movedim(1, 2)[untouched].nan_to_num(7))


def test_other_requests_and_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    requests, before = Requests([(60, 1), (0, 33), (31, 1), (100, 7)], 4, 2, 64), torch.get_num_threads()
    whole = cached_attention(*requests.arguments())
    for request in range(4):
        mine = slice(int(requests.starts[request]), int(requests.starts[request + 1]))
        assert torch.equal(cached_attention(*requests.only(request)), whole[mine])
    many = Requests([(100, 30)] * 5, 8, 4, 128)  # enough that threads share it
    single = cached_attention(*many.arguments())
    try:
        torch.set_num_threads(3)
        assert torch.equal(cached_attention(*many.arguments()), single)
    finally:
        torch.set_num_threads(before)


def changed(place: int, value: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    arguments = list(Requests([(0, 2), (40, 1)], 2, 1, 32).arguments())
    arguments[place] = value(arguments[place]) if callable(value) else value
    return tuple(arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(3, 32 * 2), r"qkv must have a multiple of M = 1 heads of D = 32 .*; found \[3, 64\]"),
        (0, torch.ones(3, 128).bfloat16(), "qkv must be float32; found bfloat16"),
        (1, torch.tensor([0, 1, 99]), r"positions\[2\] must be in \[0, 41\); found 99"),
        (1, torch.tensor([0, -1, 40]), r"positions\[1\] must be in \[0, 41\); found -1"),
        (2, torch.tensor([0, -1, 40]), r"slots\[1\] must be in \[0, 1280\); found -1"),
        (2, torch.tensor([0, 1280, 40]), r"slots\[1\] must be in \[0, 1280\); found 1280"),
        (3, torch.tensor([0, 1, 2], dtype=torch.int32), r"starts\[2\] must be the length of qkv = 3; found 2"),
        (4, lambda table: table[:1], "table must have a row for each of 2 requests; found 1"),
        (4, lambda table: table[:, :1], "table must have the block of position 40, the 1th; found 1 columns"),
        (4, lambda table: table + 100, r"table\[0, 0\] must be in \[0, 40\); found"),
        (5, torch.ones(41, 16), r"angles must have shape \[P, D\] = \[41, 32\]; found \[41, 16\]"),
        (6, torch.zeros(4, 1, 16, 64), "B and D of the cache must be multiples of 32; found B = 16"),
        (6, torch.zeros(4, 1, 64), r"cache must be contiguous and have shape \[blocks, M, B, 2 D\]; found \[4, 1, 64\]"),
        (7, 0.0, "scale must be greater than 0; found 0"),
    ],
)
def test_wrong_arguments_are_refused(place: int, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cached_attention(*changed(place, value))
