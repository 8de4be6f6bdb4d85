"""The run, resolved once: it survives JSON, its rules are not checked again by those who are told it, and each fact that used
to be derived in several rooms is there."""

import json

import pytest

from engine.config.load import RunConfig
from engine.config.placement import colocated_nodes, place, training_parts
from engine.core.errors import CheckpointError, ConfigError
from engine.run.spec import Spec, resolve, source_kind
from tests.builders import config, make_model, spec

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


def test_colocated_nodes_and_a_reward_engine_survive_json():
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
    assert None not in (resolved.colocated_nodes, resolved.placement, resolved.reward_shape)
    assert Spec.from_json(resolved.to_json()) == resolved


def test_rules_are_checked_once(monkeypatch):
    """The processes of a run trust what the command has checked; a value of a wrong type is still refused."""
    text = spec().to_json()
    monkeypatch.setattr("engine.config.load.broken_rules", lambda config: pytest.fail("checked again"))
    assert Spec.from_json(text).config.run.steps == 4
    with pytest.raises(ValueError, match="steps"):
        Spec.from_json(text.replace('"steps":4', '"steps":"four"'))


def test_equal_configurations_give_equal_specs(made):
    assert resolve(made) == resolve(made.model_copy())
    assert resolve(made).digests.keys() >= {"data.train", "data.held_out"}
    assert resolve(made, digests=False).digests == {}


def test_what_is_started_and_where_is_placements_own_answer():
    for made in (config(), config(inference={"placement": "colocated"}), config(sft={"checkpoint_out": "out"})):
        resolved = spec(made)
        assert resolved.parts == training_parts(made)
        assert resolved.placement == place(made, resolved.parts)
        assert resolved.colocated_nodes == colocated_nodes(made)
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
        ({"sync": {"reference": "follow"}}, ("reference",)),
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
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        resolve(config(tmp_path))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="must be of a model family that is known"):
        resolve(made)
