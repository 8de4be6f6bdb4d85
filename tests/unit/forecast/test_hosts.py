"""What `semion plan` says of nodes and disk for every file of configs/scale, against bytes a parameter times parameters and a
table of what stands on which node; and what it refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.api.planning import optimized, planned
from engine.capacity.transfer import Machine
from engine.config.load import RunConfig, load_config, override
from engine.core.errors import ConfigError
from engine.forecast import disk, hosts
from engine.forecast.calibration import Calibration, Measured, calibrated
from engine.forecast.constants import Constants
from engine.forecast.seconds import Regime
from engine.run.host_memory import check_holds
from engine.run.spec import Spec, resolve, settled

ROOT = Path(__file__).parents[3]
SCALE = sorted(path.stem.removeprefix("llama-3.1-") for path in (ROOT / "configs" / "scale").glob("*.toml"))
PAPER = sorted(path.stem for path in (ROOT / "configs" / "paper").glob("*.toml"))
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}
HEAD_70B = 128_256 * 8_192  # its embedding, and its output layer
LAYER_405B = 2 * 16_384**2 + 2 * 1_024 * 16_384 + 3 * 16_384 * 53_248 + 2 * 16_384
LAST_405B = 16 * LAYER_405B + 128_256 * 16_384 + 16_384  # of eight stages, the one with the output layer
WEIGHTS, STATE = 2, 12  # bytes a parameter: bfloat16; two moments and the float32 original
SMALL = ("data.prompts_per_step=16", "sampling.max_tokens=256")
OWN = calibrated(Calibration(machine="a machine", constants={"iteration_seconds": Measured(value=0.003, how="decoding")}))
DISK, COPY = 2e9, 20e9  # bytes a second, the planner's constants
# (parameters of the fullest node's ranks, ranks that share the stage, of them on a node, nodes that hold the model once when
# what each reads is added up)
NODES: dict[str, tuple[float, int, int, int]] = {
    "405b": (LAST_405B, 32, 8, 4 + 8),  # a stage's 32 ranks on four nodes, four replicas of 8 nodes; eight nodes of engines
    "70b-colocated-4x8": (PARAMETERS["70b"], 32, 8, 4),
    "70b-fp8": (PARAMETERS["70b"] / 2, 8, 8, 1 + 2),  # half the layers and a head a node; two nodes of engines
    "8b-16x24": (PARAMETERS["8b"], 16, 8, 5),
    "8b-4x4": (PARAMETERS["8b"], 4, 4, 1),
    "8b-8x80": (PARAMETERS["8b"], 8, 8, 1),
    "8b-colocated": (PARAMETERS["8b"], 8, 8, 1),
    "8b-colocated-4x8": (PARAMETERS["8b"], 32, 8, 4),
    "8b-paper-32x8": (PARAMETERS["8b"], 32, 8, 5),
}


def of(name: str, *overrides: str) -> RunConfig:
    model = f"model.path={ROOT}/configs/models/llama-3.1-{name.partition('-')[0]}"
    return load_config(ROOT / f"configs/scale/llama-3.1-{name}.toml", [model, *overrides])


def spec_of(config: RunConfig) -> Spec:
    return resolve(settled(config, on_gpus=True), digests=False)


@pytest.mark.parametrize("name", SCALE)
def test_the_nodes_and_the_disk_of_the_scale_configurations(name: str):
    """Norms that tensor-parallel ranks hold each, and rounding, are less than a thousandth."""
    figures = planned(of(name), Machine(), intervals=()).figures
    saved, nodes, found = figures["checkpoint"], figures["hosts"], figures["forecast"]
    model, (stage, sharing, on_node, readers) = PARAMETERS[name.partition("-")[0]], NODES[name]
    rank = (WEIGHTS + STATE) * stage / sharing

    def near(value: float) -> Any:
        return pytest.approx(value, rel=1e-3)

    assert saved["num_bytes"] == near((WEIGHTS + STATE) * model)
    assert saved["kept_bytes"] == near(3 * (WEIGHTS + STATE) * model)  # two are kept, and one is written
    assert saved["rank_bytes"] == near(rank)
    assert saved["pause_seconds"] == near(rank / COPY)
    assert saved["write_seconds"] == near((WEIGHTS + STATE) * model / DISK)
    assert saved["count"] == found["num_checkpoints"] == (40 if name in ("8b-16x24", "8b-paper-32x8") else 10)
    assert nodes["held"]["snapshot of a checkpoint"] == near(rank * on_node)
    assert nodes["held"]["optimizer state and reference"] == 0
    s = {"405b": 10, "70b-fp8": 10, "8b-16x24": 10, "8b-4x4": 10, "8b-paper-32x8": 10}.get(name, 1)
    prompts = {"405b": 128, "8b-colocated-4x8": 256}.get(name, 64)
    if name == "405b":  # rank 0 is on a node of the first stage, which has two layers less
        assert "rollouts" not in nodes["held"]
    else:
        assert nodes["held"]["rollouts"] == s * prompts * 8 * 2048 * (4 + 4 + 4)
    assert nodes["weights_bytes"] == WEIGHTS * model
    assert nodes["read"] == near(readers * WEIGHTS * model)
    assert nodes["most_read"] == near(WEIGHTS * model)
    tokens_a_day = prompts * 8 * 0.35 * 2048 * 86_400 / found["step_seconds"]
    assert found["ledger_bytes_per_day"] == pytest.approx(5.7 * tokens_a_day, rel=0.05), "lengths are drawn, and cut at the cap"


@pytest.mark.parametrize("name", PAPER)
def test_the_nodes_and_the_disk_of_the_papers_configurations(name: str):
    """An 8B on 32 ranks of four nodes; engines, and a reward model that is not here, on the others."""
    made = spec_of(load_config(ROOT / f"configs/paper/{name}.toml", [f"model.path={ROOT}/configs/models/llama-3.1-8b"]))
    found, of_nodes = disk.saving(made, Constants()), hosts.hosts(made)
    assert found is not None and found.num_bytes == (WEIGHTS + STATE) * PARAMETERS["8b"]
    assert found.rank_bytes == pytest.approx((WEIGHTS + STATE) * PARAMETERS["8b"] / 32)
    assert of_nodes.held["snapshot of a checkpoint"] == pytest.approx((WEIGHTS + STATE) * PARAMETERS["8b"] / 4)
    assert of_nodes.nodes == made.config.cluster.nodes
    assert of_nodes.read == WEIGHTS * PARAMETERS["8b"] * (of_nodes.nodes - made.starts_reward_engine)


def test_every_configuration_has_its_row():
    assert set(SCALE) == set(NODES)


def test_the_command_prints_what_json_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "140")
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "configs/scale/llama-3.1-8b-4x4.toml", *SMALL, "--json", str(file)]) == 0
    said, figures = capsys.readouterr().out, json.loads(file.read_text())
    day = figures["forecast"]["ledger_bytes_per_day"] / 1e9
    for words in (
        "112.4 GB, each element once; 28.1 GB by the fullest rank",
        "10, 337.3 GB on the disk at the fullest",
        "host memory of a node, snapshot of a checkpoint",
        "16.1 GB at most, of 16.1 GB",
        f"{day:,.1f} GB a day",
    ):
        assert words in said, words


def test_a_reference_on_the_host_and_offloaded_state_are_on_every_rank_of_a_node():
    """Where s > 1 a copy is kept: two bytes a parameter on each of eight ranks. Offloaded: 12 and a gradient of 4, shared."""
    held = hosts.hosts(spec_of(of("8b-8x80", "sync.sync_interval=10"))).held
    assert held["optimizer state and reference"] == 8 * WEIGHTS * PARAMETERS["8b"]
    held = hosts.hosts(spec_of(of("8b-4x4", "optimizer.offload_share=1.0"))).held
    assert held["optimizer state and reference"] == pytest.approx(16 * PARAMETERS["8b"])


@pytest.mark.parametrize(
    ("name", "ranks", "stage", "files", "on_node"),
    [
        ("8b-4x4", 4, 8.03e9, 4, 4),  # (parameters of a stage, its files, of them on the fullest node at a time)
        ("8b-16x24", 16, 8.03e9, 16, 8),
        ("70b-fp8", 16, PARAMETERS["70b"] / 2, 14, 8),  # files are no larger than 5 GiB, so its eight ranks write in two turns
        ("405b", 256, LAST_405B, 64, 8),  # a stage's two chunks one after the other, of 32 files each
    ],
)
def test_the_exported_model_of_supervised_training_is_held_file_by_file(
    name: str, ranks: int, stage: float, files: int, on_node: int
):
    """Whole tensors stand in a file, so files are of about one size."""
    spec = spec_of(of(name, "sft.checkpoint_out=x"))
    held = hosts.hosts(spec).held
    assert spec.config.trainer.world_size == ranks and not held.get("rollouts") and "snapshot of a checkpoint" not in held
    assert held["files of the exported model"] == pytest.approx(WEIGHTS * stage * on_node / files, rel=0.1)
    assert "files of the exported model" not in hosts.hosts(spec_of(of(name))).held
    with pytest.raises(ConfigError, match=r"must have the memory for .* GiB needed \(.*files of the exported model \d+"):
        check_holds(spec, held, 1 << 30, "here")


def test_a_reference_of_its_own_is_written_and_copied_too():
    """Mixed at every sync, it is no other checkpoint's policy."""
    plain, mixed = of("8b-4x4", "sync.sync_interval=10"), of("8b-4x4", "sync.sync_interval=10", "sync.reference_mix=0.5")
    before, after = spec_of(plain), spec_of(mixed)
    assert disk.checkpoint_bytes(after) - disk.checkpoint_bytes(before) == WEIGHTS * PARAMETERS["8b"]
    assert disk.snapshot_bytes(after) - disk.snapshot_bytes(before) == WEIGHTS * PARAMETERS["8b"] / 4


def test_without_the_distributed_optimizer_one_replica_writes_the_state():
    made = spec_of(of("8b-4x4", "trainer.distributed_optimizer=false"))
    first, other = (disk.snapshot_bytes(made, 0, first_replica=first) for first in (True, False))
    assert (first, other) == ((WEIGHTS / 4 + STATE) * PARAMETERS["8b"], WEIGHTS / 4 * PARAMETERS["8b"])
    assert hosts.hosts(made).held["snapshot of a checkpoint"] == first + 3 * other == disk.checkpoint_bytes(made)


# -- what cannot run


LONG = ("sampling.max_tokens=32768", "inference.max_model_tokens=33792", "trainer.microbatch_tokens=33792")
JUDGED = (
    "data.reward=model",
    "reward_model.dtype=bfloat16",
    "cluster.nodes=2",
    f"reward_model.path={ROOT}/configs/models/llama-3.1-8b",
)


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("8b-16x24", ("cluster.nodes=4",), "beside 16 GPUs in use inference.engines = 24"),
        ("8b-colocated", ("inference.engines=9",), "needs every engine inside one node of the trainer's GPUs"),
        ("8b-4x4", (*LONG, "inference.kv_cache='1024 MiB'"), "inference.kv_cache must hold one request"),
        ("8b-4x4", (*JUDGED, "reward_model.kv_cache='64 MiB'"), "reward_model.kv_cache must hold one request"),
        ("8b-4x4", ("inference.max_model_tokens=140000",), "must not exceed the model's 131072 positions; found 140000"),
        ("8b-4x4", (*SMALL, "inference.timeout_seconds=1"), "takes for a step's responses; found 1 for"),
        ("8b-4x4", (*SMALL, *JUDGED, "reward_model.timeout_seconds=0.001"), "takes for a step's answers; found 0.001 for"),
    ],
)
def test_a_plan_of_what_cannot_run_is_refused(name: str, overrides: tuple[str, ...], told: str):
    with pytest.raises(ConfigError) as caught:
        planned(of(name, *overrides), Machine(), intervals=())
    assert told in str(caught.value)


def test_an_evaluation_that_misses_its_deadline_is_refused(tmp_path):
    """Of 400 problems with 4 samples: an engine is asked for a sixteenth of them at a time, beside a step's 128 answers."""
    file = tmp_path / "problems.jsonl"
    file.write_text('{"problem": "1 + 1", "answer": "2"}\n' * 400)
    asked = (*SMALL, f"data.held_out={file}", "evaluation.samples=4")
    found = planned(of("8b-4x4", *asked), Machine(), intervals=()).forecast
    assert found is not None and found.evaluation_wait_seconds is not None and found.evaluation_seconds is not None
    assert found.longest_wait_seconds < found.evaluation_wait_seconds < found.evaluation_seconds
    between = (found.longest_wait_seconds + found.evaluation_wait_seconds) / 2
    with pytest.raises(ConfigError, match="longer than an engine takes for a part of an evaluation"):
        planned(of("8b-4x4", *asked, f"inference.timeout_seconds={between}"), Machine(), known=OWN, intervals=())


def test_guesses_refuse_what_misses_its_deadline_by_far_only():
    """Twice: published figures are within 1.73 of what data sheets and guesses say. A machine's own refuse as they are."""
    found = planned(of("8b-4x4", *SMALL), Machine(), intervals=()).forecast
    assert found is not None
    asked = of("8b-4x4", *SMALL, f"inference.timeout_seconds={found.longest_wait_seconds / 1.5}")
    for guesses in (None, calibrated(), calibrated(None, {"network_gigabytes_per_second": 25.0})):
        planned(asked, Machine(), known=guesses, intervals=())
    with pytest.raises(ConfigError, match="longer than an engine takes for a step's responses"):
        planned(asked, Machine(), known=OWN, intervals=())


def test_the_search_leaves_out_what_plan_refuses_for_its_deadlines():
    """Where an engine may take no longer than the fastest layout lets it, that one is what is left; where none is fast enough,
    the search refuses in the words of `plan`."""
    asked, four = of("8b-4x4", *SMALL), 4
    free = optimized(asked, Machine(), four, known=OWN, intervals=()).best[Regime(10)]
    waits = [one.forecast.longest_wait_seconds for one in free]
    between = (min(waits) + max(waits)) / 2
    strict = override(asked, {"inference.timeout_seconds": between})
    kept = optimized(strict, Machine(), four, known=OWN, intervals=()).best[Regime(10)]
    assert kept and all(one.forecast.longest_wait_seconds <= between for one in kept)
    assert {one.layout for one in free if one.forecast.longest_wait_seconds <= between} <= {one.layout for one in kept}
    for one in kept:
        planned(one.config, Machine(), known=OWN, intervals=())
    loose = optimized(strict, Machine(), four, known=calibrated(), intervals=()).best[Regime(10)]
    assert any(one.forecast.longest_wait_seconds > between for one in loose), "guesses refuse by far only"
    with pytest.raises(ConfigError, match="longer than an engine takes for a step's responses"):
        optimized(override(asked, {"inference.timeout_seconds": 0.01}), Machine(), four, known=OWN, intervals=())


def test_engines_that_rest_are_not_waited_for():
    """With updates in flight a step is asked for long before engines may go on with it, where the trainer takes its time."""
    slow = calibrated(None, {"train_peak_share": 0.004})
    waits = {}
    for name, options in (("strict", ()), ("in flight", ("sync.lookahead=2", "sync.in_flight=true"))):
        found = planned(of("8b-4x4", *SMALL, *options), Machine(), known=slow, intervals=()).forecast
        assert found is not None
        waits[name] = found.longest_wait_seconds
    assert waits["in flight"] < 2 * waits["strict"]


def test_a_checkpoint_that_misses_its_deadline_is_refused():
    """256 ranks have 256 MiB each on their way: at 0.1 GB/s nothing new appears for 687 s, and rank 0 waits 600."""
    slow = calibrated(None, {"disk_gigabytes_per_second": 0.1})
    with pytest.raises(ConfigError, match=r"trainer\.timeout_seconds must be .* found 600 for 687 s"):
        planned(of("405b", *SMALL), Machine(), known=slow, intervals=())


def test_what_the_search_finds_fastest_keeps_its_deadline_with_every_engine_that_a_plan_replays():
    """The one layout whose first four engines take less than twice 6.75 s, 13.2, has one among the others that takes 13.7."""
    asked = of("8b-16x24", "inference.timeout_seconds=6.75")
    with pytest.raises(ConfigError, match=r"longer than an engine takes for a step's responses; found 6\.75"):
        optimized(asked, Machine(), 40, intervals=())
