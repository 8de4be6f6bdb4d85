"""Continuous batching, replayed: by hand, and against a twin that goes token by token."""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise
from typing import Any

import pytest

from engine.core.arrays import NO_TOKENS
from engine.forecast.batching import Engine, Request
from engine.forecast.constants import Constants
from engine.forecast.decoding import Deals, Engines
from engine.forecast.lengths import LogNormal, Workload, draw_steps
from engine.forecast.speed import Speed, quantizing_seconds, speed_of
from engine.inference.pool import deal
from engine.inference.sampling import SampleRequest
from engine.models.config_file import read_shape
from tests import builders

SECOND = Speed(fixed=1.0, request=0.0, weights=0.0, products=0.0, context=0.0, prompt=0.0)
MIXED = Speed(fixed=0.5, request=0.25, weights=0.125, products=0.0625, context=0.001, prompt=0.01)


def request(step: int, length: int, prompt: int = 4, place: int = 0) -> Request:
    return Request(step, (step, place), prompt, length)


def test_two_requests_on_one_slot_follow_each_other():
    engine = Engine(SECOND, slots=1, room=100)
    engine.submit(10.0, [request(0, 3), request(1, 2)])
    assert (engine.done(0, 0), engine.done(1, 0)) == (13.0, 15.0)
    assert (engine.busy, engine.most) == (5.0, 1)


def test_two_requests_on_two_slots_share_iterations():
    engine = Engine(SECOND, slots=2, room=100)
    engine.submit(0.0, [request(0, 3), request(1, 2)])
    assert (engine.done(1, 0), engine.done(0, 0), engine.most) == (2.0, 3.0, 2)


def test_a_prompt_that_is_there_is_not_computed_again():
    speed = Speed(1.0, 0, 0, 0, 0, prompt=0.5)
    engine = Engine(speed, slots=2, room=100)
    engine.submit(0.0, [request(0, 1, prompt=4), request(0, 1, prompt=4)])
    assert engine.done(0, 0) == 4 * 0.5 + 1 * 0.5 + 1
    engine.submit(100.0, [request(1, 1, prompt=4)])
    assert engine.done(1, 0) == 100 + 4 * 0.5 + 1


def test_what_comes_while_others_run_joins_them():
    engine = Engine(SECOND, slots=2, room=100)
    engine.submit(0.0, [request(0, 10)])
    engine.submit(2.5, [request(1, 3)])
    assert engine.done(1, 2.5) == 5.0  # from the iteration that begins next, at 2
    assert engine.done(0, 0) == 10.0


def test_answers_that_outgrow_the_cache_give_their_room_back():
    """Room for 12 tokens: both start with 4, hold 12 after two iterations, the newer one waits until the other is done."""
    engine = Engine(SECOND, slots=2, room=12)
    engine.submit(0.0, [request(0, 4), request(1, 4)])
    assert (engine.done(0, 0), engine.done(1, 0), engine.preempted) == (4.0, 6.0, 1)


def plain(speed: Speed, slots: int, room: int, requests: list[tuple[int, int]]) -> tuple[list[float], int]:
    """(when each is done, preemptions), token by token. `requests`: (prompt, length)."""
    clock, preempted = 0.0, 0
    done = [0.0] * len(requests)
    made = [0] * len(requests)
    waiting: deque[int] = deque(range(len(requests)))
    running: list[int] = []

    def held() -> int:
        return sum(requests[i][0] + made[i] for i in running)

    while waiting or running:
        while waiting and len(running) < slots:
            i = waiting[0]
            if running and held() + requests[i][0] + made[i] + len(running) + 1 > room:
                break
            waiting.popleft()
            clock += (requests[i][0] + made[i]) * speed.prompt
            running.append(i)
        if len(running) > 1 and held() + len(running) > room:
            newest = running.pop()
            waiting.appendleft(newest)
            preempted += 1
            continue
        clock += speed.iterations(1, len(running), held())
        for i in list(running):
            made[i] += 1
            if made[i] == requests[i][1]:
                done[i] = clock
                running.remove(i)
    return done, preempted


@pytest.mark.parametrize("room", [60, 200, 10_000])
def test_the_replay_equals_its_token_by_token_twin(room):
    draw = random.Random(room)
    requests = [(draw.randint(1, 9), draw.randint(1, 40)) for _ in range(60)]
    wanted, preempted = plain(MIXED, 7, room, requests)
    engine = Engine(MIXED, slots=7, room=room)
    engine.submit(0.0, [Request(i, (i, 0), prompt, length) for i, (prompt, length) in enumerate(requests)])
    assert [engine.done(i, 0) for i in range(len(requests))] == pytest.approx(wanted)
    assert engine.preempted == preempted and (preempted > 0) == (room == 60)


@pytest.mark.parametrize(("room", "slots"), [(400, 8), (10_000, 8), (10_000, 64)])
def test_the_fast_loop_equals_going_from_completion_to_completion(room, slots, monkeypatch):
    """To the last bit; requests come while others run, weights change under way, and a cache may be too small."""

    def everything() -> list[Any]:
        draw = random.Random(slots)
        engine, now = Engine(MIXED, slots, room), 0.0
        for step in range(6):
            asked = [Request(step, (step, i // 4), draw.randint(1, 9), draw.randint(1, 90)) for i in range(30)]
            engine.submit(now, asked)
            now = max(now, engine.done(step, now)) if step % 3 == 1 else now + 100 * draw.random()
            if step == 3:
                engine.pause(now + 5.0)
        until = [engine.done(step, now) for step in range(6)]
        told = (engine.busy, engine.preempted, engine.most, engine.finished, engine.handed_over, engine.stretches)
        return [until, *told]

    fast = everything()
    monkeypatch.setattr(Engine, "_rush", lambda *_: None)
    assert fast == everything()
    assert (fast[2] > 0) == (room == 400) and fast[3] <= slots


def test_equal_deals_are_made_once_and_are_the_pools(monkeypatch):
    """A search asks for the same requests of as many engines again and again."""
    config = builders.config(data={"prompts_per_step": 6}, sampling={"max_tokens": 30})
    works = draw_steps(config, Workload(LogNormal(10, 0.5, 30), LogNormal(5, 0, 10)), 3)
    deals = Deals(works)
    found = deals.shares(range(1, 3), 6, 2)
    monkeypatch.setattr("engine.forecast.decoding.deal_prompts", None)
    assert deals.shares(range(4, 6), 6, 3) == found, "steps 4 and 5 ask what 1 and 2 did"
    assert deals.shares(range(1, 2), 6, 1) == found[:1], "what is dealt first does not hang on what follows"
    samples = config.algorithm.samples_per_prompt
    batches = [
        [SampleRequest("", f"p{p}", i, 0, NO_TOKENS, 1.0, 1.0, 1) for p in range(6) for i in range(samples)] for _ in range(2)
    ]
    assert found == [of_step[:4] for of_step in deal(batches, 6)]


def test_twice_the_engines_are_never_slower():
    """Each then has half of the requests that one of the fewer had, in the same order."""
    config = builders.config(data={"prompts_per_step": 16}, sampling={"max_tokens": 300}, inference={"max_concurrent": 8})
    works = draw_steps(config, Workload(LogNormal(100, 0.8, 300), LogNormal(5, 0, 10)), 4)
    ready = []
    for count in (1, 2, 4, 8):
        many = config.model_copy(update={"inference": config.inference.model_copy(update={"engines": count})})
        engines = Engines(many, MIXED, 10_000, works)
        engines.open(0.0, range(4))
        ready.append([engines.sampled(step) for step in range(4)])
    for fewer, more in pairwise(ready):
        assert all(later <= sooner for sooner, later in zip(fewer, more, strict=True))
    assert ready[-1][-1] < ready[0][-1] / 2


def test_the_speed_of_an_engine_by_hand():
    """Llama 3.1 8B in bfloat16: 7.5 billion parameters read in 4.5 ms at 70 % of 4.8 TB/s; 128 KiB for a token of context."""
    shape = read_shape("configs/models/llama-3.1-8b")
    config = builders.config(model={"dtype": "bfloat16"})
    speed = speed_of(shape, config, Constants())
    assert speed.weights == pytest.approx((8_030_261_248 - 128_256 * 4096) * 2 / (4800e9 * 0.7))
    assert speed.context == pytest.approx(128 * 1024 / (4800e9 * 0.7))
    assert speed.iterations(1, 1, 0) == pytest.approx(0.003 + 5e-6 + speed.weights)
    assert speed.iterations(2, 1, 10) - speed.iterations(2, 1, 0) == pytest.approx(2 * 10 * speed.context)
    two = config.model_copy(update={"inference": config.inference.model_copy(update={"tensor_parallel": 2})})
    assert speed_of(shape, two, Constants()).weights == pytest.approx(speed.weights / 2)
    quantized = config.model_copy(update={"inference": config.inference.model_copy(update={"quantization": "fp8"})})
    fp8, head = speed_of(shape, quantized, Constants()), 128_256 * 4096
    assert fp8.weights == pytest.approx((8_030_261_248 - 2 * head + 2 * head) / (4800e9 * 0.7)), "layers a byte, the head two"
    layers = 8_030_261_248 - 2 * head - 65 * 4096  # less the norms
    assert quantizing_seconds(shape, quantized, Constants()) == pytest.approx(130 * layers / 4800e9)
    assert quantizing_seconds(shape, config, Constants()) == 0
    assert fp8.context == speed.context and speed.products / 1.4 < fp8.products < speed.products
