"""Which layout a run takes on fewer nodes, as arithmetic; and which runs cannot be told to take one."""

from pathlib import Path

import pytest

from engine.api.faults.look import Look
from engine.api.faults.machine import machine_faults
from engine.capacity.memory import Channel, estimate
from engine.config.load import RunConfig
from engine.core.errors import ConfigError, MissingNodeError
from engine.models.config_file import read_shape
from engine.run import restarts, shrinking
from engine.run.machine import Gpu
from engine.run.shrinking import Room, check_can_shrink, shrunk, told
from tests import builders

LLAMA_8B = read_shape(Path(__file__).parents[3] / "configs" / "models" / "llama-3.1-8b")
PARAMETERS = 8_030_261_248
SHARED: dict[str, dict[str, object]] = {  # the optimizer over the replicas
    "trainer": {"microbatch_tokens": 2048, "distributed_optimizer": True, "recompute": True},
    "model": {"path": "unused", "dtype": "bfloat16"},
}


def on(nodes: int, gpus: int, replicas: int, engines: int, tensor: int = 1, **tables: dict[str, object]) -> RunConfig:
    """A run whose ranks and engines are of `tensor` GPUs each."""
    return builders.config(
        **builders.merged(
            {
                "run": {"on_lost_node": "shrink"},
                "checkpoint": {"other_layout": "allow"},
                "cluster": {"nodes": nodes, "gpus_per_node": gpus},
                "trainer": {"data_parallel": replicas, "tensor_parallel": tensor},
                "inference": {"engines": engines, "tensor_parallel": tensor},
            },
            tables,
        )
    )


@pytest.mark.parametrize(
    ("nodes", "gpus", "replicas", "engines", "tensor", "left", "wanted"),
    [
        (2, 2, 2, 2, 1, 1, (1, 1)),
        (4, 8, 24, 8, 1, 3, (18, 6)),  # both keep three quarters
        (4, 8, 24, 8, 1, 1, (6, 2)),
        (3, 8, 2, 8, 1, 2, (2, 8)),  # it had room to spare
        (2, 2, 2, 1, 1, 1, (1, 1)),
        (2, 3, 2, 2, 1, 1, (2, 1)),  # one of them is halved: rather the engines
        (2, 8, 1, 1, 8, 1, None),  # one replica and one engine are of a node each
        (3, 8, 2, 1, 8, 2, (1, 1)),
    ],
)
def test_replicas_and_engines_keep_the_largest_share_that_fits(nodes, gpus, replicas, engines, tensor, left, wanted):
    config = on(nodes, gpus, replicas, engines, tensor)
    found = shrunk(config, left)
    assert (None if found is None else (found.trainer.data_parallel, found.inference.engines)) == wanted
    if found is not None:
        assert found.cluster.nodes == left and found.run.on_lost_node == "wait" and not found.broken_rules
        same = found.model_copy(update={name: getattr(config, name) for name in ("run", "cluster", "trainer", "inference")})
        assert same == config, "nothing else is another"
        assert told(found) == {"cluster.nodes": left, "trainer.data_parallel": wanted[0], "inference.engines": wanted[1]}


def test_colocated_engines_stand_on_what_is_left_of_the_trainer():
    config = on(2, 4, 8, 4, inference={"placement": "colocated", "engines": 4, "tensor_parallel": 2}, sync={"transport": "ipc"})
    found = shrunk(config, 1)
    assert found is not None and (found.trainer.data_parallel, found.inference.engines) == (4, 2)


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ({"cluster": {"nodes": 1}}, r"cluster\.nodes > 1.* found 1"),
        ({"checkpoint": {"other_layout": "refuse"}}, r"checkpoint\.other_layout = 'allow'.* found 'refuse'"),
    ],
)
def test_what_cannot_go_on_in_another_layout_is_refused(tables, complaint):
    with pytest.raises(ValueError, match=rf"run\.on_lost_node = 'shrink' needs {complaint}"):
        on(2, 2, 2, 2, **tables)


def test_a_layout_of_which_nothing_fits_one_node_less_is_refused():
    check_can_shrink(on(3, 8, 2, 1, 8))
    with pytest.raises(ConfigError, match=r"fits cluster\.nodes - 1 = 1 nodes .* found none, with one replica .* = 8 GPUs"):
        check_can_shrink(on(2, 8, 1, 1, 8))


def room_for(config: RunConfig, replicas: int) -> Room:
    """GPUs that have room for an 8B trainer rank of so many replicas to the byte: these share 12 bytes a parameter (two moments
    and the float32 original), and nothing else depends on their number."""
    spec = builders.spec(config, LLAMA_8B)
    staged = 2 * config.sync.bucket_mebibytes << 20
    whole = estimate(spec, Channel(staged, staged)).devices[0].num_bytes
    shares = (12 * -(-PARAMETERS // count) for count in (replicas, config.trainer.data_parallel))
    return Room(whole + next(shares) - next(shares), spec)


@pytest.mark.parametrize(
    ("least", "wanted"),
    [
        (1, (2, 2)),
        (2, (2, 2)),
        (3, (3, 1)),  # engines give way, though they are then a quarter of what they were
        (4, None),
    ],
)
def test_fewer_replicas_than_their_gpus_hold_are_not_chosen(least, wanted):
    """Four replicas and four engines on two nodes of four GPUs, of which one is left."""
    config = on(2, 4, 4, 4, 1, **SHARED)
    found = shrunk(config, 1, room_for(config, least))
    assert (None if found is None else (found.trainer.data_parallel, found.inference.engines)) == wanted


def test_a_byte_less_does_not_hold_it():
    config = on(2, 4, 4, 4, 1, **SHARED)
    room = room_for(config, 3)
    found = shrunk(config, 1, Room(room.gpu_bytes - 1, room.spec))
    assert found is None


def test_a_run_that_no_smaller_layout_holds_is_refused_before_it_starts_with_both_figures():
    config = on(2, 4, 4, 4, 1, **SHARED)
    check_can_shrink(config, room_for(config, 3))
    check_can_shrink(config)
    room = room_for(config, 4)
    more = 12 * (-(-PARAMETERS // 2) - -(-PARAMETERS // 4))
    has, needed = (f"{size / 2**30:.1f}" for size in (room.gpu_bytes, room.gpu_bytes + more))
    with pytest.raises(
        ConfigError,
        match=rf"- 1 = 1 nodes that fits a GPU of {has} GiB; found {needed} GiB on the fullest device \(trainer rank, "
        rf"training\) with trainer\.data_parallel = 2, {has} GiB with all nodes: .* Set on_lost_node = 'wait'",
    ):
        check_can_shrink(config, room)


def test_what_the_whole_run_is_estimated_to_hold_is_no_reason_against_a_layout_that_holds_no_more():
    """Every replica has all of the optimizer: a smaller layout holds the same, on a GPU that is too small by estimate."""
    tables: dict[str, dict[str, object]] = {"trainer": {"microbatch_tokens": 2048, "distributed_optimizer": False}}
    config = on(2, 4, 4, 4, 1, **tables)
    found = shrunk(config, 1, Room(1 << 30, builders.spec(config, LLAMA_8B)))
    assert found is not None and found.trainer.data_parallel == 2


def test_the_memory_is_that_of_the_smallest_gpu_here_and_unknown_without_one(monkeypatch, tmp_path):
    builders.make_model(tmp_path)
    config = on(2, 4, 4, 4, model={"path": str(tmp_path)})
    listed = [Gpu("H200", "143771", "9.0", "580"), Gpu("H100", "81559", "9.0", "580"), Gpu("MIG", "[N/A]", "9.0", "580")]
    monkeypatch.setattr(shrinking, "visible_gpus", lambda: 3)
    monkeypatch.setattr(shrinking, "listed_gpus", lambda: (listed, None))
    room = Room.here(config)
    assert room is not None and room.gpu_bytes == 81559 * 2**20 and room.spec.config.trainer.data_parallel == 4
    monkeypatch.setattr(shrinking, "listed_gpus", lambda: ([], "gave no answer within 30 s"))
    assert Room.here(config) is None
    monkeypatch.setattr(shrinking, "visible_gpus", lambda: 0)
    monkeypatch.setattr(shrinking, "listed_gpus", lambda: (listed, None))
    assert Room.here(config) is None


def test_the_preflight_and_a_restart_ask_for_room(monkeypatch):
    """GPUs that hold four replicas and no fewer: the run is refused, and where it runs all the same it ends with its node."""
    config = on(2, 4, 4, 4, 1, **SHARED)
    room = room_for(config, 4)
    monkeypatch.setattr(Room, "here", lambda _: room)
    (fault,) = machine_faults(Look(config, "train"), layouts_fit=True)
    assert isinstance(fault, ConfigError) and "fits a GPU of" in str(fault)
    assert list(machine_faults(Look(config, "train"), layouts_fit=False)) == [], "a model that is not known fills nothing"
    lost = MissingNodeError("a node is gone")
    lost.nodes_left = 1
    assert restarts._smaller(config, config, lost) is None
    monkeypatch.setattr(Room, "here", lambda _: room_for(config, 3))
    smaller = restarts._smaller(config, config, lost)
    assert smaller is not None and smaller.trainer.data_parallel == 3


def test_fewer_replicas_than_a_nodes_memory_holds_are_not_chosen():
    """AdamW on the hosts, and four ranks on each of two nodes: one node has all of it, whichever layout it takes."""
    offloaded: dict[str, dict[str, object]] = {"optimizer": {"offload_share": 1.0}}
    config = on(2, 4, 4, 4, 1, **SHARED, **offloaded)
    room = Room(1 << 40, builders.spec(config, LLAMA_8B))
    found = shrunk(config, 1, room)
    assert found is not None and found.trainer.data_parallel == 2
    needed, whole = room.on_host(found), room.on_host()
    assert needed == whole, "all ranks of the whole run are on its first node"
    spread = on(2, 2, 4, 2, 1, **SHARED, **offloaded, inference={"placement": "colocated", "engines": 4})
    room = Room(1 << 40, builders.spec(spread, LLAMA_8B))
    found = shrunk(spread, 1, room)
    assert found is not None and found.trainer.data_parallel == 2
    needed, whole = room.on_host(found), room.on_host()
    assert needed > 1.9 * whole
    assert shrunk(spread, 1, Room(1 << 40, room.spec, needed)) == found
    assert shrunk(spread, 1, Room(1 << 40, room.spec, needed - 1)) is None
    has, held, before = (f"{size / 2**30:.1f}" for size in (needed - 1, needed, whole))
    with pytest.raises(
        ConfigError,
        match=rf"fits a node's memory of {has} GiB; found {held} GiB .*data_parallel = 2, {before} GiB with all nodes",
    ):
        check_can_shrink(spread, Room(1 << 40, room.spec, needed - 1))
