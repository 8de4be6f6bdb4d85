"""What a weight sync of a configuration will move, by which links and in what time, and whether its devices hold it all, before
anything is launched: the plan is made as a run makes it, then measured; memory.py counts the rest. It needs the model's
config.json, and the reward model's where it is to be counted: no weights, no GPU, no process but this one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.bridge import setup as opening
from engine.bridge.exchange import STAGED
from engine.bridge.plan import plan
from engine.bridge.shard_plan import Bucket, Message, ShardOffset, ShardPlan, Transfer
from engine.bridge.transports.base import Transport
from engine.bridge.transports.registry import kind_of
from engine.capacity.kv_cache import GIB, require_one_request
from engine.capacity.memory import Channel, estimate, foreign_contexts
from engine.capacity.resolved import Resolved
from engine.config.placement import Placement
from engine.config.transport import AUTO, refusal
from engine.core.errors import ConfigError
from engine.models.base import ModelShape
from engine.models.checks import check_engine_layout, check_layout
from engine.models.sharding import ShardSlice, shard_slices, tensors


@dataclass(frozen=True, slots=True)
class Machine:
    """What the estimate takes for given: trainer and engines on nodes of their own, or all on one or taking turns on each,
    where every link is NVLink; both links one way at a time each."""

    network_gigabytes_per_second: float = 45.0  # of one GPU, from node to node
    nvlink_gigabytes_per_second: float = 350.0  # of one GPU, inside a node
    gpu_gibibytes: float = 139.0  # what torch calls the memory of an H200


def plan_run(spec: Resolved, machine: Machine) -> dict[str, Any]:
    """Makes the plan of every weight sync of the run and measures it: the figures of `measure`, `plan_seconds` and, under
    `memory`, those of `weigh`.

    ConfigError when the layouts do not fit the model or the machine.
    """
    config = spec.config
    shape = spec.shape
    source = spec.trainer
    target = spec.engine
    check_layout(shape, source)
    check_engine_layout(shape, target)
    _check(machine)
    require_one_request("inference", spec.kv_cache)
    if _within_nodes(spec):
        machine = replace(machine, network_gigabytes_per_second=machine.nvlink_gigabytes_per_second)
    machines = _machines(config.inference.engines, target.tp_size, config.cluster.gpus_per_node)
    nodes, senders = opening.channel(machines, _transport(spec, machines), spec.colocation)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    started = time.perf_counter()
    dp_size, bucket_bytes = config.trainer.data_parallel, config.sync.bucket_mebibytes << 20
    made = plan(shape, dtype.itemsize, source, dp_size, target, nodes, bucket_bytes, senders)
    seconds = time.perf_counter() - started
    return {
        "plan_seconds": seconds,
        **measure(shape, made, machine, spec.placement if spec.colocated else None),
        "machines": len(set(spec.colocation.engines if spec.colocation else machines)),
        "memory": weigh(spec, made, machine),
    }


def _transport(spec: Resolved, machines: list[int]) -> type[Transport]:
    """What carries the syncs on GPUs, or what the configuration names for CPUs alone. ConfigError for what fits nowhere."""
    asked = spec.config.sync.transport
    if refused := refusal(spec.config, engines_on_one_machine=len(set(machines)) == 1):
        raise ConfigError(refused)
    on_gpus = spec.carrier("cuda")
    if on_gpus.kind is None and asked == AUTO:
        raise ConfigError(on_gpus.why)
    return kind_of(on_gpus.kind or asked)


def _check(machine: Machine) -> None:
    for option, value in (
        ("--network-gigabytes-per-second", machine.network_gigabytes_per_second),
        ("--nvlink-gigabytes-per-second", machine.nvlink_gigabytes_per_second),
        ("--gpu-gibibytes", machine.gpu_gibibytes),
    ):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{option} must be a number greater than 0; found {value}: give the machine's")


def _machines(num_engines: int, tp_size: int, gpus_per_node: int) -> list[int]:
    """The machine of every engine: side by side, as many to a node as it has GPUs for."""
    if tp_size > gpus_per_node:
        raise ConfigError(
            f"inference.tensor_parallel must fit into a node; found {tp_size} with cluster.gpus_per_node = {gpus_per_node}: "
            f"lower it"
        )
    return [engine // (gpus_per_node // tp_size) for engine in range(num_engines)]


def _within_nodes(spec: Resolved) -> bool:
    """Whether no weight leaves its node: all is on one, or each serves its engines by itself."""
    config = spec.config
    trainer, engines = config.trainer.world_size, config.inference.engines * config.inference.tensor_parallel
    colocated = config.inference.placement == "colocated"
    return spec.colocation is not None or (max if colocated else sum)((trainer, engines)) <= config.cluster.gpus_per_node


def weigh(spec: Resolved, made: ShardPlan, machine: Machine) -> dict[str, Any]:
    """The memory of each kind of device by component, whether the fullest fits the machine's GPU, and the file for want of
    which the reward engine is not counted. Bytes."""
    gpu_bytes = round(machine.gpu_gibibytes * GIB)
    held = estimate(spec, replace(channel(made), contexts=foreign_contexts(spec) and opened(made, spec.placement)), gpu_bytes)
    cache = spec.kv_cache
    size = cache.num_bytes(gpu_bytes) if cache is not None else 0
    return {
        "gpu_bytes": gpu_bytes,
        "fullest": held.fullest.name,
        "fits": held.fullest.num_bytes <= gpu_bytes,
        "spare_bytes": gpu_bytes - held.fullest.num_bytes,
        "devices": [{"name": d.name, "num_bytes": d.num_bytes, "components": d.components} for d in held.devices],
        "stages": list(held.stages),
        "host_bytes_per_node": held.host_bytes_per_node,
        "kv_cache": None
        if cache is None
        else {"num_bytes": size, "requests": cache.holds(size), "of": cache.max_concurrent, "told": cache.told(size)},
        "not_counted": spec.missing_reward_model,
    }


def channel(made: ShardPlan) -> Channel:
    """What the members keep between syncs: staging buckets."""
    staged = [0] * made.num_members
    for message in made.messages:
        for member in (message.source, *made.receivers(message)) if message.bucket.packed else ():
            staged[member] = max(staged[member], STAGED * message.bucket.num_bytes)
    return Channel(max(staged[: made.trainer_size]), max(staged[made.trainer_size :]))


def opened(made: ShardPlan, placement: Placement | None) -> int:
    """Of the GPU that has most of them: the engine ranks of other GPUs that take something from its memory."""
    assert placement is not None
    elsewhere = (message for message in made.messages if not _shares_gpu(made, message, placement))
    found = {(message.source, message.path[0], message.bucket.target) for message in elsewhere}
    return max(Counter(source for source, _, _ in found).values(), default=0)


def measure(shape: ModelShape, made: ShardPlan, machine: Machine, colocated: Placement | None = None) -> dict[str, Any]:
    """A plan's figures, counted from its messages and compared with the layouts' own slices. Bytes unless named otherwise.
    `colocated`: where its members are, where some share a GPU.

    `seconds` replays the messages: every link carries its own in the plan's order, one at a time, at full bandwidth; a
    node's fan-out of a message starts when it has arrived. What an engine rank finds in the memory of its own GPU takes it as
    long, and keeps no other from reading there. `seconds_at_least` is the busiest link alone.
    """
    sent, received, node_bytes = [0] * made.trainer_size, [0] * made.num_members, [0] * len(made.nodes)
    forwarded, staging = [0] * made.num_members, [0] * made.num_members
    node_of = {engine: number for number, node in enumerate(made.nodes) for engine in node}
    direct_of = _direct_bytes(shape, made)
    direct = 0
    for message in made.messages:
        bucket, receivers = message.bucket, made.receivers(message)
        sent[message.source] += bucket.num_bytes
        node_bytes[node_of[message.path[0]]] += bucket.num_bytes
        forwarded[receivers[0]] += bucket.num_bytes * (len(receivers) - 1)
        for member in receivers:
            received[member] += bucket.num_bytes
        if bucket.packed:
            for member in (message.source, *receivers):
                staging[member] = max(staging[member], bucket.num_bytes)
        holds = _model_rank(made, message.source) == bucket.model_rank
        direct += direct_of[id(bucket)] * len(receivers) if holds else 0
    arrived = received[made.trainer_size :]
    entering, leaving = sum(node_bytes), sum(forwarded)
    own = [colocated is not None and _shares_gpu(made, message, colocated) for message in made.messages]
    own_bytes = sum(message.bucket.num_bytes for message, here in zip(made.messages, own, strict=True) if here)
    replayed, at_least = _seconds(made, machine, own, forwarded)
    return {
        "num_bytes": sum(torch.Size(size).numel() for size in tensors(shape).values()) * made.dtype_bytes,
        "direct_fraction": direct / sum(arrived),
        "own_gpu_fraction": own_bytes / sum(arrived) if colocated is not None else None,
        "received_over_needed": sum(arrived) / _needed_bytes(shape, made),
        "seconds": replayed,
        "seconds_at_least": at_least,
        "trainer_ranks": made.trainer_size,
        "engines": len(node_of),
        "engine_ranks": len(arrived),
        "copies": len(made.nodes),
        "sent_by_trainer_rank": _spread(sent),
        "received_by_engine_rank": _spread(arrived),
        "received_by_copy": _spread(node_bytes),
        "from_trainer_bytes": entering,
        "passed_on_bytes": leaving,
        "staging_of_trainer_rank": max(staging[: made.trainer_size]),
        "staging_of_engine_rank": max(staging[made.trainer_size :]),
        "num_transfers": sum(len(bucket.transfers) for bucket in made.buckets),
        "num_buckets": len(made.buckets),
        "num_messages": len(made.messages),
        "unpacked_fraction": sum(m.bucket.num_bytes for m in made.messages if not m.bucket.packed) / entering,
        "digest": made.digest,
    }


def _spread(values: list[int]) -> dict[str, float]:
    return {"max": max(values), "mean": sum(values) / len(values)}


def _model_rank(made: ShardPlan, rank: int) -> tuple[int, int]:
    """(pipeline rank, tensor rank) of a trainer rank."""
    return rank // (made.dp_size * made.source.tp_size), rank % made.source.tp_size


def _needed_bytes(shape: ModelShape, made: ShardPlan) -> int:
    """Bytes of Hugging Face elements that all engine shards hold together."""
    engine = sum(p.rows * p.cols for rank in range(made.target.tp_size) for p in shard_slices(shape, made.target, rank))
    return engine * made.dtype_bytes * sum(map(len, made.nodes))


def _direct_bytes(shape: ModelShape, made: ShardPlan) -> dict[int, int]:
    """Bytes of each bucket (by id) that lie in its model-parallel rank's shards and belong where they go in the engine's: both
    sides' layouts must name the same slice of the same Hugging Face tensor."""
    axes = made.source
    held = {
        (pp, tp): _by_parameter(shard_slices(shape, axes, tp, pp)) for pp in range(axes.pp_size) for tp in range(axes.tp_size)
    }
    needed = [_by_parameter(shard_slices(shape, made.target, rank)) for rank in range(made.target.tp_size)]

    def direct(bucket: Bucket, t: Transfer) -> bool:
        origin = _origin(held[bucket.model_rank], t.source, t)
        return origin is not None and origin[0] == t.name and origin == _origin(needed[bucket.target], t.target, t)

    return {
        id(bucket): sum(t.rows * t.cols for t in bucket.transfers if direct(bucket, t)) * made.dtype_bytes
        for bucket in made.buckets
    }


def _by_parameter(held: Iterable[ShardSlice]) -> dict[str, list[ShardSlice]]:
    found: dict[str, list[ShardSlice]] = {}
    for part in held:
        found.setdefault(part.parameter, []).append(part)
    return found


def _origin(held: dict[str, list[ShardSlice]], offset: ShardOffset, t: Transfer) -> tuple[str, int, int] | None:
    """(tensor, row, col) of what a shard holds at an offset, if one of its slices covers all that the transfer takes."""
    for p in held.get(offset.parameter, ()):
        row, col = offset.row - p.shard_row, offset.col - p.shard_col
        if 0 <= row <= p.rows - t.rows and 0 <= col <= p.cols - t.cols:
            return p.name, p.row + row, p.col + col
    return None


def _shares_gpu(made: ShardPlan, message: Message, placement: Placement) -> bool:
    """Whether the first engine rank that receives a message has the GPU of the trainer rank that sends it."""
    source, engine = placement.ranks[message.source], placement.engines[message.path[0]]
    return (engine.node, engine.gpus[message.bucket.target]) == (source.node, *source.gpus)


def _seconds(made: ShardPlan, machine: Machine, own: list[bool], forwarded: list[int]) -> tuple[float, float]:
    """(a replay of the messages, the busiest link's bytes over its bandwidth). `own`: of each, whether it stays on its GPU."""
    network, nvlink = machine.network_gigabytes_per_second * 1e9, machine.nvlink_gigabytes_per_second * 1e9
    free, leaving, entering = ([0.0] * made.num_members for _ in range(3))  # when a member's links are: network, out, in
    sent, entered = [0] * made.num_members, [0] * made.num_members
    for message, here in zip(made.messages, own, strict=True):
        num_bytes, (entry, *others) = message.bucket.num_bytes, made.receivers(message)
        entered[entry] += num_bytes
        arrival = (free[entry] if here else max(free[message.source], free[entry])) + num_bytes / network
        free[entry] = arrival
        if not here:
            sent[message.source] += num_bytes
            free[message.source] = arrival
        for other in others:
            leaving[entry] = entering[other] = max(arrival, leaving[entry], entering[other]) + num_bytes / nvlink
    at_least = max(max(*sent, *entered) / network, max(forwarded) / nvlink)
    return max(*free, *entering), at_least


def table(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures for people: heading, then a row each."""

    def spread(key: str) -> tuple[str, str]:
        return _gigabytes(figures[key]["max"]), _gigabytes(figures[key]["mean"])

    f = figures
    takers = f"{f['copies']} node{'s' if f['copies'] > 1 else ''}"
    if f["copies"] != f["machines"]:  # each reads the trainer's memory by itself
        takers = f"{f['copies']} engines, on {f['machines']} node{'s' if f['machines'] > 1 else ''}"
    return [
        ("what", "max or total", "mean"),
        ("weights, once", _gigabytes(f["num_bytes"]), ""),
        (f"sent by each of {f['trainer_ranks']} trainer ranks", *spread("sent_by_trainer_rank")),
        (f"received by each of {f['engine_ranks']} engine ranks", *spread("received_by_engine_rank")),
        (f"received from the trainer by each of {takers}", *spread("received_by_copy")),
        ("from the trainer", _gigabytes(f["from_trainer_bytes"]), ""),
        ("passed on by engines", _gigabytes(f["passed_on_bytes"]), ""),
        ("one staging buffer of a trainer rank", _gigabytes(f["staging_of_trainer_rank"]), ""),
        ("one staging buffer of an engine rank", _gigabytes(f["staging_of_engine_rank"]), ""),
        ("transfers, buckets, messages", f"{f['num_transfers']:,}, {f['num_buckets']:,}, {f['num_messages']:,}", ""),
        ("bytes that go from shard to shard", f"{f['direct_fraction']:.2%}", ""),
        ("bytes that need no staging", f"{f['unpacked_fraction']:.2%}", ""),
        *([("bytes from the engine rank's own GPU", f"{own:.2%}", "")] if (own := f["own_gpu_fraction"]) is not None else []),
        ("received over needed", f"{f['received_over_needed']:.4f}", ""),
        ("plan", f"{f['plan_seconds']:.3f} s", ""),
        ("transfer at these bandwidths", f"{f['seconds']:.3f} s", ""),
        ("the busiest link alone", f"{f['seconds_at_least']:.3f} s", ""),
    ]


def memory_table(memory: dict[str, Any]) -> list[tuple[str, ...]]:
    """The devices side by side for people: heading, then a row for each component that any of them has."""
    devices = memory["devices"]
    names = dict.fromkeys(name for device in devices for name in device["components"])
    rows = [(name, [device["components"].get(name, 0) for device in devices]) for name in names]
    shares = (f"{device['num_bytes'] / memory['gpu_bytes']:.0%}" for device in devices)
    return [
        ("a GPU's memory", *(device["name"] for device in devices)),
        *((name, *(_gibibytes(size) if size else "" for size in sizes)) for name, sizes in rows if any(sizes)),
        ("in all", *(_gibibytes(device["num_bytes"]) for device in devices)),
        ("of the GPU", *shares),
    ]


def verdict(memory: dict[str, Any]) -> str:
    """Whether it fits, and by how much; what the stages and the host hold and what is not counted, where there is any."""
    fits, spare, gpu = memory["fits"], abs(memory["spare_bytes"]), memory["gpu_bytes"]
    by_how_much = f"{_gibibytes(spare)} ({spare / gpu:.0%}) {'to spare' if fits else 'too much'}"
    text = f"{'fits' if fits else 'does not fit'} GPUs of {_gibibytes(gpu)}: {by_how_much} on {memory['fullest']}"
    if len(memory["stages"]) > 1:
        text += f"\ntrainer ranks by stage: {', '.join(f'{size / GIB:.1f}' for size in memory['stages'])} GiB"
    if memory["host_bytes_per_node"]:
        text += f"\noptimizer state and reference in the host's memory: {_gibibytes(memory['host_bytes_per_node'])} a node"
    if cache := memory["kv_cache"]:
        text += f"\neach engine's KV cache: {cache['told']}, of {cache['of']} that may run together"
    if memory["not_counted"]:
        text += f"\nthe reward engine is not counted, for there is no {memory['not_counted']}"
    return text


def _gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"
