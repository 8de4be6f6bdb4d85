"""`semion plan`: its figures for the configurations in configs/scale against numbers worked out by hand, its tables and its
JSON; that every one of them fits where it says it runs; and that what is measured would show a plan that is wrong.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.api import planning
from engine.bridge.plan import plan
from engine.bridge.shard_plan import ShardPlan
from engine.capacity.transfer import Machine, measure, plan_run, table
from engine.config.load import load_config
from engine.models.base import ModelShape
from engine.models.checks import check_engine_layout, check_layout
from engine.models.config_file import read_shape
from engine.models.sharding import EngineLayout, TrainerLayout
from engine.run.spec import resolve

ROOT = Path(__file__).parents[3]
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}
SCALE = sorted(path.stem.removeprefix("llama-3.1-") for path in (ROOT / "configs" / "scale").glob("*.toml"))
MARGIN = 0.05  # of a GPU's memory, for what the estimate does not know
MODEL_OF = {path: f"configs/models/llama-3.1-{path.partition('-')[0]}" for path in SCALE}
KNOWN: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}  # what `semion plan` said, for all tests of this file
SMALL = ModelShape(4, 8, 4, 2, 2, 12, 100, 1e4, None, 1e-5, False, 16)
SMALL_PLAN = plan(SMALL, 4, TrainerLayout(2, 2), 2, EngineLayout(2), ((0, 1), (2,)), 1000)


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Runs `semion plan` on a file of configs/scale; its JSON and what it printed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(planning, "_forecasts", lambda given, intervals: (None, [], None))  # tests/unit/forecast looks at it

    def run(name: str, *more: str) -> tuple[dict[str, Any], str]:
        if (name, more) not in KNOWN:
            path = tmp_path / "plan.json"
            assert cli.main(["plan", f"configs/scale/llama-3.1-{name}.toml", *more, "--json", str(path)]) == 0
            KNOWN[name, more] = path.read_text(), capsys.readouterr().out
        figures, said = KNOWN[name, more]
        return json.loads(figures), said

    return run


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("8b-colocated", (), 1.0),
        ("8b-colocated-4x8", (), 1.0),
        ("70b-colocated-4x8", (), 1.0),
        (
            "8b-colocated",
            ("trainer.tensor_parallel=2", "trainer.data_parallel=4", "inference.tensor_parallel=2", "engines=4"),
            1.0,
        ),
        ("8b-colocated", ("trainer.tensor_parallel=2", "trainer.data_parallel=4"), 0.5),  # an engine's GPU has half the policy
        ("8b-4x4", (), None),
    ],
)
def test_a_colocated_engine_takes_from_its_own_gpu_what_lies_there(name, options, share, planned):
    figures, said = planned(name, *(f"inference.{option}" if option.startswith("engines") else option for option in options))
    assert figures["own_gpu_fraction"] == (None if share is None else pytest.approx(share, abs=0.01))
    assert ("the engine rank's own GPU" in said) is (share is not None)
    sent = figures["sent_by_trainer_rank"]
    assert sent["max"] < 1.1 * sent["mean"], "replicas still share the work"


@pytest.mark.parametrize("name", SCALE)
def test_the_scale_configurations(name, planned):
    """Everything direct, nothing twice, one copy a node, replicas alike; a replay close to the busiest link."""
    figures, _ = planned(name)
    weights = 2 * PARAMETERS[name.partition("-")[0]]
    assert figures["num_bytes"] == weights
    assert figures["direct_fraction"] == figures["received_over_needed"] == 1.0
    # Every tensor rank of an engine has norms of its own: they alone are more than the weights once.
    shape = read_shape(f"configs/models/llama-3.1-{name.partition('-')[0]}")
    norms = 2 * (2 * shape.num_layers + 1) * shape.hidden
    engine_size = figures["engine_ranks"] // figures["engines"]
    assert figures["received_by_copy"]["max"] == weights + (engine_size - 1) * norms
    assert figures["from_trainer_bytes"] == figures["copies"] * figures["received_by_copy"]["max"]
    assert figures["received_by_engine_rank"]["mean"] * figures["engine_ranks"] == pytest.approx(
        figures["from_trainer_bytes"] + figures["passed_on_bytes"]
    )
    assert figures["sent_by_trainer_rank"]["mean"] * figures["trainer_ranks"] == pytest.approx(figures["from_trainer_bytes"])
    assert figures["sent_by_trainer_rank"]["max"] < 1.06 * figures["sent_by_trainer_rank"]["mean"]  # replicas, to a bucket
    assert figures["seconds_at_least"] <= figures["seconds"]


@pytest.mark.parametrize("name", SCALE)
def test_the_scale_configurations_fit_their_gpus_and_nodes(name, planned):
    figures, said = planned(name)
    config, memory = load_config(f"configs/scale/llama-3.1-{name}.toml"), figures["memory"]
    assert memory["fits"] and memory["spare_bytes"] >= MARGIN * memory["gpu_bytes"], memory
    assert "fits GPUs of 139.0 GiB" in said
    needed = (config.trainer.world_size, config.inference.engines * config.inference.tensor_parallel)
    per_node, colocated = config.cluster.gpus_per_node, config.inference.placement == "colocated"
    assert (max(needed) if colocated else sum(needed)) <= config.cluster.nodes * per_node
    assert per_node % config.trainer.tensor_parallel == per_node % config.inference.tensor_parallel == 0
    head = Path(f"configs/scale/llama-3.1-{name}.toml").read_text("utf-8").split("\n\n")[0]
    assert "Unverified on GPUs" in head.replace("\n# ", " ") and "node" in head


def test_the_layouts_of_the_scale_configurations(planned):
    """405B: 256 trainer ranks, 8 engines of 8 ranks on as many nodes, and no byte within a node. 4 x 4: the reverse."""
    figures, _ = planned("405b")
    assert (figures["trainer_ranks"], figures["engines"], figures["engine_ranks"], figures["copies"]) == (256, 8, 64, 8)
    assert figures["passed_on_bytes"] == 0
    figures, _ = planned("8b-4x4")
    assert (figures["trainer_ranks"], figures["engines"], figures["copies"]) == (4, 4, 1)
    assert figures["passed_on_bytes"] == 3 * figures["num_bytes"]


def test_options_change_what_they_should(planned):
    """Twice the network halves the busiest link; nodes of two GPUs take four times the copies; and the table says so."""
    figures, _ = planned("8b-paper-32x8")
    slow, faster = (planned("8b-paper-32x8", "--network-gigabytes-per-second", speed)[0] for speed in ("10", "20"))
    assert faster["seconds_at_least"] == pytest.approx(slow["seconds_at_least"] / 2)
    apart, said = planned("8b-paper-32x8", "sync.bucket_mebibytes=16", "cluster.gpus_per_node=2", "cluster.nodes=20")
    assert apart["from_trainer_bytes"] == 4 * figures["from_trainer_bytes"]
    assert apart["num_buckets"] > figures["num_buckets"]
    assert apart["staging_of_engine_rank"] <= 16 << 20
    for cell in (
        "100.00%",
        "1.0000",
        "received from the trainer by each of 4 nodes",
        "64.242 GB",
        f"{apart['num_messages']:,}",
    ):
        assert cell in said


@pytest.mark.parametrize("name", ["8b-4x4", "8b-colocated", "8b-colocated-4x8", "70b-colocated-4x8"])
def test_where_no_weight_leaves_its_node_nvlink_is_everywhere(name, planned):
    """The network's speed changes nothing."""
    figures, slow = (planned(name, "--network-gigabytes-per-second", speed)[0] for speed in ("45", "1"))
    assert figures["seconds"] == slow["seconds"]


def test_nodes_that_take_turns_are_as_fast_as_one(planned):
    """Each of four nodes does what the one of 8b-colocated does."""
    one, four = (planned(name)[0] for name in ("8b-colocated", "8b-colocated-4x8"))
    assert four["num_messages"] == 4 * one["num_messages"]
    assert four["seconds"] == pytest.approx(one["seconds"], rel=0.01)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("8b-16x24", "each of 3 nodes"),
        ("405b", "each of 8 nodes"),
        ("8b-colocated", "each of 8 engines, on 1 node"),
        ("8b-colocated-4x8", "each of 32 engines, on 4 nodes"),
    ],
)
def test_who_receives_from_the_trainer_is_called_what_it_is(name, label):
    """A node, whose engines pass on what one of them got, or by CUDA IPC every engine."""
    spec = resolve(
        load_config(ROOT / f"configs/scale/llama-3.1-{name}.toml", [f"model.path={ROOT}/{MODEL_OF[name]}"]), digests=False
    )
    assert any(f"received from the trainer by {label}" == row[0] for row in table(plan_run(spec, Machine())))


def test_what_train_refuses_for_want_of_gpus_is_refused(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "configs/scale/llama-3.1-8b-16x24.toml", "cluster.nodes=4"]) == 2
    said = capsys.readouterr()
    assert "found 4 * 8 and beside 16 GPUs in use inference.engines = 24" in said.err and "fits" not in said.out


def test_what_does_not_fit_is_said_and_told(planned):
    """80 GB GPUs: the exit code is still 0, the verdict and the JSON say by how much."""
    figures, said = planned("8b-4x4", "--gpu-gibibytes", "79")
    memory = figures["memory"]
    total = max(sum(device["components"].values()) for device in memory["devices"])
    assert not memory["fits"]
    assert memory["spare_bytes"] == 79 * 2**30 - total < 0
    assert f"does not fit GPUs of 79.0 GiB: {-memory['spare_bytes'] / 2**30:.1f} GiB" in said


JUDGED = ("data.reward=model", "reward_model.dtype=bfloat16")


def test_the_reward_model_is_a_device_of_its_own(planned):
    """Of the sizes in its config.json; too large, it is what does not fit."""
    path = "reward_model.path=configs/models/llama-3.1-8b"
    figures, said = planned("8b-4x4", *JUDGED, "cluster.nodes=2", path)
    plain, _ = planned("8b-4x4")
    assert figures["digest"] == plain["digest"], "the weight sync knows nothing of it"
    assert figures["memory"]["devices"][:-1] == plain["memory"]["devices"]
    assert figures["memory"]["devices"][-1]["name"] == "reward engine" and "reward engine" in said
    assert figures["memory"]["not_counted"] is plain["memory"]["not_counted"] is None and "not counted" not in said
    larger = ("reward_model.path=configs/models/llama-3.1-70b", "reward_model.kv_cache=16 GiB")
    large, said = planned("8b-4x4", *JUDGED, "cluster.nodes=2", *larger)
    assert (large["memory"]["fullest"], large["memory"]["fits"]) == ("reward engine", False)
    assert "too much on reward engine" in said


def test_a_reward_model_that_is_not_there_is_said_to_be_missing(planned):
    figures, said = planned("8b-4x4", *JUDGED, "cluster.nodes=2", "reward_model.path=models/Athene-RM-8B")
    assert [device["name"] for device in figures["memory"]["devices"]] == ["trainer rank, training", "engine rank"]
    assert figures["memory"]["not_counted"] == "models/Athene-RM-8B/config.json"
    assert "the reward engine is not counted, for there is no models/Athene-RM-8B/config.json" in said
    unused, said = planned(
        "8b-4x4", *JUDGED, "cluster.nodes=2", "reward_model.path=models/Athene-RM-8B", "sft.checkpoint_out=x"
    )
    assert unused["memory"]["not_counted"] is None and "not counted" not in said


def test_a_reward_model_of_another_family_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    overrides = [*JUDGED, f"reward_model.path={tmp_path}"]
    assert cli.main(["plan", "configs/scale/llama-3.1-8b-4x4.toml", *overrides]) == 2
    assert "reward_model.path must be a plain Llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--network-gigabytes-per-second", "0"], ("--network-gigabytes-per-second", "found 0.0")),
        (["--nvlink-gigabytes-per-second", "nan"], ("--nvlink-gigabytes-per-second", "found nan")),
        (["--gpu-gibibytes", "-1"], ("--gpu-gibibytes", "found -1.0")),
        (["inference.tensor_parallel=16"], ("inference.tensor_parallel", "found 16 with cluster.gpus_per_node = 8")),
        (["inference.tensor_parallel=3"], ("inference.tensor_parallel must divide", "key-value heads", "found 3")),
        (["trainer.pipeline_parallel=5"], ("trainer.pipeline_parallel", "32 layers", "found 5")),
        (["trainer.first_stage_layers=40"], ("trainer.first_stage_layers", "found 40 and None")),
    ],
)
def test_mistakes_are_one_sentence(arguments, parts, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "configs/scale/llama-3.1-8b-paper-32x8.toml", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("name", SCALE)
def test_the_scale_configurations_are_valid(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(f"configs/scale/llama-3.1-{name}.toml")
    assert (ROOT / config.model.path / "config.json").is_file()
    spec = resolve(config, digests=False)
    check_layout(spec.shape, spec.trainer)
    check_engine_layout(spec.shape, spec.engine)
    assert spec.placement is not None


def with_first(**changes: Any) -> ShardPlan:
    """The small plan with another first message."""
    first, *rest = SMALL_PLAN.messages
    return replace(SMALL_PLAN, messages=(replace(first, **changes), *rest))


def replace_spot(side: str) -> ShardPlan:
    """The small plan with the first transfer of its first message a row off on one side."""
    bucket = SMALL_PLAN.messages[0].bucket
    transfer, *others = bucket.transfers
    spot = getattr(transfer, side)
    moved = replace(transfer, **{side: replace(spot, row=spot.row + 1)})
    return with_first(bucket=replace(bucket, transfers=(moved, *others)))


def test_a_plan_that_takes_what_is_not_there_is_not_direct():
    """A source outside its slice, a target outside its slice, another model-parallel rank."""
    assert measure(SMALL, SMALL_PLAN, Machine())["direct_fraction"] == 1.0
    wrong_rank = with_first(source=SMALL_PLAN.messages[0].source ^ 1)
    for made in (replace_spot("source"), replace_spot("target"), wrong_rank):
        assert 0.5 < measure(SMALL, made, Machine())["direct_fraction"] < 1.0


def test_a_plan_that_sends_twice_or_not_at_all_shows():
    once = SMALL_PLAN.messages
    twice, less = (replace(SMALL_PLAN, messages=messages) for messages in ((*once, once[0]), once[1:]))
    assert measure(SMALL, twice, Machine())["received_over_needed"] > 1.0
    assert measure(SMALL, less, Machine())["received_over_needed"] < 1.0


def test_the_replay_by_hand():
    """One trainer rank to one node of two engines, one bucket: over the network once, then over NVLink once."""
    made = plan(SMALL, 4, TrainerLayout(), 1, EngineLayout(), ((0, 1),), 1 << 30)
    (message,) = made.messages
    figures = measure(SMALL, made, Machine(2.0, 4.0))
    assert figures["seconds"] == pytest.approx(message.bucket.num_bytes * (1 / 2e9 + 1 / 4e9))
    assert figures["seconds_at_least"] == pytest.approx(message.bucket.num_bytes / 2e9)
    assert figures["staging_of_trainer_rank"] == figures["staging_of_engine_rank"] == message.bucket.num_bytes
