"""How evenly a step's work is dealt, and what a pipeline loses: the trainer's own dealing of drawn lengths, beside dealing by
tokens in whole units, and beside rows that are as few and as full as first fit makes them. bench_scale.py prints it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from engine.config.options import Trainer
from engine.forecast.lengths import LogNormal
from engine.megatron.balancing import SCORED_FIRST
from engine.megatron.dealing import deal_step, too_large
from engine.megatron.outlines import Costs, Outline, units_of
from engine.megatron.pipeline import BACKWARD, replay_works
from engine.megatron.pipelined_rows import ROW_COST_TOKENS

ATTENTION = 1 / 61_000  # what a look at a key costs next to the products of a token, of an 8B Llama
PROMPT = 150  # tokens
SHORT, LONG = LogNormal(700, 0.6, 8_000), LogNormal(4000, 0.9, 32_768)
ROW_TOKENS = {SHORT: 8_192, LONG: 33_792}
Dealt = list[list[list[Outline]]]  # rows of every rank
Layout = tuple[Dealt, Costs, list[frozenset[int]]]  # with the groups of each rank that are split, and so scored first


@dataclass(frozen=True, slots=True)
class Case:
    """What is dealt: `group` sequences are compared with each other, and none where that is 1; 16 have one prompt, or all of a
    group."""

    loss: str
    group: int
    num_sequences: int
    data_parallel: int
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1


BALANCE = [
    *(Case("GRPO", 1, count, ranks) for count, ranks in ((64, 16), (256, 16), (256, 32), (256, 64))),
    *(Case("GRPO", 1, 1024, ranks) for ranks in (4, 16, 32, 64)),
    Case("GRPO", 1, 4096, 64),
    *(Case("DPO", 2, 256, ranks) for ranks in (16, 32, 64)),
    *(Case("DPO", 2, 1024, ranks) for ranks in (16, 32, 64)),
    *(Case("GroupDPO", 16, 1024, ranks) for ranks in (16, 32, 64)),
    Case("GroupDPO", 16, 256, 16),
    Case("DPO", 2, 76, 32),  # the paper's 64 prompts, of which 38 have a pair
    Case("DPO", 2, 128, 32),
]
PIPELINES = [
    (Case("DPO", 2, 128, 4, 8), SHORT),
    (Case("DPO", 2, 256, 4, 8, 2), SHORT),  # configs/scale/llama-3.1-405b.toml, where every prompt has a pair
    (Case("GRPO", 1, 1024, 8, 4), SHORT),
    (Case("GRPO", 1, 1024, 8, 4, 2), SHORT),
    (Case("GRPO", 1, 1024, 16, 8), LONG),
    (Case("GRPO", 1, 1024, 16, 8, 2), LONG),
    (Case("GRPO", 1, 512, 32, 4), SHORT),
    (Case("GRPO", 1, 2048, 4, 8, 2), SHORT),
]


def drawn(case: Case, lengths: LogNormal, draw: random.Random) -> list[Outline]:
    """The sequences of a step."""
    of_prompt = 16 if case.group == 1 else case.group
    return [
        Outline(i, PROMPT, lengths.draw(draw.random() or 0.5), i // case.group if case.group > 1 else -1, i // of_prompt)
        for i in range(case.num_sequences)
    ]


def by_tokens(outlines: Sequence[Outline], trainer: Trainer) -> Dealt:
    """The peer: whole units, the one with most tokens to the rank with fewest first; rows by first fit; no prompt is shared."""
    costs, ranks = Costs(False), [list[list[Outline]]() for _ in range(trainer.data_parallel)]
    loads = [0] * trainer.data_parallel
    for unit in sorted(units_of(outlines, costs), key=lambda unit: -costs.num_tokens(unit)):
        rank = min(range(len(loads)), key=loads.__getitem__)
        ranks[rank].append(unit)
        loads[rank] += costs.num_tokens(unit)
    dealt: Dealt = []
    for units in ranks:
        rows: list[list[Outline]] = []
        for unit in units:
            fits = costs.num_tokens(unit) <= trainer.microbatch_tokens
            for part in [unit] if fits else [[one] for one in unit]:
                row = next((r for r in rows if costs.num_tokens([*r, *part]) <= trainer.microbatch_tokens), None)
                if row is None:
                    rows.append(row := [])
                row += part
        dealt.append(rows)
    most = max(map(len, dealt))
    return [rows + [[] for _ in range(most - len(rows))] for rows in dealt]


def works(dealt: Dealt, costs: Costs, split: list[frozenset[int]] | None = None) -> list[float]:
    """The work of every rank; `split`: of each its groups that are split, whose rows are scored first."""
    apart = split or [frozenset[int]()] * len(dealt)
    return [
        sum(costs.work(row) * (1 + SCORED_FIRST * any(one.group in groups for one in row)) for row in rows)
        for rows, groups in zip(dealt, apart, strict=True)
    ]


def over_ideal(dealt: Dealt, costs: Costs, num_stages: int, num_chunks: int) -> float:
    """How long the slowest rank's pipeline takes, with what rows cost beside their tokens, over a step without such costs in
    which no stage and no rank ever waits and no prompt is computed twice on a rank."""
    works = [[costs.work(row) + ROW_COST_TOKENS for row in rows + [[]] * (-len(rows) % num_stages)] for rows in dealt]
    if num_chunks == 1:
        works = [own[: len(rows)] for own, rows in zip(works, dealt, strict=True)]
    once = Costs(True, costs.attention)
    ideal = fmean(once.work([one for row in rows for one in row]) for rows in dealt)
    passes = 1.0 + BACKWARD
    return max(replay_works(own, num_stages, num_chunks) for own in works) / (passes * ideal / num_stages)


def dealt_twice(case: Case, lengths: LogNormal, number: int, *, cuts_groups: bool = False) -> tuple[Layout, Layout]:
    """A draw as the peer deals it and as it is dealt now."""
    trainer = trainer_of(case, lengths)
    outlines = drawn(case, lengths, random.Random(number))
    shares = deal_step(outlines, step=0, num_prompts=0, trainer=trainer, attention=ATTENTION, cuts_groups=cuts_groups)
    now, split = [list(map(list, share.rows)) for share in shares], [share.split for share in shares]
    peer, costs = by_tokens(outlines, trainer), Costs(False, ATTENTION)
    larger = [frozenset(too_large([one for row in rows for one in row], trainer, costs)) for rows in peer]
    return (peer, costs, larger), (now, Costs(True, ATTENTION), split)


def dealing_seconds(case: Case, lengths: LogNormal) -> float:
    """Of CPU, for about a million trained tokens: the fastest of three, a million tokens."""
    together = 16 if case.group == 1 else case.group
    case = replace(case, num_sequences=round(1e6 / lengths.mean / together) * together)
    trainer, outlines = trainer_of(case, lengths), drawn(case, lengths, random.Random(0))
    found = []
    for _ in range(3):
        started = time.process_time()
        deal_step(outlines, step=0, num_prompts=0, trainer=trainer, attention=ATTENTION, cuts_groups=case.group > 2)
        found.append(time.process_time() - started)
    return min(found) / sum(one.num_completion for one in outlines) * 1e6


def trainer_of(case: Case, lengths: LogNormal) -> Trainer:
    """Its layout."""
    return Trainer(
        data_parallel=case.data_parallel,
        pipeline_parallel=case.pipeline_parallel,
        virtual_pipeline=case.virtual_pipeline,
        microbatch_tokens=ROW_TOKENS[lengths],
    )


def bound(case: Case, lengths: LogNormal, num_draws: int) -> float:
    """What no dealing of whole groups and sequences can be below: the largest one over a rank's mean."""
    costs, least = Costs(True, ATTENTION), []
    for number in range(num_draws):
        outlines = drawn(case, lengths, random.Random(number))
        units = units_of(outlines, costs) if case.group > 1 else [[one] for one in outlines]
        mean = costs.work(outlines) / case.data_parallel
        least.append(max(1.0, max(map(costs.work, units)) / mean))
    return fmean(least)


def balance(num_draws: int) -> dict[str, list[dict[str, Any]]]:
    """Prints and returns both tables, means over the draws."""
    draws, tables = range(num_draws), dict[str, list[dict[str, Any]]](balance=[], pipeline=[])
    print("work of the fullest data-parallel rank over the mean, with what is scored first: by tokens in whole units without")
    print("shared prompts, as dealt in whole groups, as dealt where groups may be cut, what whole groups and sequences allow")
    print("if nothing is scored first; and the fullest rank's work as it is dealt over the peer's")
    names = "".join(f" | {lengths.mean:>6.0f} tokens: peer  whole    now  bound   work" for lengths in (SHORT, LONG))
    print(f"loss       sequences  ranks{names}")
    for case in BALANCE:
        row: dict[str, Any] = {"loss": case.loss, "sequences": case.num_sequences, "ranks": case.data_parallel}
        text = f"{case.loss:10s} {case.num_sequences:9d} {case.data_parallel:6d}"
        for lengths in (SHORT, LONG):
            sides: list[tuple[list[float], list[float], list[float]]] = []
            for number in draws:
                peer, whole = dealt_twice(case, lengths, number)
                cut = dealt_twice(case, lengths, number, cuts_groups=True)[1]
                sides.append((works(*peer), works(*whole), works(*cut)))
            before, kept = (fmean(max(side[i]) / fmean(side[i]) for side in sides) for i in (0, 1))
            now = fmean(max(cut_works) / fmean(whole_works) for _, whole_works, cut_works in sides)
            least, less = bound(case, lengths, num_draws), fmean(max(side[2]) / max(side[0]) for side in sides)
            row[f"{lengths.mean:.0f}"] = {
                **{"by_tokens": before, "whole": kept, "now": now},
                **{"bound": least, "fullest_over_fullest": less},
            }
            text += f" | {before:19.3f} {kept:6.3f} {now:6.3f} {least:6.3f} {less:6.3f}"
        tables["balance"].append(row)
        print(text)
    print(
        "\na pipeline's step, with what rows cost, over one in which nobody waits: rows as few as first fit makes, and as they"
    )
    print("are made; the mean number of rows of each; seconds of CPU that dealing takes a million trained tokens")
    for case, lengths in PIPELINES:
        twice = [dealt_twice(case, lengths, number, cuts_groups=case.group > 2) for number in draws]
        stages, chunks = case.pipeline_parallel, case.virtual_pipeline
        before, now = (fmean(over_ideal(*both[side][:2], stages, chunks) for both in twice) for side in (0, 1))
        few, made = (fmean(len(both[side][0][0]) for both in twice) for side in (0, 1))
        name = f"{case.loss} {case.num_sequences} sequences of {lengths.mean:.0f}, {case.data_parallel} ranks"
        seconds = dealing_seconds(case, lengths)
        told = f"{before:.2f} with {few:.0f} rows, {now:.2f} with {made:.0f}; {seconds:.4f} s"
        print(f"{name}, {stages} stages of {chunks} chunks: {told}")
        found = {"case": name, "stages": stages, "chunks": chunks, "by_tokens": before, "now": now, "rows": made}
        found["dealing_seconds_per_million"] = seconds
        tables["pipeline"].append(found)
    return tables
