"""The commands, end to end on two CPU cores: supervised training, semi-online, offline and online runs, a killed run that
resumes, evaluation, rollouts, export. Each run is real: megatron-core ranks, vLLM engines, gloo between them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from engine import cli
from engine.config.load import RunConfig, dump_config, load_config
from engine.observe.rollouts import rollouts_of
from engine.rollouts.ledger import RolloutLedger
from engine.run.checkpoint import latest
from engine.run.nodes import engines_folder, ray_folder
from tests.e2e import in_process
from tests.unit.rollouts.test_metric_names import documented

pytestmark = pytest.mark.timeout(1800)  # a run is half a minute of work, on a machine that may be busy
PATIENCE_SECONDS = 600

Make = Callable[..., RunConfig]
TIMES = ("_seconds", "_per_second", "_idle_share")  # metrics that two equal runs may have otherwise
SEMI_ONLINE = [
    "trainer.tensor_parallel=2",
    "sync.sync_interval=2",
    "sync.reference=3",  # so that what a run goes on from after 2 steps holds a reference that is not the policy
    *("algorithm.nll_weight=0.2", "algorithm.entropy_weight=0.05"),
    "inference.engines=2",
    "checkpoint.every=2",
]
PROFILED = ["profile.tool=torch", "profile.first_step=2", "profile.num_steps=2", "profile.ranks=[0, 1]"]
ONLINE = [
    *("trainer.data_parallel=2", "trainer.distributed_optimizer=true"),
    *("algorithm.loss=grpo", "algorithm.kl_weight=0.05", "sampling.temperature=0.7"),
    *("inference.engines=2", "run.steps=3", "checkpoint.every=1", "checkpoint.keep=3"),
]
OFFLINE = [
    *("trainer.pipeline_parallel=2", "sync.sync_interval=never", "checkpoint.every=2"),
    *("algorithm.loss=group_dpo", "algorithm.alpha=0.5", "algorithm.kl_weight=0.05"),
    *("data.prompts_per_step=4", "data.spare_prompts=2"),
]
FINAL = "checkpoints/step_00000004/policy"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "engine.cli", *arguments]


def semion(*arguments: str, expect: int = 0) -> str:
    """What a command says, run in this process, which has the libraries that a new one would import for ten seconds."""
    said = io.StringIO()
    with in_process.environment(), redirect_stdout(said), redirect_stderr(said):
        code = cli.main(arguments)
    if code == 130:
        raise KeyboardInterrupt  # which the command has taken for itself
    assert code == expect, said.getvalue()[-6000:]
    return said.getvalue()


def semion_apart(*arguments: str, expect: int = 0, timeout: float = 400) -> str:
    """The same in a process of its own, which has read no file before."""
    run = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout)
    assert run.returncode == expect, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout + run.stderr


def final(config: RunConfig) -> bytes:
    """The weights that a run of four steps ends with, all files of them."""
    files = sorted((config.run_directory / FINAL).glob("*.safetensors"))
    assert files
    return b"".join(file.read_bytes() for file in files)


def written(config: RunConfig, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{config.run_directory.name}.toml"
    file.write_text(dump_config(config))
    return str(file)


def rows(config: RunConfig, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_directory / name).read_text().splitlines()]


BYTES = {"token_ids", "log_probs"}  # held as bytes, which pydantic does not dump as numbers


def rollouts(config: RunConfig) -> list[dict[str, Any]]:
    """All that the run wrote down of its rollouts, tokens and log-probs with them."""
    place = rollouts_of(config.run_directory)
    if place is None:
        return []
    ledger = RolloutLedger(place)
    return [
        row.model_dump(exclude_unset=True, exclude=BYTES) | {name: list(getattr(row, name)) for name in BYTES}
        for step in ledger.steps
        for row in ledger.rows(step)
    ]


def untimed(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not any(part in k for part in TIMES)} for row in metrics]


def sent_alike(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what depends on where engines are and when they sample: the bytes of a sync, and the tokens sampled meanwhile."""
    told = ("sync_mebibytes", "generation_tokens")
    return [{key: value for key, value in row.items() if key not in told} for row in untimed(metrics)]


def test_every_rollout_comes_from_the_version_of_its_interval(semi_online: tuple[RunConfig, str]) -> None:
    config, _ = semi_online
    ledger = rollouts(config)
    assert len(ledger) == config.run.steps * config.data.prompts_per_step * config.algorithm.samples_per_prompt
    assert {(row["step"], row["version"]) for row in ledger} == {(0, 0), (1, 0), (2, 2), (3, 2)}
    assert len({row["seed"] for row in ledger}) == len(ledger), "every sample has a seed of its own"
    assert [row["staleness"] for row in rows(config, "metrics.jsonl")] == [0, 1, 0, 1]
    assert {row["status"] for row in ledger} == {"ok"}
    assert 0 < sum(row["reward"] for row in ledger) < len(ledger)


def test_a_run_tells_what_it_does_while_it_does_it_and_leaves_nothing_of_its_ray(semi_online: tuple[RunConfig, str]) -> None:
    """Each process speaks for itself, rank 0 for the ranks; the start's phases are on record with their seconds."""
    config, printed = semi_online
    told = [row for row in rows(config, "events.jsonl") if row["kind"] == "activity"]
    done = [(row["where"], row["what"], row["about"]) for row in told]
    assert len(done) == len(set(done)), "each once"
    rank = "trainer rank 0"
    for known in (
        ("the command", "preflight", ""),
        ("the command", "ray", ""),
        ("the command", "processes", ""),
        *((f"engine {i}", "engine", "") for i in range(2)),
        *((rank, what, "") for what in ("ranks", "model", "weights", "engines", "connect", "last sync")),
        *((rank, "evaluation", f"step {step} on held_out") for step in (0, 4)),
        *((rank, "checkpoint", f"of {step} steps") for step in (2, 4)),
    ):
        assert known in done, known
    (weights,) = [row for row in told if row["what"] == "weights"]
    assert weights["done"] == weights["total"] > 0 and weights["unit"] == "bytes"
    (start,) = rows(config, "startup.jsonl")
    assert start["step"] == 0 and all(0 <= phase["seconds"] <= start["seconds"] for phase in start["phases"])
    assert {"preflight", "ray", "processes", "ranks", "model", "weights", "engine", "prompts", "evaluation"} <= {
        phase["name"] for phase in start["phases"]
    }
    places = [printed.index(words) for words in ("engine 1 (of 2) is up", "step 0: held-out", "train 1/4", "step 4: held-out")]
    assert places == sorted(places), "as it happened"
    assert not list(ray_folder().glob(f"session_*_{os.getpid()}")) and not engines_folder().exists()
    assert not list((config.run_directory / "logs").glob("*.jsonl"))


def test_metrics_are_what_the_readme_promises(semi_online: tuple[RunConfig, str]) -> None:
    config, printed = semi_online
    metrics = rows(config, "metrics.jsonl")
    wanted = {
        *("reward_mean", "accuracy", "skipped_prompts", "loss", "margin_mean", "rollout_entropy", "completion_tokens_mean"),
        *("staleness", "generation_tokens_per_second", "training_tokens_per_second", "log_prob_gap_mean", "grad_norm"),
        *("reward_timeouts", "wait_seconds", "step_seconds", "learning_rate"),
    }
    assert all(wanted <= row.keys() <= documented() for row in metrics)
    assert all(("sync_seconds" in row) is (row["step"] % 2 == 0) for row in metrics)
    assert metrics[0]["log_prob_gap_mean"] < 1e-5 < metrics[1]["log_prob_gap_mean"], "equal when fresh, apart when stale"
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert [evaluation["step"] for evaluation in summary["evaluations"]] == [0, 4]
    assert "held-out accuracy" in printed
    assert list((config.run_directory / "tensorboard").iterdir())


def test_a_profiled_run_says_where_its_time_went(semi_online: tuple[RunConfig, str], tmp_path: Path) -> None:
    """That it is the same run, the next test shows: it has the bits of one that is not profiled."""
    config, _ = semi_online
    printed = semion("profile", str(config.run_directory), "--json", str(tmp_path / "figures.json"))
    assert "decode" in printed and "log-probs" in printed
    processes = json.loads((tmp_path / "figures.json").read_text())["processes"]
    assert [process["process"] for process in processes] == ["engine-0", "rank-0", "rank-1"]
    engine, *ranks = ({row["phase"]: row for row in process["rows"]} for process in processes)
    steps = rows(config, "metrics.jsonl")[2:]
    assert engine.keys() == {"window", "place", "decode"}
    assert engine["place"]["count"] == 1 < engine["decode"]["count"]
    top = {"publish", "wait", "score", "train", "checkpoint"}
    inner = {"reference", "forward", "log-probs", "backward", "reduce"}
    for found, more in zip(ranks, ({"rewards"}, set()), strict=True):
        assert found.keys() == {"window", "optimizer", *top, *inner, *more}
        assert 0.5 < sum(found[name]["share"] for name in top) <= 1  # nine tenths, where no other process has the cores
        assert found["forward"]["seconds"] + found["backward"]["seconds"] < sum(step["train_seconds"] for step in steps)
        assert found["train"]["seconds"] >= found["backward"]["seconds"] + found["optimizer"]["seconds"]
        assert found["forward"]["count"] == 2 * found["backward"]["count"], "the reference has a forward and no backward"
        assert found["train"]["count"] == found["checkpoint"]["count"] == 2 and found["publish"]["count"] == 1
        assert found["window"]["seconds"] >= sum(step["step_seconds"] for step in steps) * 0.9
    assert ranks[0]["wait"]["seconds"] >= ranks[0]["rewards"]["seconds"]


@contextmanager
def started(file: str, log: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run of a configuration under way in a process of its own, which adds what it says to `log`; left, it has ended."""
    with log.open("ab") as said:
        run = subprocess.Popen(command("train", file, *flags), stdout=said, stderr=subprocess.STDOUT)
    try:
        yield run
    finally:
        run.kill()  # a run that is given up must not go on beside the next tests
        run.wait()


def is_ours(process: psutil.Process) -> bool:
    """Whether a process of a run is a rank or an engine, by the title that Ray gives it."""
    return any(
        " ".join(process.cmdline()).startswith(f"ray::{name}")
        for name in ("trainer rank", "TrainerRank", "engine ", "VllmEngine")
    )


def until(condition: Callable[[], bool], run: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for something a run does; fails with its log when it ends before, or takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline and run.poll() is None, log.read_text()[-4000:]
        time.sleep(0.01)


def tensors(config: RunConfig) -> dict[str, bytes]:
    """Every tensor file of the run's last checkpoint."""
    folder = latest(config.run_directory / "checkpoints")
    assert folder is not None
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}
    assert len(files) > config.trainer.world_size
    return files


def test_a_run_that_is_stopped_then_killed_and_judged_at_every_step_ends_with_every_bit(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    """Asked before its first step, it ends at the first sync boundary, although checkpoint.every would have it save at the end
    only; resumed, it is killed (SIGKILL) in the next interval; resumed again, it ends as the run that nobody disturbed, which
    is profiled, and is judged at its ends only."""
    whole, _ = semi_online
    changed = ["checkpoint.every=end", "evaluation.every=1"]
    config = run_config(*SEMI_ONLINE, *changed, directory="disturbed")
    file, log = written(config, tmp_path), tmp_path / "log"
    with started(file, log) as run:
        until(lambda: "starting 2 trainer ranks" in log.read_text(), run, log)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=PATIENCE_SECONDS) == 75, log.read_text()[-2000:]
    assert "asked to stop: saved after 2 steps, --resume auto goes on" in log.read_text()
    assert (config.run_directory / "checkpoints" / "LATEST").read_text() == "step_00000002"
    assert "add --resume auto" in semion("train", file, expect=2)
    with started(file, log, "--resume", "auto") as run:
        until(lambda: (config.run_directory / "metrics.jsonl").read_text().count("\n") > 2, run, log)
        ours = [one for one in psutil.Process(run.pid).children(recursive=True) if is_ours(one)]
        assert len(ours) >= 3, "two ranks and an engine"
        ours[0].send_signal(signal.SIGSTOP)  # it can do nothing by itself
        run.kill()  # SIGKILL
    deadline = time.monotonic() + 60
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in ours):
        assert time.monotonic() < deadline, "a process outlives its command, and would write its records and keep its GPUs"
        time.sleep(0.1)
    semion("train", file, "--resume", "auto")
    assert rollouts(config) == rollouts(whole)
    written_down, undisturbed = (sorted((one.run_directory / "rollouts").iterdir()) for one in (config, whole))
    assert [(one.name, one.read_bytes()) for one in written_down] == [(one.name, one.read_bytes()) for one in undisturbed]
    assert sent_alike(rows(config, "metrics.jsonl")) == sent_alike(rows(whole, "metrics.jsonl"))
    assert final(config) == final(whole)
    judged = rows(config, "evaluations.jsonl")
    assert [(row["step"], row["version"]) for row in judged] == [(step, step) for step in range(5)]
    assert [row for row in judged if row["step"] in (0, 4)] == rows(whole, "evaluations.jsonl")
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert [row["step"] for row in summary["evaluations"]] == list(range(5)), "those before the stops survive them"


def test_engines_that_take_turns_with_the_trainer_change_no_bit(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    """Colocated: asleep they lose weights and KV cache, also between two evaluations."""
    apart, _ = semi_online
    colocated = ["inference.placement=colocated", "sync.transport=ipc", "evaluation.every=3"]
    config = run_config(*SEMI_ONLINE, *colocated, directory="colocated")
    semion("train", written(config, tmp_path))
    metrics, theirs = rows(config, "metrics.jsonl"), rows(apart, "metrics.jsonl")
    assert sent_alike(metrics) == sent_alike(theirs)
    assert ["rollout_seconds" in row for row in metrics] == [True, False, True, False]
    assert not any("rollout_seconds" in row for row in theirs)
    assert rollouts(config) == rollouts(apart)
    assert [(row["step"], row["version"]) for row in rows(config, "evaluations.jsonl")] == [(0, 0), (3, 3), (4, 4)]
    assert final(config) == final(apart)


def test_resume_refuses_another_run_and_altered_bits(semi_online: tuple[RunConfig, str], tmp_path: Path) -> None:
    config, _ = semi_online
    file = written(config, tmp_path)
    assert "algorithm.beta" in semion("train", file, "algorithm.beta=0.5", "--resume", "auto", expect=4)
    altered = tmp_path / "altered"
    checkpoint = config.run_directory / "checkpoints" / "step_00000004"
    subprocess.run(["cp", "-r", str(checkpoint), str(altered)], check=True)
    weights = altered / "policy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors differs from its digest" in semion("export", str(altered), str(tmp_path / "out"), expect=4)


def test_a_fork_in_another_layout_goes_on_from_the_same_weights(semi_online: tuple[RunConfig, str], tmp_path: Path) -> None:
    """Two tensor-parallel ranks become two data-parallel ones that share the optimizer's state: what the engines sample from
    the forked weights is the same to the last bit, and what is trained from it is but for the order of sums."""
    config, _ = semi_online
    directory = tmp_path / "fork"
    layout = ["trainer.tensor_parallel=1", "trainer.data_parallel=2", "trainer.distributed_optimizer=true"]
    changes = [f"run.directory={directory}", *layout, "checkpoint.other_layout=allow", "profile.tool=off"]
    told = semion("fork", str(config.run_directory), *changes, "--at", "2")
    assert f"semion train {directory / 'config.toml'} --resume auto" in told
    said = semion("train", str(directory / "config.toml"), "--resume", "auto")
    assert "resumed after 2 steps in another layout than before (TP 2 PP 1 DP 1 -> TP 1 PP 1 DP 2)" in said
    fork = load_config(directory / "config.toml")
    assert rollouts(fork) == [row for row in rollouts(config) if row["step"] >= 2]
    theirs, ours = rows(config, "metrics.jsonl")[2:], rows(fork, "metrics.jsonl")
    assert [row["step"] for row in ours] == [2, 3]
    for before, now in zip(theirs, ours, strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "margin_mean", "target_tokens", "learning_rate"):
            assert now[name] == pytest.approx(before[name], rel=1e-4, abs=1e-7), name
    assert "staleness 0..1, proven from 72 rollouts of 2 steps" in semion("report", str(directory))


def test_the_exported_policy_generates_in_transformers_what_the_pool_generates(
    semi_online: tuple[RunConfig, str], tmp_path: Path
) -> None:
    config, _ = semi_online
    exported = tmp_path / "exported"
    semion("export", str(config.run_directory), str(exported))
    model = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    samples = [row for row in rows(config, "samples.jsonl") if row["step"] == config.run.steps]
    assert len(samples) == 5
    for sample in samples:
        prompt = torch.tensor([sample["prompt_ids"]])
        output = model.generate(prompt, max_new_tokens=config.sampling.max_tokens, do_sample=False, pad_token_id=0)
        completion = output[0, prompt.shape[1] :]
        assert completion.tolist() == sample["token_ids"]
        assert tokenizer.decode(completion, skip_special_tokens=True) == sample["text"]


def test_offline_over_pipeline_stages_keeps_the_seed_weights_and_can_be_prolonged(
    offline: RunConfig, make_offline: Make, tmp_path: Path
) -> None:
    other = make_offline(tmp_path, "evaluation.every=1", directory="prolonged")
    file = written(other, tmp_path)
    semion("train", file, "run.steps=2")
    semion("train", file, "--resume", "auto")
    assert rollouts(other) == rollouts(offline)
    assert untimed(rows(other, "metrics.jsonl")) == untimed(rows(offline, "metrics.jsonl"))
    assert final(other) == final(offline)
    assert {row["version"] for row in rollouts(offline)} == {0}
    judged = [(row["step"], row["version"]) for row in rows(other, "evaluations.jsonl")]
    assert judged == [(step, step) for step in range(5)], "between its ends it evaluates newer weights than the seed's"
    metrics = rows(offline, "metrics.jsonl")
    assert [row["staleness"] for row in metrics] == [0, 1, 2, 3]
    assert ["sync_seconds" in row for row in metrics] == [True, False, False, False]


def test_online_grpo_over_data_parallel_ranks_is_never_stale(online: RunConfig) -> None:
    assert {(row["step"], row["version"]) for row in rollouts(online)} == {(0, 0), (1, 1), (2, 2)}
    metrics = rows(online, "metrics.jsonl")
    assert all(row["staleness"] == 0 and row["log_prob_gap_mean"] < 1e-5 for row in metrics)
    assert all(abs(row["ratio_mean"] - 1) < 1e-4 for row in metrics), "strictly on policy the ratio is 1"
    assert all(abs(row["ratio_max"] - 1) < 1e-4 and abs(row["rollout_kl_mean"]) < 1e-8 for row in metrics)
    ledger = rollouts(online)
    assert {row["temperature"] for row in ledger} == {0.7}, "log-probs are of what was sampled, and so are the trainer's"


def test_the_guard_stops_a_run_at_a_state_that_can_go_on(stopped: tuple[RunConfig, str], tmp_path: Path) -> None:
    """Every length is below a thousand times the first ones: found with the sixth step, where a sync boundary is."""
    config, said = stopped
    assert "step 5: length collapsed" in said
    assert "guard.action = 'stop' ended the run after 6 steps, saved in a checkpoint" in said
    assert [(row["step"], row["what"]) for row in rows(config, "guard.jsonl")] == [(5, "length")]
    assert [row["step"] for row in rows(config, "metrics.jsonl")] == list(range(6))
    assert (config.run_directory / "checkpoints" / "LATEST").read_text() == "step_00000006"
    page = tmp_path / "report.html"
    proof = semion("report", str(config.run_directory), "--output", str(page))
    assert "s = 3 (semi-online): staleness 0..2, proven from 216 rollouts of 6 steps" in proof
    assert "length collapsed" in page.read_text()


def test_supervised_training_makes_a_checkpoint_that_answers(run_config: Make, tmp_path: Path) -> None:
    made = tmp_path / "made"
    config = run_config(
        *("trainer.data_parallel=2", "run.steps=200", "sft.sequences_per_step=20", f"sft.checkpoint_out={made}"),
        *("optimizer.learning_rate=0.003", "optimizer.weight_decay=0.0"),  # at 0.005 the loss ends in spikes
        directory="sft",
    )
    twice = tmp_path / "sums.jsonl"  # every row comes again, and is left out
    twice.write_text(Path(config.data.train).read_text() * 2)
    said = semion("sft", written(config, tmp_path), f"data.train={twice}")
    assert "data.train: 20 worked solutions; left out: 0 too long, 20 that came before" in said
    metrics = rows(config, "metrics.jsonl")
    assert metrics[-1]["nll_mean"] < 0.1 * metrics[0]["nll_mean"]
    result = tmp_path / "eval.json"
    evaluated = run_config(f"model.path={made}", "evaluation.temperature=0.0", directory="eval")
    held_out = f"data.held_out={config.data.train}"  # what it was taught, so that the outcome is certain
    semion("eval", written(evaluated, tmp_path), held_out, "--json", str(result))
    figures = json.loads(result.read_text())
    assert figures["mean"] > 0.8
    assert len(figures["records"]) == figures["num_problems"] * figures["num_seeds"] == 40


OWN = """
from engine.rewards.base import reward

@reward(verifiable=True)
def follows(completion, row, finish_reason):
    short = len(completion.split()) <= row["instructions"][0]["n"]
    return {"short": float(short), "whole": 0.5 * (finish_reason == "stop")}

async def spread(group):
    return [float(len(set(group)))] * len(group)
"""


def test_rollouts_to_a_file_with_rewards_of_the_users_own_beside_math(run_config: Make, tmp_path: Path) -> None:
    """One that looks at a column of its rows and one of groups, on samples of a real engine."""
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"problem": f"{i}+{i}+0", "instructions": [{"type": "max_words", "n": 3 + i % 2}]} for i in range(8)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = json.dumps([f"{tmp_path}/own.py:{name}" for name in ("follows", "spread")])
    mix = f'data.mix=[{{train = "{tmp_path}/own.jsonl", template = "{{problem}}", prompts_per_step = 2, reward = {names}}}]'
    config, out = run_config("run.steps=3", mix, directory="own"), tmp_path / "own_rollouts.jsonl"
    semion("rollout", written(config, tmp_path), "--output", str(out), "--json", str(tmp_path / "figures.json"))
    ledger = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["step"], row["version"]) for row in ledger} == {(0, 0), (1, 0), (2, 0)}, "one model, whatever the regime"
    assert all(len(row["log_probs"]) == len(row["token_ids"]) and max(row["log_probs"]) <= 0 for row in ledger)
    own = [row for row in ledger if "reward_parts" in row]
    assert (len(ledger), len(own), {row["status"] for row in ledger}) == (3 * 48, 3 * 12, {"ok"})
    for row in own:
        parts = row["reward_parts"]
        assert parts["follows"] == parts["follows/short"] + parts["follows/whole"]
        assert row["reward"] == parts["follows"] + parts["spread"] and row["correct"] == (parts["follows"] > 0)
        texts = {other["text"] for other in own if (other["step"], other["prompt_id"]) == (row["step"], row["prompt_id"])}
        assert parts["spread"] == len(texts)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["reward_mean"] == pytest.approx(sum(row["reward"] for row in ledger) / len(ledger))
    steps = figures["steps"]
    assert all({"reward_mean_math", "reward_follows_mean", "reward_spread_mean", "accuracy"} <= step.keys() for step in steps)
