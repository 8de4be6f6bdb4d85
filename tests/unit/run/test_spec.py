"""The run, resolved once: it survives JSON, its rules are not checked again by those who are told it, and each fact that used
to be derived in several packages is there."""

import ast
import json
import pickle

import pytest

from engine.config.load import RunConfig, dump_config
from engine.config.placement import colocation, place, training_parts
from engine.core.errors import CheckpointError, ConfigError
from engine.models.sharding import trainer_layout
from engine.run.spec import Spec, resolve, settled, source_kind
from tests.builders import config, make_model, spec
from tests.unit.test_layers import SOURCES, imported

OFFLINE = {"sync_interval": "never", "reference": "never"}


@pytest.fixture
def made(tmp_path, tiny_tokenizer) -> RunConfig:
    """A configuration whose files are there."""
    make_model(tmp_path / "model", tiny_tokenizer)
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    data = {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "train.jsonl")}
    return config(tmp_path / "run", model={"path": str(tmp_path / "model")}, data=data)


def test_a_spec_survives_json(made):
    resolved = resolve(made)
    text = resolved.to_json()
    assert Spec.from_json(text) == resolved
    assert Spec.from_json(text).to_json() == text
    assert json.loads(text)["config"]["run"]["steps"] == 4, "it is readable by others"


def test_colocation_and_a_reward_engine_survive_json():
    """Every field that is None on one machine."""
    data = {"train": "unused", "reward": "model"}
    several = config(
        cluster={"nodes": 2, "gpus_per_node": 2},
        inference={"placement": "colocated", "engines": 2},
        trainer={"data_parallel": 3},
        data=data,
        reward_model={"path": "unused"},
    )
    resolved = spec(several, reward_shape=spec().shape)
    assert None not in (resolved.colocation, resolved.placement, resolved.reward_shape)
    assert Spec.from_json(resolved.to_json()) == resolved


def test_rules_are_checked_once(monkeypatch):
    """The processes of a run trust what the command has checked; a value of a wrong type is still refused."""
    made = spec().config
    text, pickled = spec(made).to_json(), pickle.dumps(made)
    monkeypatch.setattr("engine.config.load.broken_rules", lambda config: pytest.fail("checked again"))
    assert Spec.from_json(text).config.run.steps == 4
    assert pickle.loads(pickled) == made, "nor where Ray sends a configuration by itself"
    with pytest.raises(ValueError, match="steps"):
        Spec.from_json(text.replace('"steps":4', '"steps":"four"'))


BF16 = {"dtype": "bfloat16", "path": "unused"}
FP8 = {"fp8": "current"}


@pytest.mark.parametrize(
    ("tables", "on_gpus", "layers"),
    [
        ({"model": BF16}, True, "transformer_engine"),
        ({"model": BF16}, False, "local"),
        ({}, True, "local"),
        ({"model": BF16, "trainer": {"share_prompts": True}}, True, "local"),
        ({"model": BF16, "trainer": {"layers": "local"}}, True, "local"),
        ({"model": BF16, "trainer": FP8}, False, "transformer_engine"),
        ({"model": BF16, "trainer": {"layers": "transformer_engine"}}, False, "transformer_engine"),
    ],
)
def test_what_automatic_layers_become(tables, on_gpus, layers):
    made = settled(config(**tables), on_gpus=on_gpus)
    assert made.trainer.layers == layers and settled(made, on_gpus=not on_gpus) is made
    assert made.trainer.fuse_gradient_accumulation is made.trainer.fuses_accumulation is on_gpus
    assert made.trainer.shares_prompts is (layers == "local")
    assert trainer_layout(made.trainer).spec == layers


def test_what_is_not_settled_yet_is_not_taken_for_false():
    with pytest.raises(AssertionError, match="must be settled"):
        _ = config().trainer.fuses_accumulation


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_said_of_accumulation_stays_as_it_is(asked):
    made = config(trainer={"fuse_gradient_accumulation": asked})
    assert all(settled(made, on_gpus=on_gpus).trainer.fuse_gradient_accumulation is asked for on_gpus in (False, True))


def test_a_resolved_run_says_what_its_layers_are(monkeypatch):
    made = config(model=BF16)
    assert made.trainer.layers == "auto" and spec(made).config.trainer.layers == "local"
    monkeypatch.setattr("engine.run.spec.visible_gpus", lambda: 8)
    found = spec(made)
    assert found.config.trainer.layers == found.trainer.spec == "transformer_engine"
    assert Spec.from_json(found.to_json()) == found
    assert 'layers = "transformer_engine"' in dump_config(found.config), "what the records keep"


def test_equal_configurations_give_equal_specs(made):
    assert resolve(made) == resolve(made.model_copy())
    assert resolve(made).digests.keys() >= {"data.train", "data.held_out"}
    assert resolve(made, digests=False).digests == {}


def test_what_is_started_and_where_is_placements_own_answer():
    for made in (config(), config(inference={"placement": "colocated"}), config(sft={"checkpoint_out": "out"})):
        resolved = spec(made)
        assert resolved.parts == training_parts(made)
        assert resolved.placement == place(made, resolved.parts)
        assert resolved.colocation == colocation(made, resolved.placement)
        assert resolved.starts_engines is ("engines" in resolved.parts)
    assert spec(config(trainer={"data_parallel": 9})).placement is None, "on a CPU it need not fit"


def test_the_source_is_told_by_the_first_row_of_what_is_replayed(tmp_path):
    rows: dict[str, dict[str, object]] = {"preferences": {"prompt": "p", "chosen": "a", "rejected": "b"}}
    rows["ledger"] = {"step": 0, "prompt_id": "p", "token_ids": [1]}
    for kind, row in rows.items():
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
        replay = {"train": "unused", "replay": str(tmp_path / f"{kind}.jsonl")}
        assert source_kind(config(data=replay, sync=OFFLINE)) == kind
    assert source_kind(config(data={"train": "unused", "replay": "gone.jsonl"}, sync=OFFLINE)) == "ledger"
    assert source_kind(config()) == "rollouts"
    assert source_kind(config(sft={"checkpoint_out": "out"})) == "supervised"


@pytest.mark.parametrize(
    ("tables", "copies"),
    [
        ({}, ("reference",)),
        ({"sync": {"reference": "follow"}}, ()),  # at s = 1 it is the policy
        ({"sync": {"reference": 1}}, ()),
        ({"sync": {"reference": "follow", "sync_interval": 2}}, ("reference",)),
        ({"sync": {"reference": "follow", "sync_interval": 2, "reference_log_probs": "rollouts"}}, ()),
        ({"algorithm": {"loss": "grpo", "kl_weight": 0.0}}, ()),
        ({"sft": {"checkpoint_out": "out"}}, ()),
        ({"sync": OFFLINE, "inference": {"placement": "colocated"}, "run": {"steps": 40}}, ("reference",)),
        (
            {
                "sync": {"sync_interval": "never", "reference": 10},
                "inference": {"placement": "colocated"},
                "run": {"steps": 40},
            },
            ("reference", "seed"),
        ),
        (
            {
                "algorithm": {"loss": "grpo", "kl_weight": 0.0},
                "sync": OFFLINE,
                "data": {"train": "unused", "held_out": "unused"},
                "evaluation": {"every": 2},
                "run": {"steps": 40},
            },
            ("seed",),
        ),
    ],
)
def test_the_copies_of_weights_that_a_rank_keeps(tables, copies):
    """F2: the policy, the planner and the record ask one rule."""
    assert spec(config("unused", **tables)).copies == copies


@pytest.mark.parametrize(
    ("tables", "again"),
    [
        ({}, False),
        ({"checkpoint": {"every": 7}}, False),
        ({"evaluation": {"every": 5}, "data": {"train": "unused", "held_out": "unused"}}, True),
        ({"inference": {"placement": "colocated"}, "checkpoint": {"every": 7}}, True),
        ({"inference": {"placement": "colocated"}, "checkpoint": {"every": 20}}, False),
        (
            {
                "inference": {"placement": "colocated"},
                "checkpoint": {"every": 7},
                "data": {"train": "unused", "replay": "a.jsonl"},
            },
            False,
        ),
    ],
)
def test_the_seed_is_published_again_where_the_generator_needs_it(tables, again):
    """Offline: once newer weights were judged, and once engines on the trainer's devices have slept before a next chunk."""
    made = spec(config(run={"steps": 20}, sync={"sync_interval": "never"}, **tables))
    assert made.config.keeps_seed is again
    assert made.colocated is ("inference" in tables and made.starts_engines)
    online = {name: table for name, table in tables.items() if "replay" not in table}
    assert not config(run={"steps": 20}, **online | {"checkpoint": {"every": 20}}).keeps_seed


def test_fewer_gpus_than_configured_are_placed_on_anew():
    """One node: what fits is where it was, and what does not is told with the GPUs that are there."""
    made = spec(config(trainer={"data_parallel": 2}))
    assert made.placed() is made.placed(8) is made.placement
    assert made.placed(3) == made.placement
    with pytest.raises(ConfigError, match=r"found 1 \* 2 \(8 asked for, 2 on this machine\)"):
        made.placed(2)
    with pytest.raises(ConfigError, match="trainer ranks"):
        spec(config(trainer={"data_parallel": 9})).placed()


# Who may ask for what a Spec says: it alone resolves a run. What only looks whether a run could be resolved (the rules of a
# configuration, the preflight) is another matter, and so is the trainer that a test or a tool builds without a run.
RESOLVERS = {
    # run/shrinking.py looks which of many layouts fits fewer nodes, before one is resolved
    "engine.config.placement.place": ("run/spec.py", "api/faults/machine.py", "run/shrinking.py"),
    "engine.config.placement.colocation": ("run/spec.py", "config/rules.py"),
    "engine.config.placement.training_parts": ("run/spec.py", "api/faults/look.py", "run/shrinking.py"),
    "engine.models.config_file.read_shape": ("run/spec.py", "models/", "api/faults/model.py", "api/initial.py"),
    "engine.models.sharding.trainer_layout": (
        "run/spec.py",
        "api/faults/",
        "api/initial.py",
        "run/milestones.py",
        "forecast/trainer_layouts.py",
    ),  # of the run that wrote a checkpoint
    # a forecast's search looks which of many runs could be
    "engine.models.sharding.engine_layout": (
        "run/spec.py",
        "api/faults/model.py",
        "api/initial.py",
        "forecast/engine_layouts.py",
    ),
    "engine.rollouts.replay.replay_kind": ("run/spec.py", "api/faults/"),
    "engine.bridge.transports.registry.choose": ("run/spec.py", "api/faults/machine.py", "bridge/setup.py"),  # on real devices
}
# Where the policy's tokenizer is loaded: once in each kind of process, and passed on.
LOADERS = {
    "engine.data.templates.policy_tokenizer": ("api/faults/model.py", "inference/vllm_engine.py", "benchmarks/open_ended.py"),
    "engine.data.templates.model_tokenizer": ("run/controller.py", "run/rank.py", "api/evaluating.py", "commands/sampling.py"),
}
ATTRIBUTES = {
    "uses_engines": ("config/",),
    "evaluates_between_syncs": ("config/",),
    "keeps_seed": ("run/spec.py", "config/", "bridge/setup.py"),
}


def test_a_run_is_resolved_in_one_place():
    for path, tree in SOURCES.items():
        for line, name in imported(tree):
            assert path.startswith(RESOLVERS.get(name, (path,))), f"{path}:{line} asks {name}: ask the Spec"
            assert path.startswith(LOADERS.get(name, (path,))), f"{path}:{line} loads the tokenizer: have it passed"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
                assert path.startswith(ATTRIBUTES[node.attr]), f"{path}:{node.lineno} asks .{node.attr}: ask the Spec"
    asked = {name for _, name in imported(SOURCES["run/spec.py"])}
    assert asked >= RESOLVERS.keys(), "a name that is not there any more holds nothing"


def test_transports_are_told_for_devices_that_are_not_seen():
    def kinds(made: RunConfig) -> list[tuple[str, str | None]]:
        return [(carrier.device, carrier.kind) for carrier in spec(made).transports]

    assert kinds(config()) == [("cuda", "nccl"), ("cpu", "ipc"), ("cpu", "gloo")]
    assert kinds(config(inference={"placement": "colocated"})) == [("cuda", "ipc"), ("cpu", "ipc"), ("cpu", "gloo")]
    assert kinds(config(sync={"transport": "gloo"})) == [("cuda", None), ("cpu", "gloo")]
    refused = spec(config(sync={"transport": "gloo"})).transports[0]
    assert "and the weights are on a GPU: use 'auto', which takes nccl here" in refused.why
    assert kinds(config(sft={"checkpoint_out": "out"})) == []


def test_when_is_evaluated_and_saved():
    held_out = {"train": "unused", "held_out": "folder/test.jsonl"}
    made = config(data=held_out, evaluation={"every": 2}, checkpoint={"every": 2})
    resolved = spec(made)
    assert (resolved.evaluation_steps, resolved.checkpoint_steps) == ((0, 2, 4), (2, 4))
    (found,) = resolved.evaluation_sets
    assert (found.name, found.option, found.path) == ("test", "data.held_out", "folder/test.jsonl")
    only = spec(made, parts=("engines",))
    assert (only.evaluation_steps, only.checkpoint_steps, only.copies, only.transports) == ((), (), (), ())


def test_what_cannot_be_read_is_refused(tmp_path, made):
    with pytest.raises(CheckpointError, match=r"model\.path must be the folder of a Hugging Face model; found no folder"):
        resolve(config(tmp_path))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="must be of a model family that is known"):
        resolve(made)


def test_the_threads_of_a_node_are_those_of_what_is_on_it():
    """Four ranks of two threads and one more each on the first node; two engines of two devices on the second."""
    sizes = {"trainer": {"data_parallel": 4, "threads": 2}, "inference": {"engines": 2, "tensor_parallel": 2, "threads": 1}}
    made = spec(config(cluster={"nodes": 2, "gpus_per_node": 4}, **sizes))
    assert made.nodes == (0, 1)
    assert [made.threads_on(node) for node in made.nodes] == [4 * 3, 2 * 2 * 2]
    alone = spec(config(cluster={"nodes": 1, "gpus_per_node": 1}, **sizes))
    assert (alone.placement, alone.nodes, alone.threads_on(0)) == (None, (0,), 4 * 3 + 2 * 2 * 2)
