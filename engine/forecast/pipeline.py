"""How long a pipeline takes for rows of unequal cost: a replay of megatron-core's 1F1B and interleaved schedules, operation by
operation. Seconds go in and come out; it knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Operation(NamedTuple):
    """A forward or a backward of one row through one model chunk of a stage."""

    backward: bool
    row: int
    chunk: int


Seconds = Callable[[int, Operation], float]  # (stage, operation) -> what it takes


def order(stage: int, num_stages: int, num_rows: int, num_chunks: int) -> list[Operation]:
    """What a stage computes, in order: its warm-up of forwards, then a forward and a backward in turns, then what is left."""
    forwards, backwards = _sequence(num_stages, num_rows, num_chunks)
    behind = num_stages - stage - 1
    warm_up = min(behind if num_chunks == 1 else 2 * behind + (num_chunks - 1) * num_stages, len(forwards))
    steady = len(forwards) - warm_up
    found = forwards[:warm_up]
    for i in range(steady):
        found += [forwards[warm_up + i], backwards[i]]
    return found + backwards[steady:]


def _sequence(num_stages: int, num_rows: int, num_chunks: int) -> tuple[list[Operation], list[Operation]]:
    """Forwards and backwards of a stage by themselves: with several chunks in groups of num_stages rows, chunk by chunk."""
    if num_chunks == 1:
        return [Operation(False, i, 0) for i in range(num_rows)], [Operation(True, i, 0) for i in range(num_rows)]
    forwards, backwards = [], []
    for start in range(0, num_rows, num_stages):
        group = range(start, min(start + num_stages, num_rows))
        forwards += [Operation(False, row, chunk) for chunk in range(num_chunks) for row in group]
        backwards += [Operation(True, row, chunk) for chunk in reversed(range(num_chunks)) for row in group]
    return forwards, backwards


def replay(num_stages: int, num_rows: int, num_chunks: int, seconds: Seconds, hop: float = 0.0) -> float:
    """Until every stage has done every row, forward and backward. `hop`: until a stage has what its neighbour computed."""
    return _run([order(stage, num_stages, num_rows, num_chunks) for stage in range(num_stages)], num_chunks, seconds, hop)


def replay_forward(num_stages: int, num_rows: int, num_chunks: int, seconds: Seconds, hop: float = 0.0) -> float:
    """The same of forwards alone."""
    forwards, _ = _sequence(num_stages, num_rows, num_chunks)
    return _run([forwards] * num_stages, num_chunks, seconds, hop)


def _run(orders: Sequence[Sequence[Operation]], num_chunks: int, seconds: Seconds, hop: float) -> float:
    num_stages = len(orders)
    done: dict[tuple[int, Operation], float] = {}
    clocks, places = [0.0] * num_stages, [0] * num_stages
    left = sum(map(len, orders))
    while left:
        before = left
        for stage in range(num_stages):
            while places[stage] < len(orders[stage]):
                operation = orders[stage][places[stage]]
                ready = _ready(stage, operation, num_stages, num_chunks, done, hop)
                if ready is None:
                    break
                clocks[stage] = max(clocks[stage], ready) + seconds(stage, operation)
                done[stage, operation] = clocks[stage]
                places[stage] += 1
                left -= 1
        assert left < before, "a pipeline schedule in which no stage can go on"
    return max(clocks)


def _ready(
    stage: int,
    operation: Operation,
    num_stages: int,
    num_chunks: int,
    done: dict[tuple[int, Operation], float],
    hop: float,
) -> float | None:
    """When what an operation needs is there; None where it is not known yet."""
    backward, row, chunk = operation
    if not backward:
        if stage == 0 and chunk == 0:
            return 0.0
        before = (stage - 1, operation) if stage else (num_stages - 1, Operation(False, row, chunk - 1))
    elif stage < num_stages - 1:
        before = (stage + 1, operation)
    elif chunk < num_chunks - 1:
        before = (0, Operation(True, row, chunk + 1))
    else:
        before = (stage, Operation(False, row, chunk))
    found = done.get(before)
    return None if found is None else found + (hop if before[0] != stage else 0.0)
