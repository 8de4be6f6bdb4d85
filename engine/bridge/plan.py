"""Which slice of which trainer shard goes where in which engine shard, in which message, by which path, and in one order for
all: a pure function of layouts and sizes. It moves nothing and talks to nobody: every member computes the same.

A flow is all that the engines' ranks of one tensor rank on one node need of one model-parallel rank of the trainer. It is cut
into buckets, the same objects for every node and data-parallel replica. One copy of a bucket enters a node, at an engine that
passes it on to the node's others; any replica sends it, or one of those that may send to that node, where a node must serve
itself. Members of the channel are numbered: trainer ranks first, then engine by engine their tensor ranks.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from heapq import heapreplace
from itertools import cycle
from operator import and_
from typing import TYPE_CHECKING

from engine.bridge.shard_plan import Bucket, Message, ModelRank, ShardOffset, ShardPlan, Transfer
from engine.models.base import Section
from engine.models.sharding import EngineLayout, Shard, ShardSlice, TrainerLayout, stage_layers, template

if TYPE_CHECKING:
    from engine.models.base import ModelShape

UNPACKED_BYTES = 1 << 20  # what is contiguous in both shards and at least this large travels alone, without being copied


def plan(
    shape: ModelShape,
    dtype_bytes: int,
    source: TrainerLayout,
    dp_size: int,
    target: EngineLayout,
    nodes: tuple[tuple[int, ...], ...],
    bucket_bytes: int,
    senders: tuple[tuple[int, ...], ...] = (),
) -> ShardPlan:
    """The plan of every weight sync between these layouts; both must pass layout's checks. `nodes` holds each engine once,
    `senders` for each of them the trainer ranks that may send to it, every model-parallel rank among them; empty: all to all.

    Every element of every engine shard arrives exactly once, straight from a rank that holds it. A bucket has at most
    `bucket_bytes`, or is a single row of a slice. Replicas of a model-parallel rank that may send to the same nodes
    send equal shares, to within one bucket.
    """
    assert sorted(engine for node in nodes for engine in node) == list(range(sum(map(len, nodes)))), nodes
    assert all(nodes) and bucket_bytes > 0 and dp_size > 0, (nodes, bucket_bytes, dp_size)
    assert not senders or (all(senders) and len(senders) == len(nodes)), (senders, nodes)
    # FP8 weights are dequantized into a temporary, so they cannot be sent in place: everything is packed.
    unpacked_bytes = math.inf if source.fp8_parameters else UNPACKED_BYTES
    with _uncollected():
        buckets = {
            (model_rank, tp_rank): tuple(_fill(model_rank, tp_rank, candidates, dtype_bytes, bucket_bytes, unpacked_bytes))
            for (model_rank, tp_rank), candidates in sorted(_flows(shape, source, target).items())
        }
        model_ranks = dict.fromkeys(model_rank for model_rank, _ in buckets)
        able = _able(model_ranks, source.tp_size, dp_size, senders or ((),) * len(nodes))
        messages = _order(buckets, source.tp_size, dp_size, nodes, able)
    return ShardPlan(messages, source, dp_size, target, nodes, dtype_bytes)


def senders_to(shape: ModelShape, source: TrainerLayout, target: EngineLayout) -> dict[int, frozenset[ModelRank]]:
    """The trainer's model-parallel ranks that send to each tensor rank of an engine; as layers are alike, one a chunk tells."""
    chunks = source.pp_size * source.vpp_size
    short = replace(source, first_stage_layers=None, last_stage_layers=None)
    flows = _flows(replace(shape, num_layers=chunks), short, target)
    return {rank: frozenset(model for model, to in flows if to == rank) for rank in range(target.tp_size)}


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection inside: everything made is kept, and looking for cycles in it would double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A transfer before the layer's number is known, and the model-parallel ranks that could send it."""

    holders: tuple[ModelRank, ...]
    target: int
    transfer: Transfer
    contiguous: bool  # whole rows of both shards

    def numbered(self, layer: int) -> _Candidate:
        number, t = str(layer), self.transfer
        source = ShardOffset(t.source.parameter.replace("{}", number), t.source.row, t.source.col)
        target = ShardOffset(t.target.parameter.replace("{}", number), t.target.row, t.target.col)
        moved = Transfer(t.name.replace("{}", number), t.rows, t.cols, source, target)
        return _Candidate(self.holders, self.target, moved, self.contiguous)

    def rows(self, start: int, count: int) -> _Candidate:
        """`count` of its rows from `start` on."""
        t = self.transfer
        source = ShardOffset(t.source.parameter, t.source.row + start, t.source.col)
        target = ShardOffset(t.target.parameter, t.target.row + start, t.target.col)
        return _Candidate(self.holders, self.target, Transfer(t.name, count, t.cols, source, target), self.contiguous)


def _flows(shape: ModelShape, source: TrainerLayout, target: EngineLayout) -> dict[tuple[ModelRank, int], list[_Candidate]]:
    """What goes from each model-parallel rank to each tensor rank of the engines, layer by layer."""
    sections: tuple[tuple[Section, int], ...] = (("first", 0), ("layer", 0), ("last", source.pp_size - 1))
    held = {
        section: [((pp, tp), s) for tp in range(source.tp_size) for s in template(shape, source, section, tp)]
        for section, pp in sections
    }
    ends = held["first"] + held["last"]
    flows: dict[tuple[ModelRank, int], list[_Candidate]] = {}

    turns = [0] * target.tp_size

    def add(candidate: _Candidate, pp_rank: int | None) -> None:
        """Picks which replica sends this slice. Replicated vectors (norms) rotate among ranks that already send to this target,
        so no extra flow is opened."""
        count, turn = len(candidate.holders), turns[candidate.target]
        turns[candidate.target] += count > 1
        pp, tp = candidate.holders[(candidate.target * count + turn % count) // target.tp_size]
        flows.setdefault(((pp if pp_rank is None else pp_rank, tp), candidate.target), []).append(candidate)

    of_a_layer = list(_candidates(shape, held["layer"], target, "layer"))
    for pp_rank, chunks in enumerate(stage_layers(shape, source)):
        for layer in (layer for chunk in chunks for layer in chunk):
            for candidate in of_a_layer:
                add(candidate.numbered(layer), pp_rank)
    # At the end, so that the flows of all stages have messages of the same sizes side by side for as long as they can.
    for candidate in (*_candidates(shape, ends, target, "first"), *_candidates(shape, ends, target, "last")):
        add(candidate, None)
    return flows


def _candidates(
    shape: ModelShape, held: list[tuple[ModelRank, Shard]], target: EngineLayout, section: Section
) -> Iterator[_Candidate]:
    """Every overlap of what the engines' ranks need of a section with what model-parallel ranks hold."""
    holders: dict[str, dict[tuple[int, ...], list[tuple[ModelRank, Shard, ShardSlice]]]] = {}
    for model_rank, shard in held:
        for p in shard.slices:
            holders.setdefault(p.name, {}).setdefault((p.row, p.col, p.rows, p.cols), []).append((model_rank, shard, p))
    for tp_rank in range(target.tp_size):
        for shard in template(shape, target, section, tp_rank):
            for needed in shard.slices:
                for found in holders[needed.name].values():
                    yield from _overlap(found, shard, needed, tp_rank)


def _overlap(
    found: list[tuple[ModelRank, Shard, ShardSlice]], shard: Shard, needed: ShardSlice, tp_rank: int
) -> Iterator[_Candidate]:
    """Where a needed slice overlaps one that one or more model-parallel ranks hold. A matrix with several holders, the tied
    embedding, is shared out among them by rows; a vector is left whole."""
    p = found[0][2]
    row, col = max(needed.row, p.row), max(needed.col, p.col)
    rows = min(needed.row + needed.rows, p.row + p.rows) - row
    cols = min(needed.col + needed.cols, p.col + p.cols) - col
    if rows <= 0 or cols <= 0:
        return

    def candidate(model_ranks: tuple[ModelRank, ...], holder: Shard, own: ShardSlice) -> _Candidate:
        source = ShardOffset(own.parameter, own.shard_row + row - own.row, own.shard_col + col - own.col)
        into = ShardOffset(needed.parameter, needed.shard_row + row - needed.row, needed.shard_col + col - needed.col)
        contiguous = cols == _width(holder) == _width(shard)
        return _Candidate(model_ranks, tp_rank, Transfer(needed.name, rows, cols, source, into), contiguous)

    if len(shard.shape) == 1 or len(found) == 1:
        yield candidate(tuple(model_rank for model_rank, _, _ in found), *found[0][1:])
        return
    for index, (model_rank, holder, own) in enumerate(found):
        start, end = (i * rows // len(found) for i in (index, index + 1))
        if start < end:
            yield candidate((model_rank,), holder, own).rows(start, end - start)


def _width(shard: Shard) -> int:
    return shard.shape[1] if len(shard.shape) == 2 else 1


def _fill(
    model_rank: ModelRank,
    tp_rank: int,
    candidates: list[_Candidate],
    dtype_bytes: int,
    bucket_bytes: int,
    unpacked_bytes: float,
) -> Iterator[Bucket]:
    """A flow as buckets: large contiguous transfers alone and cut evenly, the others together, as full as may be."""
    held: list[Transfer] = []
    held_bytes = 0
    for candidate in candidates:
        rows, row_bytes = candidate.transfer.rows, candidate.transfer.cols * dtype_bytes
        num_bytes = rows * row_bytes
        if candidate.contiguous and num_bytes >= unpacked_bytes:
            most = max(1, bucket_bytes // row_bytes)
            parts = -(-rows // most)
            for part in range(parts):
                start, end = part * rows // parts, (part + 1) * rows // parts
                transfer = candidate.transfer if parts == 1 else candidate.rows(start, end - start).transfer
                yield Bucket(model_rank, tp_rank, (transfer,), (end - start) * row_bytes, False)
            continue
        start = 0
        while start < rows:
            left = (rows - start) * row_bytes
            fitting = min(rows - start, max(0, bucket_bytes - held_bytes) // row_bytes)
            whole = fitting == rows - start
            if held and (not fitting or (not whole and left <= bucket_bytes)):
                yield Bucket(model_rank, tp_rank, tuple(held), held_bytes, True)  # the next one has room for all of it
                held, held_bytes = [], 0
                continue
            count = max(1, fitting)
            held.append(candidate.transfer if count == rows else candidate.rows(start, count).transfer)
            held_bytes += count * row_bytes
            start += count
    if held:
        yield Bucket(model_rank, tp_rank, tuple(held), held_bytes, True)


def _able(
    model_ranks: Iterable[ModelRank], tp_size: int, dp_size: int, senders: tuple[tuple[int, ...], ...]
) -> dict[tuple[ModelRank, int], tuple[int, ...]]:
    """The replicas of every model-parallel rank that may send to every node, by its number; all where no senders are named."""
    found = {}
    everyone = tuple(range(dp_size))
    for node, named in enumerate(senders):
        may = frozenset(named)
        for pp, tp in model_ranks:
            replicas = (dp for dp in everyone if (pp * dp_size + dp) * tp_size + tp in may)
            found[(pp, tp), node] = tuple(replicas) if may else everyone
            assert found[(pp, tp), node], f"no sender to node {node} holds model-parallel rank {(pp, tp)}: {named}"
    return found


def _order(
    buckets: dict[tuple[ModelRank, int], tuple[Bucket, ...]],
    tp_size: int,
    dp_size: int,
    nodes: tuple[tuple[int, ...], ...],
    able: dict[tuple[ModelRank, int], tuple[int, ...]],
) -> tuple[Message, ...]:
    """The k-th bucket of every flow before any (k + 1)-th. Within a round the flows come in waves, whose messages can all
    travel at once. Of the replicas that may, the one with the least to send so far sends; the entry into a node goes round."""
    model_ranks = dict.fromkeys(model_rank for model_rank, _ in buckets)
    ranks = {(pp, tp): [(pp * dp_size + dp) * tp_size + tp for dp in range(dp_size)] for pp, tp in model_ranks}
    senders = _senders(dp_size, able)
    targets = sorted({tp_rank for _, tp_rank in buckets})
    turns = [[node[i:] + node[:i] for i in range(len(node))] for node in nodes]
    paths = {(node, tp_rank): cycle(turns[node]) for node in range(len(nodes)) for tp_rank in targets}
    waiting = [
        (buckets[model_rank, tp_rank], senders[model_rank, node], ranks[model_rank], paths[node, tp_rank])
        for (model_rank, tp_rank), node in _waves(list(buckets), nodes, senders)
    ]
    messages: list[Message] = []
    k = 0
    while waiting := [flow for flow in waiting if len(flow[0]) > k]:
        for flow, replicas, holders, path in waiting:
            bucket = flow[k]
            messages.append(Message(bucket, len(messages), holders[replicas.send(bucket.num_bytes)], next(path)))
        k += 1
    return tuple(messages)


class _Turns:
    """Who of several is next, each once in a wave, the first of those that are free. A number for each of them and wave would
    make a plan's time grow with the square of the GPUs; as they go in order, how many went in a wave is enough."""

    def __init__(self, members: Iterable[int]) -> None:
        self._members = tuple(members)
        self._gone: Counter[int] = Counter()  # by wave, as a bit
        self.occupied = 0  # waves, as bits, in which all have gone

    def take(self, wave: int) -> int:
        """The one that goes in this wave."""
        number = self._gone[wave]
        self._gone[wave] += 1
        if number + 1 == len(self._members):
            self.occupied |= wave
        return self._members[number]


class _Replicas(_Turns):
    """The replicas of a model-parallel rank that may send to some nodes, and to no others that one of them may send to: their
    waves, and who of them has sent the fewest bytes so far, the first of equals."""

    def __init__(self, members: Iterable[int]) -> None:
        super().__init__(members)
        self._sent = [(0, member) for member in self._members]  # a heap

    def send(self, num_bytes: int) -> int:
        """The one that sends so many more."""
        sent, member = self._sent[0]
        heapreplace(self._sent, (sent + num_bytes, member))
        return member


class _Overlapping:
    """The same where sets of replicas have some in common and not all: `waves` and `sent` are theirs together, by replica."""

    def __init__(self, members: tuple[int, ...], waves: list[int], sent: list[int]) -> None:
        self._members, self._waves, self._sent = members, waves, sent

    @property
    def occupied(self) -> int:
        """See _Turns."""
        return reduce(and_, (self._waves[member] for member in self._members))

    def take(self, wave: int) -> int:
        """See _Turns."""
        member = next(member for member in self._members if not self._waves[member] & wave)
        self._waves[member] |= wave
        return member

    def send(self, num_bytes: int) -> int:
        """See _Replicas."""
        member = min(self._members, key=self._sent.__getitem__)
        self._sent[member] += num_bytes
        return member


Senders = dict[tuple[ModelRank, int], _Replicas | _Overlapping]


def _senders(dp_size: int, able: dict[tuple[ModelRank, int], tuple[int, ...]]) -> Senders:
    """The replicas of every model-parallel rank that may send to every node; nodes with the same ones share them."""
    sets: dict[ModelRank, dict[tuple[int, ...], None]] = {}
    for (model_rank, _), replicas in able.items():
        sets.setdefault(model_rank, {})[replicas] = None
    made: dict[tuple[ModelRank, tuple[int, ...]], _Replicas | _Overlapping] = {}
    for model_rank, found in sets.items():
        apart = sum(map(len, found)) == len({replica for replicas in found for replica in replicas})
        waves, sent = [0] * dp_size, [0] * dp_size
        for replicas in found:
            made[model_rank, replicas] = _Replicas(replicas) if apart else _Overlapping(replicas, waves, sent)
    return {(model_rank, node): made[model_rank, replicas] for (model_rank, node), replicas in able.items()}


def _waves(
    keys: list[tuple[ModelRank, int]], nodes: tuple[tuple[int, ...], ...], senders: Senders
) -> list[tuple[tuple[ModelRank, int], int]]:
    """Every (flow's key, node), coloured greedily: in one colour (wave) a model-parallel rank occurs once at most for each
    replica that may send, and a receiver, the ranks of one tensor rank on one node, once an engine."""
    receivers: dict[tuple[int, int], _Turns] = {}
    waves = []
    for model_rank, tp_rank in keys:
        for node, engines in enumerate(nodes):
            sends = senders[model_rank, node]
            receives = receivers.setdefault((node, tp_rank), _Turns(range(len(engines))))
            occupied = sends.occupied | receives.occupied
            bit = ~occupied & (occupied + 1)  # the lowest wave in which both are free
            waves.append((bit, sends.take(bit), (model_rank, tp_rank), node))
            receives.take(bit)
    return [(key, node) for _, _, key, node in sorted(waves)]
