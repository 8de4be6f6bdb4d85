"""The forecast in tables and sentences: where the time goes, what binds, what to change, and how far the figures may be
trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.capacity.kv_cache import GIB
from engine.config.load import RunConfig
from engine.forecast.constants import Constants, Row, rows
from engine.forecast.lengths import LogNormal, Workload
from engine.forecast.search import Found
from engine.forecast.seconds import TRAIN_PARTS, Forecast, Regime

WORTH_TELLING = 0.05  # of a step: what is less is not told
NAMES = {
    "reference": "reference's forward",
    "again": "policy's forward for split groups",
    "compute": "forward and backward",
    "imbalance": "uneven data-parallel ranks",
    "pipeline": "pipeline stages waiting",
    "tensor_parallel": "tensor-parallel sums",
    "gradients": "gradients, parameters gathered",
    "optimizer": "optimizer",
    "fixed": "the same for any step",
}
KEYS = {  # of what JSON has under "seconds"
    "rollouts": "waiting for responses",
    "rewards": "waiting for rewards",
    "host": "rank 0: handing out, packing",
    "training": "training",
    "weight sync": "weight sync, engines asleep and awake",
}


def binding(found: Forecast, config: RunConfig) -> list[tuple[float, str]]:
    """(share of a step, what takes it and what would change that), the largest first."""
    seconds, parts, t = found.step_seconds, found.parts, config.trainer
    workers = config.rewards.workers or "as many as there are cores"
    told: list[tuple[float, str]] = [
        (parts["rollouts"] / seconds, _rollouts(found, config)),
        (
            parts["rewards"] / seconds,
            f"rewards come after the step's last response: raise rewards.workers (now {workers})"
            if config.reward_model.path is None
            else "the reward model judges after the step's last response: raise reward_model.engines (now "
            f"{config.reward_model.engines}), or a smaller model, or shorter responses",
        ),
        (parts["host"] / seconds, "rank 0 hands a step's sequences out and every rank packs: fewer sampled tokens a step"),
        (
            parts["weight sync"] / seconds,
            "weight syncs: a larger sync.sync_interval" + (", or engines on fewer nodes" if config.cluster.nodes > 1 else ""),
        ),
    ]
    changes = {
        "reference": "the reference scores every step: a loss without one, or more trainer ranks",
        "again": f"groups larger than a row are scored twice: raise trainer.microbatch_tokens (now {t.microbatch_tokens})",
        "compute": "forward and backward: more trainer ranks" + (", or trainer.recompute = false" if t.recompute else ""),
        "imbalance": f"uneven data-parallel ranks: a smaller trainer.data_parallel (now {t.data_parallel}), or more prompts",
        "pipeline": "stages wait for each other: more prompts a step, "
        + ("" if t.virtual_pipeline > 1 else "trainer.virtual_pipeline, ")
        + f"or a smaller trainer.pipeline_parallel (now {t.pipeline_parallel})",
        "tensor_parallel": f"tensor-parallel sums: a smaller trainer.tensor_parallel (now {t.tensor_parallel})",
        "gradients": "gradients are summed after the last backward: a smaller trainer.data_parallel, or more prompts a step",
        "optimizer": "the optimizer: trainer.distributed_optimizer"
        + (
            f", or a smaller optimizer.offload_share (now {config.optimizer.offload_share:g})"
            if config.optimizer.offload_share
            else ""
        ),
        "fixed": "what a step costs whatever it trains on: more prompts a step",
    }
    told += [(found.train_parts[name] / seconds, changes[name]) for name in TRAIN_PARTS]
    if found.preempted:
        told.append(
            (
                WORTH_TELLING,
                "answers outgrow the KV cache and are computed again: a larger inference.kv_cache, or a smaller "
                f"inference.max_concurrent (now {config.inference.max_concurrent})",
            )
        )
    return sorted((one for one in told if one[0] >= WORTH_TELLING), key=lambda one: -one[0])


def _rollouts(found: Forecast, config: RunConfig) -> str:
    """Why the trainer waits: for the longest response, or for all of them."""
    i = config.inference
    if config.inference.placement == "colocated" and found.sync_interval == 1:
        return f"trainer and engines take turns: a larger inference.tensor_parallel (now {i.tensor_parallel}), or a larger s"
    if config.inference.placement == "colocated":
        return "trainer and engines take turns: inference.placement = 'disaggregated' lets them overlap"
    if found.most_open <= found.most_concurrent and not found.preempted:
        if not config.sync.lookahead and found.sync_interval not in (1, "never"):
            return (
                f"an engine samples a whole interval at once ({found.most_concurrent} together), so its first step is hardly "
                f"there before its last: a smaller inference.max_concurrent (now {i.max_concurrent}), or sampling further ahead"
            )
        return (
            f"the longest response decides, for an engine samples all that it is asked at once ({found.most_concurrent} "
            f"together): a larger s, or sampling further ahead; more engines change little"
        )
    if found.preempted or found.most_concurrent < i.max_concurrent:
        return (
            f"the engines' KV caches are full ({found.most_concurrent} answers together): a larger inference.kv_cache, or more "
            f"engines (now {i.engines})"
        )
    return (
        f"engines are full ({i.max_concurrent} together): more engines (now {i.engines}), or a larger inference.max_concurrent "
        f"with its KV cache"
    )


def parts_table(found: Forecast) -> list[tuple[str, str, str]]:
    """Where a step's seconds go: heading, then a row each."""
    body = [("a step", "seconds", "share")]
    for name, label in KEYS.items():
        if name == "training":
            continue
        body.append((label, *_cells(found.parts[name], found.step_seconds)))
    body.append((KEYS["training"], *_cells(found.parts["training"], found.step_seconds)))
    body += [
        (f"  {NAMES[name]}", *_cells(found.train_parts[name], found.step_seconds))
        for name in TRAIN_PARTS
        if found.train_parts[name] > 0
    ]
    return [*body, ("in all", f"{found.step_seconds:.2f}", "100%")]


def _cells(seconds: float, whole: float) -> tuple[str, str]:
    return f"{seconds:.3f}", f"{seconds / whole:.0%}"


def run_table(found: Forecast) -> list[tuple[str, str]]:
    """Rates, idle shares, hours and bytes of the run."""
    step, days = found.training, found.run_seconds / 86400
    evaluations = "not counted: no file of problems here"
    if found.evaluation_seconds is not None:
        evaluations = f"{found.num_evaluations} of {found.evaluation_seconds:,.0f} s"
    return [
        ("the run", found.regime),
        ("sampled", f"{found.sampled_tokens_per_second:,.0f} tokens/s"),
        ("trained", f"{found.trained_tokens_per_second:,.0f} tokens/s"),
        ("MFU of the trainer", f"{found.mfu:.1%}; {found.mfu_training:.1%} while it trains"),
        ("trainer waits", f"{found.trainer_waits:.0%} of the time"),
        ("engines idle", f"{found.engines_idle:.0%} of the time"),
        ("rows", f"{step.num_rows} a rank, {step.row_fill:.0%} full, {step.empty_rows:.0%} empty"),
        ("fullest data-parallel rank", f"{step.imbalance:.3f} of the mean's work"),
        ("in all", f"{_span(found.run_seconds)} = {found.gpu_hours:,.0f} GPU-hours on {found.gpus} GPUs ({days:.2f} days)"),
        *_booked(found),
        ("evaluations", evaluations),
    ]


def _booked(found: Forecast) -> list[tuple[str, str]]:
    if found.booked_gpus == found.gpus:
        return []
    hours = found.gpu_hours * found.booked_gpus / found.gpus
    return [("with all GPUs of its nodes", f"{hours:,.0f} GPU-hours on {found.booked_gpus}")]


def hosts_table(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run's nodes read, hold and write: of `planned`'s figures. Heading, then a row each."""
    hosts, saved, found = figures["hosts"], figures["checkpoint"], figures["forecast"]
    body = [("nodes, disk", f"{hosts['nodes']} node{'s' if hosts['nodes'] > 1 else ''}")]
    if saved is not None:
        body += [
            ("a checkpoint", f"{_gb(saved['num_bytes'])}, each element once; {_gb(saved['rank_bytes'])} by the fullest rank"),
            ("training waits for it", f"{saved['pause_seconds']:,.1f} s"),
            ("and it is named after", f"{saved['pause_seconds'] + saved['write_seconds']:,.0f} s"),
            ("checkpoints", f"{saved['count']}, {_gb(saved['kept_bytes'])} on the disk at the fullest"),
        ]
    held = {name: size for name, size in hosts["held"].items() if size}
    body += [(f"host memory of a node, {name}", _gb(size)) for name, size in held.items()]
    body += [
        ("host memory of a node, in all", _gb(sum(held.values()))),
        ("weights read at the start, a node", f"{_gb(hosts['most_read'])} at most, of {_gb(hosts['weights_bytes'])}"),
        ("and off the file system in all", _gb(hosts["read"])),
    ]
    if found is not None:
        body.append(("records", f"{_gb(found['ledger_bytes_per_day'])} a day"))
    return body


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.0f} MB"


def _span(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"


def intervals_table(found: Many[Forecast], own: Regime) -> list[tuple[str, ...]]:
    """Staleness and seconds for several s and lookaheads, in flight and streaming; the run's own are marked."""
    heading = (
        "s",
        "lookahead",
        "staleness, mean",
        "most",
        "s a step",
        "trainer waits",
        "engines idle",
        "tokens/s",
        "GPU-hours",
    )
    return [
        heading,
        *(
            (
                f"{one.sync_interval}{' *' if (one.sync_interval, one.lookahead, one.in_flight, one.streaming) == own else ''}",
                _ahead(one.lookahead, one.in_flight, one.streaming),
                f"{one.staleness_mean:.1f}",
                str(one.staleness_max),
                f"{one.step_seconds:.2f}",
                f"{one.trainer_waits:.0%}",
                f"{one.engines_idle:.0%}",
                f"{one.sampled_tokens_per_second:,.0f}",
                f"{one.gpu_hours:,.0f}",
            )
            for one in found
        ),
    ]


def _ahead(lookahead: int, in_flight: bool, streaming: bool) -> str:
    """A lookahead, and what else overlaps."""
    return f"{lookahead}{', in flight' * in_flight}{', streaming' * streaming}"


def best_table(found: Many[Found]) -> list[tuple[str, ...]]:
    """Layouts, the best first, with what binds each."""
    heading = ("layout", "GPUs", "s a step", "trainer waits", "engines idle", "GPU-hours", "GiB to spare", "binds")
    body: list[tuple[str, ...]] = [
        (
            one.layout,
            str(one.forecast.gpus),
            f"{one.forecast.step_seconds:.2f}",
            f"{one.forecast.trainer_waits:.0%}",
            f"{one.forecast.engines_idle:.0%}",
            f"{one.forecast.gpu_hours:,.0f}",
            f"{one.spare_bytes / GIB:.0f}",
            binding(one.forecast, one.config)[0][1].partition(":")[0],
        )
        for one in found
    ]
    return [heading, *(body or [("none fits", *[""] * (len(heading) - 1))])]


def frontier_table(best: Mapping[Regime, Many[Found]], own: Regime) -> list[tuple[str, ...]]:
    """The best of each regime: seconds and GPU-hours against staleness."""
    heading = ("s", "lookahead", "staleness, mean", "s a step", "GPUs", "GPU-hours", "layout")
    return [
        heading,
        *(
            (
                f"{regime.interval}{' *' if regime == own else ''}",
                _ahead(*regime[1:]),
                f"{found[0].forecast.staleness_mean:.1f}",
                f"{found[0].forecast.step_seconds:.2f}",
                str(found[0].forecast.gpus),
                f"{found[0].forecast.gpu_hours:,.0f}",
                found[0].layout,
            )
            for regime, found in best.items()
            if found
        ),
    ]


def trust(constants: Constants, measured: dict[str, str], workload: Workload, config: RunConfig, nodes: int) -> str:
    """How far the figures may be trusted, and what they leave out."""
    table = rows(constants, measured)
    guesses = [row for row in table if row.kind == "guess"]
    prompts = workload.prompts
    text = f"responses: {workload.completions}; prompts: "
    text += f"{prompts.mean:,.0f} tokens" if isinstance(prompts, LogNormal) else str(prompts)
    judge = config.reward_model.path
    if judge is not None and not (Path(judge) / "config.json").exists():
        text += (
            f"\nthe reward model's time is not counted, for there is no {Path(judge) / 'config.json'}: a folder with that file "
            f"alone is enough for a plan"
        )
    if config.sync.streaming:
        text += "\nthe waves of sync.streaming are those of the drawn lengths; that their rows are less full is not counted"
    if places := sorted({how.rpartition("; ")[2] for how in measured.values() if "; " in how}):
        text += f"\n{len(measured)} constants were measured: {'; '.join(places)}"
    if guesses:
        text += (
            f"\n{len(guesses)} of {len(table)} constants are guesses that no GPU has verified: the order of layouts is worth "
            f"more than the seconds; `semion calibrate` measures some of them, `--constants` lists them"
        )
    if nodes > 1:
        text += "\ncommunication between nodes is arithmetic on bandwidths and has never been compared with a measurement"
    return text


def constants_table(constants: Constants, measured: dict[str, str]) -> list[tuple[str, ...]]:
    """All constants with their sources."""
    heading = ("constant", "value", "unit", "source", "what it is")
    return [heading, *((row.name, f"{row.value:g}", row.unit, _source(row), row.meaning) for row in rows(constants, measured))]


def _source(row: Row) -> str:
    return f"{row.kind}: {row.source}"


def as_figures(found: Forecast, config: RunConfig) -> dict[str, Any]:
    """A forecast for the JSON file."""
    figures: dict[str, Any] = json.loads(json.dumps(asdict(found)))
    figures["gpu_hours"] = found.gpu_hours
    figures["binds"] = [{"share": share, "what": text} for share, text in binding(found, config)]
    return figures
