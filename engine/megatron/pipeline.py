"""How long a pipeline takes for rows of unequal cost: a replay of megatron-core's 1F1B and interleaved schedules, operation by
operation. What is dealt and what is forecast are both judged by it. Costs go in and a time comes out; it knows no model.

A model is cut into parts, one after another over all p stages, and over them again with the next chunk, so part k is on stage
k mod p. Of K parts and m rows the forward of row i through part k has the number k m + i, and its backward (K + k) m + i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Operation(NamedTuple):
    """A forward or a backward of one row through one model chunk of a stage."""

    backward: bool
    row: int
    chunk: int


Seconds = Callable[[int, Operation], float]  # (stage, operation) -> what it takes
BACKWARD = 2.0  # forwards that a backward takes


def replay(num_stages: int, num_rows: int, num_chunks: int, seconds: Seconds, hop: float = 0.0) -> float:
    """Until every stage has done every row, forward and backward. `hop`: until a stage has what its neighbour computed."""
    durations = [
        seconds(part % num_stages, Operation(backward, row, part // num_stages))
        for backward in (False, True)
        for part in range(num_stages * num_chunks)
        for row in range(num_rows)
    ]
    return _run(_orders(num_stages, num_rows, num_chunks), durations, num_rows, num_stages * num_chunks, hop)


def replay_forward(num_stages: int, num_rows: int, num_chunks: int, seconds: Seconds, hop: float = 0.0) -> float:
    """The same of forwards alone."""
    num_parts = num_stages * num_chunks
    durations = [
        seconds(part % num_stages, Operation(False, row, part // num_stages))
        for part in range(num_parts)
        for row in range(num_rows)
    ]
    forwards = [_sequence(stage, num_stages, num_rows, num_chunks)[0] for stage in range(num_stages)]
    return _run(forwards, durations, num_rows, num_parts, hop)


def replay_works(works: Sequence[float], num_stages: int, num_chunks: int) -> float:
    """The same of forwards and backwards of rows whose work (of a forward) the parts of the model share evenly, in the unit of
    the works."""
    num_parts = num_stages * num_chunks
    forward = [work / num_parts for work in works]
    durations = forward * num_parts + [BACKWARD * one for one in forward] * num_parts
    return _run(_orders(num_stages, len(works), num_chunks), durations, len(works), num_parts, 0.0)


def replay_many(candidates: Sequence[Sequence[float]], num_stages: int, num_chunks: int) -> list[float]:
    """To the bit what `replay_works` says of each candidate, of any numbers of rows, all at once; with several chunks these are
    multiples of num_stages, as megatron demands.

    Operations are numbered by when they are computed where all take as long, so that whatever one needs, of its own stage or of
    a neighbour, has an earlier number: with n the place among a stage's forwards or backwards, p stages and v chunks, the
    forward n of stage s has 2n + s and its backward 2n - s + 2p - 1; with several chunks, of 2 (n + s) and
    2 (n - s + 2 (p - 1) + (v - 1) p) + 1. What a neighbour must have computed has the number before, with several chunks the
    second before. So all stages of all candidates take a step together."""
    most = max(map(len, candidates), default=0)
    if not most:
        return [0.0] * len(candidates)
    num_parts = num_stages * num_chunks
    assert num_chunks == 1 or not any(len(works) % num_stages for works in candidates), list(map(len, candidates))
    forward = np.zeros((most + 1, len(candidates)))  # of each row, and of a row that is not there
    for place, works in enumerate(candidates):
        forward[: len(works), place] = np.asarray(works) / num_parts
    rows, needed, lag = _steps(num_stages, most, num_chunks)
    durations = np.concatenate((forward, BACKWARD * forward))[rows].reshape(len(rows), -1)  # [steps, stages * candidates]
    there = rows[..., None] % (most + 1) < np.array([len(works) for works in candidates])
    count = len(candidates)
    sources = np.where(there, needed[..., None] * count + np.arange(count), num_stages * count).reshape(len(rows), -1)
    done = np.zeros((lag + len(rows), num_stages * count + 1))  # the last column is what nobody waits for
    ends = list(done[:, :-1])
    for step, (before, found, duration) in enumerate(zip(done, sources, durations, strict=False)):
        now = ends[step + lag]
        before.take(found, out=now, mode="clip")
        np.maximum(now, ends[step + lag - 1], out=now)
        np.add(now, duration, out=now)
    return [float(time) for time in done[-1, :-1].reshape(num_stages, count).max(0)]


def _steps(num_stages: int, num_rows: int, num_chunks: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(Of each step and stage the row that it computes, num_rows where none, and num_rows + 1 more where backward; the stage
    whose result it needs, num_stages where none; how many steps before it has that), both [steps, stages]."""
    stages = np.arange(num_stages)
    if num_chunks == 1:
        lag, num_steps = 1, 2 * (num_rows + num_stages - 1)
        steps = np.arange(num_steps)[:, None]
        backward = (steps - stages) % 2 == 1
        places = np.where(backward, steps + stages - 2 * num_stages + 1, steps - stages) // 2
        inside = (places >= 0) & (places < num_rows)
        rows, first_part = places, np.broadcast_to(stages == 0, places.shape)
        last_part = np.broadcast_to(stages == num_stages - 1, places.shape)
    else:
        behind = 2 * (num_stages - 1) + (num_chunks - 1) * num_stages
        count = num_rows * num_chunks
        lag, num_steps = 2, 2 * (count + behind)
        steps = np.arange(num_steps)[:, None]
        backward = np.broadcast_to(steps % 2 == 1, (num_steps, num_stages))
        places = np.where(backward, steps // 2 + stages - behind, steps // 2 - stages)
        inside = (places >= 0) & (places < count)
        group = num_stages * num_chunks
        rows = places // group * num_stages + places % num_stages
        begins = places % group < num_stages  # with the first chunk forward, and with the last one backward
        first_part, last_part = begins & (stages == 0), begins & (stages == num_stages - 1)
    needed = np.where(backward, (stages + 1) % num_stages, (stages - 1) % num_stages)
    needed = np.where(np.where(backward, last_part, first_part), num_stages, needed)
    return np.where(inside, rows, num_rows) + backward * (num_rows + 1), needed, lag


def order(stage: int, num_stages: int, num_rows: int, num_chunks: int) -> list[Operation]:
    """What a stage computes, in order: its warm-up of forwards, then a forward and a backward in turns, then what is left."""
    num_forwards = num_stages * num_chunks * num_rows
    return [
        Operation(number >= num_forwards, number % num_rows, number % num_forwards // num_rows // num_stages)
        for number in _orders(num_stages, num_rows, num_chunks)[stage]
    ]


def _orders(num_stages: int, num_rows: int, num_chunks: int) -> list[list[int]]:
    """The numbers of what each stage computes, in order."""
    orders = []
    for stage in range(num_stages):
        forwards, backwards = _sequence(stage, num_stages, num_rows, num_chunks)
        behind = num_stages - stage - 1
        warm_up = min(behind if num_chunks == 1 else 2 * behind + (num_chunks - 1) * num_stages, len(forwards))
        steady = len(forwards) - warm_up
        found = forwards[:warm_up]
        for pair in zip(forwards[warm_up:], backwards[:steady], strict=True):
            found += pair
        orders.append(found + backwards[steady:])
    return orders


def _sequence(stage: int, num_stages: int, num_rows: int, num_chunks: int) -> tuple[list[int], list[int]]:
    """Forwards and backwards of a stage by themselves: with several chunks in groups of num_stages rows, chunk by chunk."""
    forwards, backwards = list[int](), list[int]()
    num_parts, group = num_stages * num_chunks, max(1, num_rows) if num_chunks == 1 else num_stages
    for start in range(0, num_rows, group):
        end = min(start + group, num_rows)
        for part in range(stage, num_parts, num_stages):
            forwards += range(part * num_rows + start, part * num_rows + end)
        for part in range(2 * num_parts - num_stages + stage, num_parts - 1, -num_stages):
            backwards += range(part * num_rows + start, part * num_rows + end)
    return forwards, backwards


def _run(orders: Sequence[Sequence[int]], durations: Sequence[float], num_rows: int, num_parts: int, hop: float) -> float:
    """When the last stage has computed all that `orders` has of it."""
    num_forwards, last = num_parts * num_rows, (2 * num_parts - 1) * num_rows  # from `last` on: backwards of the last part
    done: list[float | None] = [None] * (2 * num_forwards)
    num_stages = len(orders)
    hop = hop if num_stages > 1 else 0.0
    clocks, places, going = [0.0] * num_stages, [0] * num_stages, list(range(num_stages))
    while going:
        before, left = sum(places), list[int]()
        for stage in going:
            clock, place, mine = clocks[stage], places[stage], orders[stage]
            while place < len(mine):
                number = mine[place]
                if number >= num_rows:
                    if number >= last:  # its own forward, on the same stage
                        needed = done[number - num_forwards]
                    elif (needed := done[number + num_rows if number >= num_forwards else number - num_rows]) is not None:
                        needed += hop
                    if needed is None:
                        break
                    if needed > clock:
                        clock = needed
                clock += durations[number]
                done[number] = clock
                place += 1
            clocks[stage], places[stage] = clock, place
            if place < len(mine):
                left.append(stage)
        assert not left or sum(places) > before, "a pipeline schedule in which no stage can go on"
        going = left
    return max(clocks)
