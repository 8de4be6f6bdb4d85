"""How evenly a step's work is dealt, and what a pipeline loses: the trainer's own dealing of drawn lengths, beside dealing by
tokens in whole units, and beside rows that are as few and as full as first fit makes them. bench_scale.py prints it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from engine.config.options import Trainer
from engine.forecast.lengths import LogNormal
from engine.forecast.pipeline import Operation, replay
from engine.megatron.dealing import Costs, Outline, deal_step, units_of

ATTENTION = 1 / 61_000  # what a look at a key costs next to the products of a token, of an 8B Llama
PROMPT = 150  # tokens
SHORT, LONG = LogNormal(700, 0.6, 8_000), LogNormal(4000, 0.9, 32_768)
ROW_TOKENS = {SHORT: 8_192, LONG: 33_792}
Dealt = list[list[list[Outline]]]  # rows of every rank


@dataclass(frozen=True, slots=True)
class Case:
    """What is dealt: `group` sequences are compared with each other, and none where that is 1; 16 have one prompt, or all of a
    group."""

    loss: str
    group: int
    num_sequences: int
    data_parallel: int
    pipeline_parallel: int = 1


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
    (Case("GRPO", 1, 1024, 8, 4), SHORT),
    (Case("GRPO", 1, 1024, 16, 8), LONG),
    (Case("GRPO", 1, 512, 32, 4), SHORT),
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


def imbalance(dealt: Dealt, costs: Costs) -> float:
    """The work of the fullest rank over the mean."""
    work = [sum(map(costs.work, rows)) for rows in dealt]
    return max(work) / fmean(work)


def over_ideal(dealt: Dealt, costs: Costs, num_stages: int) -> float:
    """How long the slowest rank's pipeline takes, over a step in which no stage and no rank ever waits."""
    work = [[costs.work(row) if row else 0.0 for row in rows] for rows in dealt]

    def seconds(rows: list[float]) -> float:
        def of(_: int, operation: Operation) -> float:
            return (2.0 if operation.backward else 1.0) * rows[operation.row] / num_stages

        return replay(num_stages, len(rows), 1, of)

    return max(map(seconds, work)) / (3.0 * fmean(map(sum, work)) / num_stages)


def both(case: Case, lengths: LogNormal, num_draws: int) -> list[tuple[float, float]]:
    """Of each draw (by tokens, as dealt now): imbalance, or with a pipeline the step over the ideal one."""
    trainer = Trainer(
        data_parallel=case.data_parallel,
        pipeline_parallel=case.pipeline_parallel,
        microbatch_tokens=ROW_TOKENS[lengths],
    )
    found = []
    for number in range(num_draws):
        outlines = drawn(case, lengths, random.Random(number))
        shares = deal_step(outlines, step=0, num_prompts=0, trainer=trainer, attention=ATTENTION)
        now = [list(map(list, share.rows)) for share in shares]
        pair = []
        for dealt, costs in ((by_tokens(outlines, trainer), Costs(False, ATTENTION)), (now, Costs(True, ATTENTION))):
            stages = case.pipeline_parallel
            pair.append(imbalance(dealt, costs) if stages == 1 else over_ideal(dealt, costs, stages))
        found.append((pair[0], pair[1]))
    return found


def bound(case: Case, lengths: LogNormal, num_draws: int) -> float:
    """What no dealing can be below, of whole groups and sequences: the largest one over a rank's mean."""
    costs, least = Costs(True, ATTENTION), []
    for number in range(num_draws):
        outlines = drawn(case, lengths, random.Random(number))
        units = units_of(outlines, costs) if case.group > 1 else [[one] for one in outlines]
        mean = costs.work(outlines) / case.data_parallel
        least.append(max(1.0, max(map(costs.work, units)) / mean))
    return fmean(least)


def balance(num_draws: int) -> dict[str, list[dict[str, Any]]]:
    """Prints and returns both tables, means over the draws."""
    print("work of the fullest data-parallel rank over the mean; by tokens in whole units, as it is dealt, and the bound")
    print("loss       sequences  ranks |  700 tokens: by tokens    now  bound |  4,000 tokens: by tokens    now  bound")
    tables: dict[str, list[dict[str, Any]]] = {"balance": [], "pipeline": []}
    for case in BALANCE:
        row: dict[str, Any] = {"loss": case.loss, "sequences": case.num_sequences, "ranks": case.data_parallel}
        text = f"{case.loss:10s} {case.num_sequences:9d} {case.data_parallel:6d}"
        for lengths in (SHORT, LONG):
            pairs = both(case, lengths, num_draws)
            before, now, least = fmean(a for a, _ in pairs), fmean(b for _, b in pairs), bound(case, lengths, num_draws)
            row[f"{lengths.mean:.0f}"] = {"by_tokens": before, "now": now, "bound": least}
            text += f" | {before:23.3f} {now:6.3f} {least:6.3f}"
        tables["balance"].append(row)
        print(text)
    print("\na pipeline's step over one in which nobody waits; rows as few as first fit makes, and as they are made")
    for case, lengths in PIPELINES:
        pairs = both(case, lengths, num_draws)
        before, now = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
        name = f"{case.loss} {case.num_sequences} sequences of {lengths.mean:.0f}, {case.data_parallel} ranks"
        print(f"{name}, {case.pipeline_parallel} stages: {before:.2f} {now:.2f}")
        tables["pipeline"].append({"case": name, "stages": case.pipeline_parallel, "by_tokens": before, "now": now})
    assert all(math.isfinite(row["now"]) for row in tables["pipeline"])
    return tables
