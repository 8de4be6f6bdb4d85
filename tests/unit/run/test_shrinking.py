"""Which layout a run takes on fewer nodes, as arithmetic; and which runs cannot be told to take one."""

import pytest

from engine.config.load import RunConfig
from engine.core.errors import ConfigError
from engine.run.shrinking import check_can_shrink, shrunk, told
from tests import builders


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
