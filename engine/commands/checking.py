"""`semion check`: all that can be seen wrong with a run before it starts, a line a fault, and the run as resolved."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.capacity.memory import H200_BYTES
from engine.config.load import dump_config, read_config, toml
from engine.core.errors import combined, unique

if TYPE_CHECKING:
    from engine.capacity.kv_cache import KvCache
    from engine.rewards.registry import Where
    from engine.run.spec import Spec


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--resume", choices=["auto"], help="check the run as `semion train --resume auto` would go on with it")
    parser.add_argument("--toml", action="store_true", help="print every option with its value instead, as a file to load")
    parser.add_argument("--json", metavar="PATH", help="write the run as resolved to this file too")


def check(options: argparse.Namespace) -> None:
    """Prints the run; raises all faults at once, those of the configuration before those of what it names."""
    config, found, unread = read_config(options.config, options.overrides)
    if config is None:
        raise combined(found)
    if options.toml and not unread:
        print(dump_config(config), end="")
    from engine.api.faults.look import Look, parts_of
    from engine.api.preflight import faults_of, purpose_of
    from engine.api.warnings import warnings
    from engine.observe.progress import print_table
    from engine.observe.writing import write_json
    from engine.run.spec import resolve

    purpose = purpose_of(config)
    look = Look(config, purpose, options.resume is not None, unread=unread)
    if faults := unique([*found, *faults_of(look)]):
        raise combined(faults)
    spec = resolve(config, parts_of(config, purpose))
    if not options.toml:
        print_table(f"semion check {options.config}", table(spec))
        for warning in warnings(spec, look.tokenizer):
            print(f"warning: {warning}")
    if options.json:
        write_json(options.json, json.loads(spec.to_json()))


def table(spec: Spec) -> list[tuple[str, str]]:
    """The run for people: heading, then a row a fact."""
    from engine.rewards.registry import where_judged

    c, shape, t, e = spec.config, spec.shape, spec.trainer, spec.engine
    rows = [
        ("what", "as resolved"),
        ("model", f"{shape.num_layers} layers, hidden {shape.hidden}, vocabulary {shape.vocab_size}, {c.model.dtype}"),
        ("source", {"rollouts": "rollouts, sampled by engines"}.get(spec.source, spec.source)),
        ("trainer ranks", f"{c.trainer.world_size}: tensor {t.tp_size}, pipeline {t.pp_size}, data {c.trainer.data_parallel}"),
        ("trainer layers", t.spec),
        ("kept beside the policy", ", ".join(spec.copies) or "no copy of its weights"),
    ]
    if spec.source == "rollouts":
        oldest = max(map(c.schedule.staleness, range(c.run.steps)))
        rows.append(("regime", f"{c.schedule.regime}: answers at most {oldest} steps old"))
    if spec.starts_engines:
        rows.append(("inference engines", f"{c.inference.engines}: tensor {e.tp_size}, {c.inference.placement}"))
    if spec.starts_engines and c.inference.quantization != "none":
        kind = c.inference.quantization.upper()
        rows.append(("engines' weights", f"layers' matrices in {kind}, quantized at each weight sync"))
    if spec.starts_engines and c.inference.vllm:
        rows.append(
            ("further arguments of vLLM", ", ".join(f"{key} = {toml(value)}" for key, value in c.inference.vllm.items()))
        )
    if spec.kv_cache is not None:
        sizes = dict(cache_sizes(spec.kv_cache))
        rows += [(f"KV cache{where}", spec.kv_cache.told(size)) for where, size in sizes.items()]
    if spec.starts_reward_engine:
        count = spec.num_reward_engines
        rows.append(("reward model", f"{c.reward_model.path}, on {count} engine{'s' * (count > 1)} of its own"))
    if spec.starts_engines:
        rows += [(f"judged by {name}", _judged(spec, where)) for name, where in where_judged(c).items()]
    rows += [(f"weight syncs on {carrier.device}", f"{carrier.kind or 'none'}: {carrier.why}") for carrier in spec.transports]
    if spec.placement is not None:
        nodes = len({assignment.node for assignment in spec.placement.assignments})
        gpus = {(assignment.node, gpu) for assignment in spec.placement.assignments for gpu in assignment.gpus}
        rows.append(("GPUs, where there are any", f"{len(gpus)} on {nodes} nodes"))
    judged = _steps(spec.evaluation_steps)
    rows += [(f"evaluated: {found.name}", f"{found.path} after steps {judged}") for found in spec.evaluation_sets]
    rows.append(("checkpoints", f"after steps {_steps(spec.checkpoint_steps)}" if spec.checkpoint_steps else "none"))
    rows += [(f"digest of {name}", (digest or "none")[:16]) for name, digest in spec.digests.items()]
    return rows


def _judged(spec: Spec, where: Where) -> str:
    """What a reward gets in each call, and where it judges."""
    what = f"each {where.together}"
    if where.kind == "engines":
        return f"{what}, on the reward model's engines"
    if where.kind == "class":
        on = "each node" if where.every_node else "rank 0's node"
        return f"{what}, one call at a time, on {on}"
    workers = spec.config.rewards.workers
    count = "a process a free core" if workers is None else f"{workers} process{'es' * (workers > 1)}"
    return f"{what}, by {count} on {'each node' if len(spec.nodes) > 1 else 'this node'}"


def cache_sizes(cache: KvCache) -> Iterator[tuple[str, int]]:
    """Where a KV cache would have which size: bytes."""
    if cache.asked_bytes is not None:
        yield "", cache.asked_bytes
        return
    yield " on a CPU", cache.num_bytes(None)
    yield f" on a GPU of {H200_BYTES >> 30} GiB", cache.num_bytes(H200_BYTES)


def _steps(steps: tuple[int, ...]) -> str:
    shown = [str(step) for step in (steps if len(steps) <= 4 else (*steps[:3], steps[-1]))]
    return ", ".join([*shown[:-1], "...", shown[-1]] if len(steps) > 4 else shown)
