"""The order of a plan's messages as it is defined: of the replicas that may send, the one that has sent least, by looking at
all of them for every message. The plain twin of engine.bridge.plan's `_order`, whose time does not grow with their number."""

from __future__ import annotations

from functools import reduce
from itertools import cycle
from operator import and_

from engine.bridge.shard_plan import Bucket, Message, ModelRank


def order(
    buckets: dict[tuple[ModelRank, int], tuple[Bucket, ...]],
    tp_size: int,
    dp_size: int,
    nodes: tuple[tuple[int, ...], ...],
    able: dict[tuple[ModelRank, int], tuple[int, ...]],
) -> tuple[Message, ...]:
    """See engine.bridge.plan."""
    model_ranks = dict.fromkeys(model_rank for model_rank, _ in buckets)
    ranks = {(pp, tp): [(pp * dp_size + dp) * tp_size + tp for dp in range(dp_size)] for pp, tp in model_ranks}
    loads = {model_rank: [0] * dp_size for model_rank in model_ranks}
    targets = sorted({tp_rank for _, tp_rank in buckets})
    turns = [[node[i:] + node[:i] for i in range(len(node))] for node in nodes]
    paths = {(node, tp_rank): cycle(turns[node]) for node in range(len(nodes)) for tp_rank in targets}
    waiting = [
        (buckets[model_rank, tp_rank], loads[model_rank], ranks[model_rank], able[model_rank, node], paths[node, tp_rank])
        for (model_rank, tp_rank), node in waves(list(buckets), dp_size, nodes, able)
    ]
    messages: list[Message] = []
    k = 0
    while waiting := [flow for flow in waiting if len(flow[0]) > k]:
        for flow, sent, holders, replicas, path in waiting:
            bucket = flow[k]
            replica = min(replicas, key=sent.__getitem__)
            sent[replica] += bucket.num_bytes
            messages.append(Message(bucket, len(messages), holders[replica], next(path)))
        k += 1
    return tuple(messages)


def waves(
    keys: list[tuple[ModelRank, int]],
    dp_size: int,
    nodes: tuple[tuple[int, ...], ...],
    able: dict[tuple[ModelRank, int], tuple[int, ...]],
) -> list[tuple[tuple[ModelRank, int], int]]:
    """See engine.bridge.plan: a bit a wave, in an integer for each replica and engine."""
    used: dict[object, list[int]] = {}
    found = []
    for model_rank, tp_rank in keys:
        for node, engines in enumerate(nodes):
            sends = used.setdefault(model_rank, [0] * dp_size)
            receives = used.setdefault((node, tp_rank, "receiver"), [0] * len(engines))
            replicas = able[model_rank, node]
            occupied = reduce(and_, (sends[replica] for replica in replicas)) | reduce(and_, receives)
            bit = ~occupied & (occupied + 1)
            replica = next(i for i in replicas if not sends[i] & bit)
            sends[replica] |= bit
            receives[next(i for i, bits in enumerate(receives) if not bits & bit)] |= bit
            found.append((bit, replica, (model_rank, tp_rank), node))
    return [(key, node) for _, _, key, node in sorted(found)]
