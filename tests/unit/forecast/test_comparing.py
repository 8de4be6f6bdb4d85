"""A forecast beside a run that was: parts by hand, constants that a run's records give back, the report's table and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.api.planning import predicted_beside, recalibrated
from engine.api.training import keep_calibration
from engine.capacity.transfer import Machine, plan_run
from engine.config.load import RunConfig, dump_config, load_config, override
from engine.core.errors import ConfigError
from engine.forecast.calibration import Calibration, Measured, calibrated, write_calibration
from engine.forecast.comparing import counted, measured, predicted
from engine.forecast.constants import Constants
from engine.forecast.lengths import LogNormal, Recorded, Workload
from engine.forecast.seconds import Forecast, Forecaster, Inputs
from engine.run.spec import resolve

ROOT = Path(__file__).parents[3]
BASE = load_config(ROOT / "configs/scale/llama-3.1-8b-4x4.toml", [f"model.path={ROOT}/configs/models/llama-3.1-8b"])
TRUE = {  # of the machine on which the made-up run was
    "train_peak_share": 0.2,
    "layer_row_seconds": 2e-4,
    "iteration_seconds": 0.006,
    "sync_seconds": 0.4,
    "verified_per_second": 60.0,
    "trained_megatoken_seconds": 2.0,
}
LENGTHS = [200, 300, 400, 500]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, Forecast]:
    """A run's directory with the records of an online run that took what a forecast says; its configuration; that forecast."""
    folder = tmp_path_factory.mktemp("made") / "run"
    folder.mkdir()
    changes = {
        "run.steps": 12,
        "sync.sync_interval": 1,
        "sync.reference": "never",
        "data.prompts_per_step": 8,
        "checkpoint.every": 5,
    }
    config = override(BASE, {**changes, "run.directory": str(folder)})
    spec = resolve(config, digests=False)
    workload = Workload(Recorded(tuple(LENGTHS), 2048, "here"), LogNormal(100, 0.0, 1024))
    transfer = plan_run(spec, Machine())["seconds"]
    found = Forecaster(Inputs(spec, Constants(**TRUE), workload, transfer, 139 << 30)).forecast()
    rows, events, clock = [], [], 1e9
    for step in range(12):
        judged, waited = found.parts["rewards"], found.parts["rollouts"] + found.parts["rewards"]
        clock += found.step_seconds + 0.01 + (0.5 if step in (5, 10) else 0.0)
        rows.append(
            {
                "step": step,
                "unix_seconds": clock,
                "step_seconds": found.step_seconds,
                "wait_seconds": waited,
                "reward_seconds": judged,
                "sync_seconds": found.parts["weight sync"],
                "train_seconds": found.parts["training"],
                "score_seconds": found.train_parts["reference"],
                "generation_seconds": found.sampling_seconds,
                "prompt_tokens_mean": 100.0,
                "skipped_share": 0.0,
            }
        )
        if step in (5, 10):
            about = f"of {step} steps"
            events.append({"kind": "activity", "what": "checkpoint", "about": about, "seconds": 3.0})
    rollouts = [{"step": step, "version": step, "num_tokens": n} for step in range(12) for n in LENGTHS]
    for name, written in (("metrics", rows), ("events", events), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), "utf-8")
    (folder / "startup.jsonl").write_text(json.dumps({"step": 0, "seconds": 42.0}) + "\n", "utf-8")
    (folder / "config.toml").write_text(dump_config(config), "utf-8")
    return folder, config, found


def calibration(folder: Path, **values: float) -> Path:
    path = folder / "constants.json"
    write_calibration(
        path, Calibration(machine="a machine", constants={n: Measured(value=v, how="x") for n, v in values.items()})
    )
    return path


def test_parts_by_hand():
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "unix_seconds": 100.0 + 12 * step + (3 if step >= 2 else 0),
            "step_seconds": 10.0,
            "wait_seconds": 4.0,
            "reward_seconds": 1.0,
            "train_seconds": 3.0,
            "generation_seconds": 5.0,
        }
        | ({"sync_seconds": 2.0} if step == 1 else {})
        for step in range(4)
    ]
    events: list[dict[str, Any]] = [
        {"kind": "activity", "what": "checkpoint", "about": "of 2 steps", "seconds": 9.0},
        {"kind": "note"},
    ]
    found = measured(rows, rows, events, [{"step": 0, "seconds": 60.0}, {"step": 2, "seconds": 1.0}])
    assert found == {
        "step": 10.0,
        "rollouts": 3.0,
        "rewards": 1.0,
        "host": 2.5,
        "training": 3.0,
        "weight sync": 0.5,
        "sampling": 5.0,
        "records": 2.0,
        "checkpoint": 3.0,
        "checkpoint written": 9.0,
        "start": 60.0,
    }, "the second start, after a restart, and score_seconds, which is not there, are left out"


def test_steps_that_count_are_whole_intervals():
    rows = [{"step": step} for step in range(12)]

    def first(**changes: Any) -> int:
        options = {name.replace("__", "."): value for name, value in changes.items()}
        return counted(rows, override(BASE, {"run.steps": 12, "checkpoint.every": "end", **options}))[0]["step"]

    assert first(sync__sync_interval=1) == 1 and first(sync__sync_interval=4) == 4
    assert first(sync__sync_interval=4, sync__lookahead=1) == 8 and first(sync__sync_interval=10) == 10
    assert first(sync__sync_interval="never", sync__reference="never") == 0, "a single chunk: its first step waits for all"


def test_with_the_machines_constants_a_run_takes_what_is_predicted(made, tmp_path):
    folder, config, forecast = made
    found = predicted_beside(folder, config, calibration(tmp_path, **TRUE))
    ratios = {part.name: part.ratio for part in found.parts}
    for name in ("step", "rollouts", "training", "reference", "sampling", "host", "rewards"):
        assert ratios[name] == pytest.approx(1.0, rel=0.02), name
    assert {part.name: part.measured for part in found.parts}["checkpoint"] == pytest.approx(0.5)
    assert found.num_steps == 11 and found.first_step == 1 and found.machine == "a machine"
    assert {part.name: part.predicted for part in found.parts}["records"] is None
    assert forecast.step_seconds == pytest.approx(sum(forecast.parts.values()))


def test_a_runs_own_records_give_its_constants_back(made):
    """From constants that are far off, the forecast comes to say what the run took, part by part."""
    folder, config, forecast = made
    found = recalibrated(folder, config, calibrated(), Machine())
    spec = resolve(config, digests=False)
    workload = Workload(Recorded(tuple(LENGTHS), 2048, "here"), LogNormal(100, 0.0, 1024))
    transfer = plan_run(spec, Machine())["seconds"]
    again = predicted(Forecaster(Inputs(spec, found.constants, workload, transfer, 139 << 30)).forecast())
    for name in ("step", "training", "sampling", "rewards", "host", "weight sync"):
        assert again[name] == pytest.approx(predicted(forecast)[name], rel=0.02), name
    assert again["start"] == pytest.approx(42.0, rel=1e-3), "of startup.jsonl, in which the weights were read too"
    assert found.constants.verified_per_second == pytest.approx(60.0, rel=0.05)
    assert "11 steps of" in found.measured["train_peak_share"] and "nvlink_gigabytes_per_second" not in found.measured


def test_shares_above_one_are_a_faster_machine(made):
    """From a machine of a hundredth of the speed no share goes above 1: the peak itself is more."""
    folder, config, _ = made
    slow = calibrated(None, {"peak_teraflops": 1.0, "memory_gigabytes_per_second": 1.0})
    found = recalibrated(folder, config, slow, Machine()).constants
    assert max(found.train_peak_share, found.decode_peak_share, found.decode_memory_share) == pytest.approx(1.0)
    assert found.peak_teraflops > 50


@pytest.fixture
def report(made, monkeypatch, tmp_path):
    """Runs `semion report`; its page and JSON."""
    folder, _, _ = made
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> tuple[str, dict[str, Any]]:
        assert cli.main(["report", str(folder), "--output", "page.html", "--json", "figures.json", *more]) in (0, 1)
        return (tmp_path / "page.html").read_text("utf-8"), json.loads((tmp_path / "figures.json").read_text("utf-8"))

    return run


def test_the_report_says_where_no_calibration_is_recorded(report):
    page, figures = report()
    told = figures["runs"][0]["predicted"]
    assert "Time, predicted and measured" in page and "No calibration of the run&#x27;s machine is recorded" in page
    assert told["machine"] is None and {part["predicted_seconds"] for part in told["parts"]} == {None}
    assert all(part["measured_seconds"] is not None for part in told["parts"])


def test_the_report_finds_the_calibration_in_the_run_or_by_a_flag(report, made, tmp_path):
    folder, _, _ = made
    path = calibration(tmp_path, **TRUE)
    page, figures = report("--calibration", str(path))
    assert "By the calibration of a machine" in page and "<td>training</td>" in page
    named = figures["runs"][0]["predicted"]
    assert next(p for p in named["parts"] if p["name"] == "training")["ratio"] == pytest.approx(1.0, rel=0.02)
    path.rename(folder / "calibration.json")
    try:
        assert report()[1]["runs"][0]["predicted"] == named
    finally:
        (folder / "calibration.json").unlink()


def test_a_run_keeps_the_calibration_of_the_folder_that_it_is_started_in(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(tmp_path)
    keep_calibration(run)
    assert list(run.iterdir()) == []
    calibration(tmp_path, **TRUE).rename(tmp_path / "calibration.json")
    keep_calibration(run)
    assert (run / "calibration.json").read_bytes() == (tmp_path / "calibration.json").read_bytes()


def test_what_cannot_be_forecast_says_why(made, tmp_path):
    folder, config, _ = made
    (tmp_path / "metrics.jsonl").write_text("", "utf-8")
    found = predicted_beside(tmp_path, config, None)
    assert found.parts == () and "found no step" in found.note
    with pytest.raises(ConfigError, match=r"--calibration .*nowhere.json cannot be read"):
        predicted_beside(folder, config, tmp_path / "nowhere.json")


def test_plan_from_run(made, monkeypatch, tmp_path, capsys):
    folder, _, forecast = made
    monkeypatch.chdir(ROOT)
    arguments = [
        "--from-run",
        str(folder),
        "--lengths",
        str(folder),
        "--prompt-tokens",
        "100",
        "--json",
        str(tmp_path / "p.json"),
    ]
    assert cli.main(["plan", str(folder / "config.toml"), *arguments]) == 0
    figures = json.loads((tmp_path / "p.json").read_text("utf-8"))
    assert figures["forecast"]["step_seconds"] == pytest.approx(forecast.step_seconds, rel=0.05)
    kinds = {row["name"]: row["kind"] for row in figures["constants"]}
    assert kinds["train_peak_share"] == "measured" and kinds["hop_seconds"] == "measured"
    capsys.readouterr()
    assert cli.main(["plan", str(folder / "config.toml"), "--from-run", str(tmp_path)]) == 2
    assert "--from-run must be a run's directory" in capsys.readouterr().err
