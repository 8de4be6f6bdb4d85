"""Profiles without a run: tables from traces and reports made by hand, which ranges mark a phase and when, which steps the
window takes, and tools/nsys with a stand-in for nsys."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.load import load_config
from engine.config.options import Profile
from engine.config.schedules.base import Schedule
from engine.config.schedules.paper import Paper
from engine.core.errors import ConfigError, DataError, EngineLostError
from engine.inference.pool import Pool
from engine.megatron.timers import PHASES, Timers
from engine.observe.profiling import nsight
from engine.observe.profiling.phases import NOTHING, Phase, phase
from engine.observe.profiling.recorder import Recorder
from engine.observe.profiling.table import Recording, Span, read_profile, tabulate
from engine.observe.profiling.window import Window
from tests.unit.inference.test_pool import FakeEngine
from tests.unit.observe import fake_nsys
from tools import nsys

MS = 10**6
MAIN, AUTOGRAD, HELPER = 1, 2, 3
# name, thread, start, end in ms
RANGES = [
    ("semion.window", MAIN, 0, 100),
    ("semion.wait", MAIN, 5, 25),
    ("semion.rewards", MAIN, 20, 25),
    ("semion.train", MAIN, 30, 90),
    ("semion.forward", MAIN, 30, 50),
    ("semion.log-probs", MAIN, 45, 49),
    ("semion.backward", MAIN, 50, 80),
    ("semion.backward", MAIN, 80, 84),
    ("somebody.else", MAIN, 31, 32),
    ("semion.wait", HELPER, 150, 160),  # after the window
]
KERNELS = [  # thread and time of the launch, start, end in ms
    (MAIN, 31, 200, 210),  # started long after it was launched
    (MAIN, 46, 210, 211),
    (AUTOGRAD, 60, 211, 215),
    (MAIN, 3, 1, 9),  # in the window only
]
# phase: times, seconds, itself, median, GPU; in ms
TABLE = {
    "window": (1, 100, 20, 100, 23),
    "wait": (1, 20, 15, 20, 0),
    "rewards": (1, 5, 5, 5, 0),
    "train": (1, 60, 6, 60, 15),
    "forward": (1, 20, 16, 20, 11),
    "log-probs": (1, 4, 4, 4, 1),
    "backward": (2, 34, 34, 17, 4),
}


def as_export(file: Path, *, on_gpu: bool, as_text: bool = False) -> Path:
    ranges = [(name, thread, start * MS, end * MS) for name, thread, start, end in RANGES]
    kernels = [(thread, *(x * MS for x in times)) for thread, *times in KERNELS]
    fake_nsys.write_export(file, ranges, kernels if on_gpu else None, as_text=as_text)  # type: ignore[arg-type]
    return file


def as_trace(file: Path, *, on_gpu: bool) -> Path:
    def event(kind: str, name: str, thread: int, start: float, end: float, **more: Any) -> dict[str, Any]:
        times = {"ts": 4e12 + start * 1000, "dur": (end - start) * 1000}
        return {"ph": "X", "cat": kind, "name": name, "pid": 9, "tid": thread, "args": more} | times

    events = [event("user_annotation", *some) for some in RANGES]
    events += [{"ph": "M", "name": "process_name"}, event("cpu_op", "semion.forward", MAIN, 31, 32)]
    if on_gpu:
        events += [event("gpu_user_annotation", *some) for some in RANGES]
        for number, (thread, launched, start, end) in enumerate(KERNELS):
            events.append(event("cuda_runtime", "cudaLaunchKernel", thread, launched, launched + 0.01, correlation=number))
            events.append(event("kernel", "gemm", 7, start, end, correlation=number))
    file.write_text(json.dumps({"deviceProperties": [{"id": 0}] if on_gpu else [], "traceEvents": events}))
    return file


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("kind", ["trace", "export", "export with texts"])
def test_either_kind_of_file_gives_the_same_table(tmp_path, kind, on_gpu):
    file = tmp_path / "rank-0"
    made = as_trace(file, on_gpu=on_gpu) if kind == "trace" else as_export(file, on_gpu=on_gpu, as_text="texts" in kind)
    profile = read_profile(made)
    assert (profile.process, profile.window_seconds) == ("rank-0", 0.1)
    assert [row.phase for row in profile.rows] == list(TABLE)
    for row in profile.rows:
        times, seconds, itself, median, gpu = TABLE[row.phase]
        assert row.count == times
        assert (row.seconds, row.self_seconds, row.median_seconds) == (seconds / 1e3, itself / 1e3, median / 1e3)
        assert row.share == pytest.approx(seconds / 100)
        assert row.gpu_seconds == (gpu / 1e3 if on_gpu else None)


trees = st.recursive(
    st.tuples(st.sampled_from(list(Phase)[1:]), st.integers(1, 50), st.just(())),
    lambda inner: st.tuples(st.sampled_from(list(Phase)[1:]), st.integers(0, 50), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=20,
)


def laid_out(tree: Any, thread: int, start: int) -> tuple[list[Span], int]:
    """The ranges of a tree (phase, own time, children) and where it ends."""
    which, own, children = tree
    spans, at = [], start + own // 2
    for child in children:
        inner, at = laid_out(child, thread, at)
        spans += inner
    end = at + own - own // 2
    return [*spans, Span(which, thread, start, end)], end


@given(trees, st.lists(trees, max_size=2))
def test_times_outside_inner_phases_add_up_to_the_window(tree, others):
    spans, end = laid_out((Phase.WINDOW, 7, (tree,)), MAIN, 1000)
    for place, other in enumerate(others):
        inner, finish = laid_out(other, HELPER + place, 1000)
        end = max(end, finish)
        spans += inner
    spans = [span if span.phase != Phase.WINDOW else Span(span.phase, MAIN, 1000, end) for span in spans]
    profile = tabulate("p", Recording(spans, None), Path("p"))
    main = tabulate("p", Recording([span for span in spans if span.thread == MAIN], None), Path("p"))
    assert sum(row.self_seconds for row in main.rows) == pytest.approx(main.window_seconds)
    assert sum(row.count for row in profile.rows) == len(spans)
    assert all(0 <= row.self_seconds <= row.seconds + 1e-15 for row in profile.rows)
    assert all(row.seconds <= row.count * profile.window_seconds for row in profile.rows)


def complaint(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_profile(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path):
    file = tmp_path / "rank-0.json"
    assert "check the path" in complaint(file)
    whole = as_trace(file, on_gpu=True).read_bytes()
    for text in (whole[: len(whole) // 2], b"", b"\xff\xfe", b"{}", b"[3]", b'{"traceEvents": 3}', b'{"traceEvents": [3]}'):
        file.write_bytes(text)
        assert "must be a Chrome trace" in complaint(file)
    file.write_text('{"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": "semion.knitting"}]}')
    assert "knitting" in complaint(file)
    file.write_text('{"traceEvents": []}')
    assert "found 0" in complaint(file)
    export = as_export(tmp_path / "rank-0.sqlite", on_gpu=True)
    export.write_bytes(export.read_bytes()[:5000])
    assert "must be a Chrome trace" in complaint(export)
    export.unlink()
    sqlite3.connect(export).executescript("CREATE TABLE t (x)").close()
    assert "no such table: NVTX_EVENTS" in complaint(export)
    fake_nsys.write_export(export, [("semion.window", 1, 0, 9), ("semion.window", 1, 10, 12)])
    assert "found 2" in complaint(export)
    late = [("semion.window", 1, 0, 9 * MS), ("semion.wait", 1, 0, MS), ("semion.train", 1, MS // 2, 2 * MS)]
    fake_nsys.write_export(export, late)
    assert "'train' that ends 1000000 ns after the 'wait'" in complaint(export)


def test_a_file_that_is_read_is_not_changed(tmp_path):
    export = as_export(tmp_path / "a b%20.sqlite", on_gpu=True)
    before = export.read_bytes()
    read_profile(export)
    assert export.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [export.name]


# -- marks and recorder


def test_without_a_profiler_and_without_cuda_nothing_is_marked(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert phase(Phase.TRAIN) is NOTHING
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert phase(Phase.TRAIN) is not NOTHING


def test_on_a_build_for_cuda_every_phase_is_an_nvtx_range(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    with pytest.raises(ValueError, match="x"), phase(Phase.TRAIN), phase(Phase.FORWARD):
        raise ValueError("x")
    assert said == ["semion.train", "semion.forward", "pop", "pop"]


def test_a_recorder_leaves_a_trace_of_its_window(tmp_path):
    recorder = Recorder("torch", tmp_path, "engine-0")
    timers = Timers()
    with phase(Phase.WAIT):
        recorder.start()
    recording = [recorder.recording]
    with phase(Phase.TRAIN):
        for name in ("forward-compute", "forward-backward", "backward-compute", "forward-recv"):
            timers(name, log_level=2).start(barrier=True)
            torch.ones(3).add(1)
            timers(name).stop()
    assert list(tmp_path.iterdir()) == []
    recorder.stop()
    assert [*recording, recorder.recording] == [True, False]
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["engine-0.json"]
    rows = {row.phase: row.count for row in read_profile(recorder.file).rows}
    assert rows == {"window": 1, "train": 1, "forward": 1, "backward": 1, "pipeline": 1}


def test_an_engines_window_closes_when_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.observe.profiling.recorder.MAX_DECODES", 2)
    recorder = Recorder("torch", tmp_path, "engine-0")
    recorder.decoded()
    recorder.start()
    recorder.decoded()
    recording = [recorder.recording]
    recorder.decoded()
    assert [*recording, recorder.recording] == [True, False]
    assert recorder.file.exists()


def test_nsys_is_told_when_to_capture_and_refused_without_a_gpu(tmp_path, monkeypatch):
    """Refused before the run's first step, not where the window opens."""
    told: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device; found none: use 'torch'"):
        Window(Profile(tool="nsys"), tmp_path, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recorder = Recorder("nsys", tmp_path, "rank-0", told.append)
    recorder.start()
    assert told == [True]
    recorder.stop()
    assert told == [True, False]
    assert not recorder.file.exists()


def test_the_timers_names_are_megatrons():
    """Each name that is a phase of ours is one that the installed megatron calls."""
    found = find_spec("megatron.core")
    assert found is not None and found.submodule_search_locations is not None
    (root,) = found.submodule_search_locations
    parts = ("pipeline_parallel/schedules.py", "pipeline_parallel/p2p_communication.py", "distributed/finalize_model_grads.py")
    called = "".join(Path(root, part).read_text("utf-8") for part in parts)
    assert [name for name in PHASES if f"timers('{name}'" not in called] == []


# -- the window


class Told:
    """A recorder, and the pool, that write down what they were told."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.recording = False

    def start(self) -> None:
        self.log.append("start")
        self.recording = True

    def stop(self) -> None:
        self.log.append("stop")
        self.recording = False

    def profile(self, engines: tuple[int, ...], on: bool) -> None:
        self.log.append(f"engines {list(engines)} {'on' if on else 'off'}")


def played(options: Profile, schedule: Schedule, monkeypatch: pytest.MonkeyPatch, start: int = 0) -> list[str]:
    """What the window does in a run, beside the steps and their submissions."""
    told = Told()
    monkeypatch.setattr("engine.observe.profiling.window.Recorder", lambda *arguments: told)
    window = Window(options, Path("run"), 0, told, schedule)
    for step in range(start, schedule.num_steps):
        window.step(step)
        if steps := schedule.opens(step):
            told.log.append(f"submit {steps.start}-{steps.stop - 1}")
            window.submitted(steps)
        told.log.append(f"step {step}")
    window.step(schedule.num_steps)
    return told.log


def test_online_the_window_is_the_steps(monkeypatch):
    options = Profile(tool="torch", first_step=1, num_steps=2, engines=(0, 2))
    assert played(options, Paper(1, "never", 4, 16), monkeypatch) == [
        *("submit 0-0", "step 0"),
        *("start", "engines [0, 2] on", "submit 1-1", "step 1"),
        *("submit 2-2", "engines [0, 2] off", "step 2"),
        *("stop", "submit 3-3", "step 3"),
    ]


def test_semi_online_the_engines_window_is_the_intervals_that_hold_the_steps(monkeypatch):
    options = Profile(tool="torch", first_step=1, num_steps=2)
    assert played(options, Paper(2, "never", 5, 16), monkeypatch) == [
        *("engines [0] on", "submit 0-1", "step 0", "start", "step 1"),
        *("submit 2-3", "engines [0] off", "step 2", "stop", "step 3"),
        *("submit 4-4", "step 4"),
    ]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_whatever_the_regime_each_window_opens_and_closes_once(interval, first, length, tail):
    schedule = Paper(interval, "never", first + length + tail, 16)
    options = Profile(tool="torch", first_step=first, num_steps=length)
    with pytest.MonkeyPatch.context() as monkeypatch:
        log = played(options, schedule, monkeypatch)
        resumed = played(options, schedule, monkeypatch, start=(first // interval) * interval)
    assert log[log.index("start") + 1 : log.index("stop")].count("start") == 0
    inside = [entry for entry in log[log.index("start") : log.index("stop")] if entry.startswith("step")]
    assert inside == [f"step {step}" for step in range(first, first + length)]
    on, off = log.index("engines [0] on"), log.index("engines [0] off")
    asked = [entry.split()[1].split("-") for entry in log[on:off] if entry.startswith("submit")]
    assert {step for a, b in asked for step in range(int(a), int(b) + 1)} >= set(range(first, first + length))
    assert sum(entry.startswith("engines") for entry in log) == 2
    assert [entry for entry in resumed if entry in log] == resumed


def test_off_and_other_ranks_record_nothing(monkeypatch):
    schedule = Paper(1, "never", 9, 16)
    plain = [entry for step in range(9) for entry in (f"submit {step}-{step}", f"step {step}")]
    assert played(Profile(), schedule, monkeypatch) == plain
    assert played(Profile(tool="nsys", ranks=(1,), engines=()), schedule, monkeypatch) == plain


def test_the_pool_tells_the_chosen_engines_and_asks_what_became_of_it():
    class Profiled(FakeEngine):
        def profile(self, on: bool) -> None:
            pass

    engines = [Profiled(), Profiled(failing={"profile": ConfigError("no device")})]
    pool = Pool(engines, 5.0)
    pool.profile((0,), True)
    pool.profile((1,), False)
    assert [engine.calls for engine in engines] == [[("profile", (True,))], [("profile", (False,))]]
    with pytest.raises(ConfigError, match="no device"):
        pool.finish_profile()
    pool.finish_profile()
    engines[1].failing["profile"] = EngineLostError("gone while it was idle: the next sync replaces it")
    pool.profile((0, 1), True)
    pool.profile((0, 1), False)
    pool.finish_profile()
    assert engines[0].calls[1:] == [("profile", (True,)), ("profile", (False,))]


# -- nsys

CONFIG = """
[run]
directory = "{directory}"
steps = 9
[model]
path = "seed"
[data]
train = "train.jsonl"
[profile]
ranks = [0, 1]
[trainer]
tensor_parallel = 2
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{fake_nsys.install(tmp_path / 'bin')}:/usr/bin:/bin")
    file = tmp_path / "run.toml"
    file.write_text(CONFIG.format(directory=tmp_path / "the run"))
    return file


def test_chosen_processes_are_started_by_nsys_and_no_others(config_file, tmp_path):
    config = load_config(config_file, ["profile.tool=nsys"])
    started = nsight.runtime_env(config.profile, config.run_directory, "rank", 1)["py_executable"]
    program = 'import sys; print("said", *sys.argv[1:])'
    run = subprocess.run(["bash", "-c", f"exec {started} -c '{program}' x"], capture_output=True, text=True)
    assert run.stdout == "said x\n", run.stderr
    report = nsight.report_file(config.run_directory, "rank", 1)
    assert report == tmp_path / "the run" / "profile" / "rank-1.nsys-rep"
    said = json.loads(report.read_text())
    wanted = ["--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx,osrt", f"--output={report}"]
    assert said[0] == "profile" and set(wanted) <= set(said)
    assert said[-4:] == [sys.executable, "-c", program, "x"]
    assert nsight.runtime_env(config.profile, config.run_directory, "rank", 2) == {}
    assert nsight.runtime_env(config.profile, config.run_directory, "engine", 1) == {}
    torch_too = load_config(config_file, ["profile.tool=torch"])
    assert nsight.runtime_env(torch_too.profile, config.run_directory, "rank", 0) == {}


def test_tools_nsys_trains_exports_and_prints_the_tables(config_file, tmp_path, monkeypatch, capsys):
    trained = []

    def train(config: str, overrides: list[str], *, verbose: bool) -> int:
        """A run as far as nsys sees it: the chosen processes start under it and end."""
        trained.append((config, overrides))
        loaded = load_config(config, overrides)
        for report in nsys.reports(loaded):
            report.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*nsight.command(report), sys.executable, "-c", ""], check=True)
        return 0

    monkeypatch.setattr(nsys, "train", train)
    assert nsys.main([str(config_file), "run.seed=3", "--json", str(tmp_path / "f.json")]) == 0
    assert trained == [(str(config_file), ["run.seed=3", "profile.tool=nsys"])]
    processes = json.loads((tmp_path / "f.json").read_text())["processes"]
    assert [process["process"] for process in processes] == ["rank-0", "rank-1", "engine-0"]
    rows = {row["phase"]: row for row in processes[0]["rows"]}
    assert (rows["forward"]["seconds"], rows["forward"]["share"], rows["forward"]["gpu_seconds"]) == (1.0, 0.5, 0.25)
    assert "rank-1: 2.000 s" in capsys.readouterr().out


def test_tools_nsys_says_what_is_missing(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nsys, "train", lambda *arguments, verbose: 7)
    assert nsys.main([str(config_file)]) == 7
    monkeypatch.setattr(nsys, "train", lambda *arguments, verbose: 0)
    assert nsys.main([str(config_file)]) == DataError.exit_code
    assert "rank-0.nsys-rep; found nothing" in capsys.readouterr().err
    report = nsight.report_file(tmp_path / "the run", "rank", 0)
    report.parent.mkdir(parents=True)
    report.write_text("torn")
    assert nsys.main([str(config_file)]) == DataError.exit_code
    assert "must succeed; found exit code 1" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nsys.main([str(config_file)]) == ConfigError.exit_code
    assert "nsight-systems-cli" in capsys.readouterr().err
