"""Where processes go: no GPU twice, tensor-parallel ranks inside one node, everything in order, and a sentence where it does
not fit."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.config.load import RunConfig
from engine.config.options import Options
from engine.config.placement import GpuAssignment, Part, Placement, colocation, place, training_parts
from engine.core.errors import ConfigError
from tests.builders import LEAST
from tests.builders import config as make

ALL: tuple[Part, ...] = ("trainer", "engines", "reward_engine")


@st.composite
def layouts(draw) -> RunConfig:
    size, placement = st.integers(1, 4), draw(st.sampled_from(["disaggregated", "colocated"]))
    most_nodes, most_gpus = (1, 64) if placement == "colocated" else (12, 8)  # colocated on several: `turning`
    judge = {"path": "unused", "engines": draw(st.integers(1, 3)), "tensor_parallel": draw(st.sampled_from([1, 2]))}
    judged = {"data": {"train": "unused", "reward": "model"}, "reward_model": judge} if draw(st.booleans()) else {}
    return make(
        trainer={"tensor_parallel": draw(size), "pipeline_parallel": draw(size), "data_parallel": draw(size)},
        inference={
            "engines": draw(st.integers(1, 8)),
            "tensor_parallel": draw(size),
            "placement": placement,
        },
        cluster={"nodes": draw(st.integers(1, most_nodes)), "gpus_per_node": draw(st.integers(1, most_gpus))},
        **judged,
    )


def cells(assignments: tuple[GpuAssignment, ...]) -> list[tuple[int, int]]:
    return [(assignment.node, gpu) for assignment in assignments for gpu in assignment.gpus]


def fitting(config: RunConfig) -> Placement:
    try:
        return place(config, ALL)
    except ConfigError:
        assume(False)
        raise


@given(layouts())
def test_no_gpu_is_given_twice_and_everything_is_in_the_cluster(config):
    found = fitting(config)
    colocated = config.inference.placement == "colocated"
    ranks, engines = cells(found.ranks), cells(found.engines)
    own = cells(found.reward_engines)
    for together in (ranks + own, engines + own, ranks if colocated else ranks + engines):
        assert len(set(together)) == len(together)
    assert set(engines) <= set(ranks) or not colocated
    assert all(n < config.cluster.nodes and g < config.cluster.gpus_per_node for n, g in ranks + engines + own)
    judge = config.reward_model
    assert len(found.reward_engines) == (judge.engines if judge.path is not None else 0)
    assert all(len(assignment.gpus) == judge.tensor_parallel for assignment in found.reward_engines)


@given(layouts())
def test_ranks_and_engines_are_whole_and_tensor_parallel_ranks_share_a_node(config):
    found, trainer = fitting(config), config.trainer
    assert len(found.ranks) == trainer.world_size
    assert len(found.engines) == config.inference.engines
    assert all(len(assignment.gpus) == 1 for assignment in found.ranks)
    assert all(len(assignment.gpus) == config.inference.tensor_parallel for assignment in found.engines)
    for first in range(0, trainer.world_size, trainer.tensor_parallel):
        assert len({assignment.node for assignment in found.ranks[first : first + trainer.tensor_parallel]}) == 1
    assert cells(found.ranks) == sorted(cells(found.ranks)), "ranks fill nodes in order"
    assert found.ranks[0] == GpuAssignment(0, (0,)), "rank 0 is on the head, where the command is"


@st.composite
def turning(draw) -> Options:
    """Colocated on several nodes, whether that works or not."""
    few, many, size = st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2, 4])
    return Options.model_validate(
        LEAST
        | {
            "trainer": {"tensor_parallel": draw(size), "pipeline_parallel": draw(few), "data_parallel": draw(many)},
            "inference": {"engines": draw(many), "tensor_parallel": draw(size), "placement": "colocated"},
            "cluster": {"nodes": draw(st.integers(2, 4)), "gpus_per_node": draw(st.integers(1, 12))},
        }
    )


@given(turning())
def test_engines_on_several_nodes_take_turns_exactly_where_each_finds_the_whole_policy_beside_it(options):
    """By the assignments: who holds which shard is counted as megatron numbers its ranks, tensor, data, pipeline parallel."""
    t = options.trainer
    try:
        found = place(options, ALL)
    except ConfigError as error:
        with pytest.raises(ConfigError, match=re.escape(str(error))):
            colocation(options)
        return
    assignments = iter(found.ranks)
    held: dict[int, set[tuple[int, int]]] = {}
    for pp in range(t.pipeline_parallel):
        for _ in range(t.data_parallel):
            for tp in range(t.tensor_parallel):
                held.setdefault(next(assignments).node, set()).add((pp, tp))
    whole = all(len(held[assignment.node]) == t.tensor_parallel * t.pipeline_parallel for assignment in found.engines)
    if not whole:
        said = f"cluster.nodes = {options.cluster.nodes} needs all {t.tensor_parallel * t.pipeline_parallel} shards"
        with pytest.raises(ConfigError, match=said):
            colocation(options)
        with pytest.raises(ValueError, match=said):
            RunConfig.model_validate(options.model_dump())
        return
    turns = colocation(RunConfig.model_validate(options.model_dump()))
    assert turns is not None
    for engine, assignment in enumerate(found.engines):
        beside = turns.ranks_on_node_of(engine)
        assert beside == tuple(rank for rank, other in enumerate(found.ranks) if other.node == assignment.node)
        stage, nearest = t.tensor_parallel * t.data_parallel, turns.nearest[engine]
        shards = [(rank // stage, rank % t.tensor_parallel) for rank in range(t.world_size)]
        own = {rank for rank in beside if found.ranks[rank].gpus[0] in assignment.gpus}
        assert own <= set(nearest) <= set(beside)
        for shard in set(shards):
            holders = {rank for rank in beside if shards[rank] == shard}
            assert {rank for rank in nearest if shards[rank] == shard} == (holders & own or holders)


@given(turning())
def test_a_replica_that_divides_a_node_is_seated_whole(options):
    t, gpus = options.trainer, options.cluster.gpus_per_node
    replica = t.tensor_parallel * t.pipeline_parallel
    assume(gpus % replica == 0 and t.world_size <= options.cluster.nodes * gpus)
    found = place(options, ("trainer",))
    assert found.ranks[0] == GpuAssignment(0, (0,))
    for dp in range(t.data_parallel):
        stages = [(pp * t.data_parallel + dp) * t.tensor_parallel for pp in range(t.pipeline_parallel)]
        assignments = [found.ranks[first + tp] for first in stages for tp in range(t.tensor_parallel)]
        assert len({assignment.node for assignment in assignments}) == 1
        first = dp * replica % gpus
        assert [assignment.gpus[0] for assignment in assignments] == list(range(first, first + replica))


def test_other_runs_take_no_turns_on_several_nodes():
    """Apart, or without engines, any rank may send."""
    two = {"cluster": {"nodes": 2}}
    turns = colocation(make(**two, trainer={"data_parallel": 12}, inference={"engines": 12, "placement": "colocated"}))
    assert turns is not None and (turns.ranks_on_node_of(0), turns.ranks_on_node_of(8)) == (tuple(range(8)), (8, 9, 10, 11))
    made = make(trainer={"tensor_parallel": 2}, inference={"placement": "colocated", "engines": 2})
    assert colocation(made) is None, "it may run on CPUs alone"
    alone = colocation(made, place(made, ALL))
    assert alone is not None and alone.nearest == ((0, 1), (0, 1)), "each has one shard on its GPU and one beside it"
    assert colocation(make(**two)) is None
    assert colocation(make(**two, inference={"placement": "colocated"}, sft={"checkpoint_out": "unused"})) is None


@given(layouts())
def test_a_wide_node_for_each_group_and_engine_is_always_enough(config):
    sizes = (config.trainer, config.inference, config.reward_model)
    widest = max(section.tensor_parallel for section in sizes)
    units = config.trainer.world_size + config.inference.engines + config.reward_model.engines
    text = config.model_dump() | {"cluster": {"nodes": units, "gpus_per_node": max(widest, config.cluster.gpus_per_node)}}
    text["inference"] |= {"placement": "disaggregated"}
    assert place(RunConfig.model_validate(text), ALL).ranks


def test_examples_of_eight_gpus_a_node():
    config = make(
        trainer={"tensor_parallel": 4, "data_parallel": 3}, inference={"engines": 2, "tensor_parallel": 4}, cluster={"nodes": 3}
    )
    found = place(config, ALL)
    assert [assignment.node for assignment in found.ranks] == [0] * 8 + [1] * 4
    assert found.engines == (GpuAssignment(1, (4, 5, 6, 7)), GpuAssignment(2, (0, 1, 2, 3)))
    alone = place(config, ("engines",))
    assert (alone.ranks, alone.engines[0]) == ((), GpuAssignment(0, (0, 1, 2, 3))), "without a trainer its GPUs are free"


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"trainer": {"data_parallel": 9}}, "found 1 * 8 and 9 trainer ranks (trainer.tensor_parallel = 1), of which 8"),
        ({"trainer": {"tensor_parallel": 16}, "cluster": {"nodes": 4}}, "found 4 * 8 and 16 trainer ranks"),
        (
            {"trainer": {"data_parallel": 6}, "inference": {"engines": 2, "tensor_parallel": 2}},
            "beside 6 GPUs in use inference.engines = 2 of inference.tensor_parallel = 2, of which 1 have a place",
        ),
        (
            {"cluster": {"gpus_per_node": 1}},
            "found 1 * 1 and beside 1 GPUs in use inference.engines = 1 of inference.tensor_parallel = 1, of which 0 have a "
            "place: raise cluster.nodes, or make the layout smaller, or set inference.placement = 'colocated'",
        ),
        (
            {"trainer": {"data_parallel": 2}, "inference": {"engines": 3, "placement": "colocated"}},
            "every engine inside one node of the trainer's GPUs; found 2 trainer ranks and inference.engines = 3",
        ),
        (
            {
                "trainer": {"data_parallel": 8},
                "inference": {"placement": "colocated"},
                "data": {"train": "unused", "reward": "model"},
                "reward_model": {"path": "unused"},
            },
            "beside 8 GPUs in use the reward engine (reward_model.path) with a GPU of its own",
        ),
        (
            {
                "trainer": {"data_parallel": 5},
                "data": {"train": "unused", "reward": "model"},
                "reward_model": {"path": "unused", "engines": 3},
            },
            "beside 6 GPUs in use reward_model.engines = 3, each with a GPU of its own, of which 2 have a place",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_options_and_numbers(tables, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        place(make(**tables), ALL)


def test_a_machine_with_one_gpu_trains_by_turns_and_is_told_so():
    with pytest.raises(ConfigError, match=r"found 1 \* 1 \(8 asked for, 1 on this machine\).*placement = 'colocated'$"):
        place(make(), ALL, 1)
    found = place(make(inference={"placement": "colocated"}), ALL, 1)
    assert found.ranks == found.engines == (GpuAssignment(0, (0,)),)
    with pytest.raises(ConfigError, match=r"2 trainer ranks .* or make the layout smaller$"):
        place(make(trainer={"data_parallel": 2}), ALL, 1)


def test_a_process_sees_its_own_gpus_first_and_then_the_others():
    assert GpuAssignment(0, (2, 3)).visible(["4", "5", "6", "7"]) == "6,7,4,5"


def test_supervised_training_starts_no_engine():
    assert training_parts(make(sft={"checkpoint_out": "unused"})) == ("trainer",)
    assert training_parts(make()) == ALL
