"""The Python API: what is promised is there, costs nothing to import, and says by what name a script's own part is found."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

import engine
from engine.api import evaluating, preflight
from engine.api.events import Done, Evaluation, Note, Restart, Step, typed
from engine.config.load import override
from engine.core.errors import ConfigError
from engine.observe import telling
from tests.builders import config


def test_importing_the_engine_loads_nothing():
    code = "import sys, engine; print(*sorted(n for n in sys.modules if n.split('.')[0] in ('engine', 'torch', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["engine"]


@pytest.mark.parametrize("name", sorted(engine.__all__))
def test_every_promised_name_is_there_and_documented(name):
    found = getattr(engine, name)
    assert found.__name__ in (name, "score_file") and found.__doc__
    assert name in dir(engine)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        engine.nothing  # noqa: B018


def test_python_m_engine_is_the_command():
    done = subprocess.run([sys.executable, "-m", "engine", "--help"], capture_output=True, text=True, check=True)
    assert "usage: semion" in done.stdout


def test_events_are_typed():
    metrics = {"step": 3, "loss": 0.5}
    assert typed({"kind": "step"} | metrics) == Step(3, metrics)
    figures = {"step": 3, "set": "sums", "mean": 0.5}
    assert typed({"kind": "evaluation"} | figures) == Evaluation(3, "sums", figures)
    assert typed({"kind": "restart", "step": 2, "text": "lost"}) == Restart(2, "lost")
    assert typed({"kind": "note", "text": "a"}) == Note("a")
    assert typed({"kind": "warning", "where": "engine 0", "text": "a", "count": 9}) == engine.Warning("engine 0", "a", 9)
    assert str(engine.Warning("engine 0", "a", 9)) == "warning, engine 0: a (9 times so far)"
    told = telling.Doing("evaluation", "step 3 on sums", total=512, unit="problems").event("begins") | {"done": 120}
    activity = cast("Any", typed(told))
    assert (activity.what, activity.state, activity.done, activity.unix_seconds) == (
        "evaluation",
        "begins",
        120,
        told["unix_seconds"],
    )
    assert str(activity).startswith("evaluating step 3 on sums: 120 of 512 problems, 0.")
    for event in (typed({"kind": "note", "text": "a"}), typed({"kind": "evaluation"} | figures | {"unix_seconds": 5.0})):
        assert cast("Any", event).unix_seconds >= 5.0, "every event has the time of day"
    assert typed({"kind": "done", "engine_versions": {"vllm": "1"}}) == Done({"versions": {"vllm": "1"}}, None)
    assert typed({"kind": "done", "checkpoint": "out"}) == Done({"versions": {}}, "out")


def judge(completion: str) -> float:
    return 1.0


def test_a_part_of_ones_own_is_named_by_its_file():
    reference = engine.register(judge)
    assert reference == f"{__file__}:judge"
    from engine.core.registry import load_object

    assert load_object(reference, "data.reward")("x") == 1.0


def test_a_part_that_no_process_could_find_is_refused():
    def local() -> None:
        """Defined too deep."""

    with pytest.raises(ConfigError, match="top of its file"):
        engine.register(local)
    with pytest.raises(ConfigError, match="a class or a function; found 3"):
        engine.register(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="defined in a file"):
        engine.register(int)


def test_options_are_set_anew_by_full_name_or_by_section():
    base = config(data={"train": "a", "mix": [{"train": "b"}]})
    changed = override(base, {"sync.sync_interval": 2, "data.mix[0].prompts_per_step": 8}, run={"seed": 3})
    assert (changed.sync.sync_interval, changed.data.mix[0].prompts_per_step, changed.run.seed) == (2, 8, 3)
    assert (base.sync.sync_interval, base.data.mix[0].prompts_per_step, base.run.seed) == (1, 64, 0)
    assert changed.run.steps == base.run.steps
    assert override(base) == base
    with pytest.raises(ConfigError) as caught:
        override(base, {"sync.x": 1, "beta": 2, "data.mix[3].train": "c", "run.steps": 0})
    assert len(caught.value.faults) == 4


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            lambda made: preflight.check(made, cast("Any", "trian")),
            "purpose must be one of train, sft, .* found 'trian'",
        ),
        (
            lambda made: evaluating.asked_sets(made, "file.jsonl"),
            "suite must be a list of files of problems; found 'file",
        ),
        (lambda made: engine.load_config("x.toml", "run.steps=3"), "overrides must be a list of texts .* found 'run.steps=3'"),
        (lambda made: engine.override(made, {3: 4}), "override 3 must be the name of an option, a text"),
        (lambda made: engine.override(made, ["run.steps=3"]), r"changes must map names of options to values; found \['run"),
        (
            lambda made: engine.override(made, {"sync": 3}),
            "override sync is a section, which takes a table .* found 3",
        ),
        (lambda made: engine.override(made, run={3: 4}), "override run is a section"),
    ],
)
def test_what_a_script_gets_wrong_is_a_sentence(ask, said):
    with pytest.raises(engine.SemionError, match=said):
        ask(config())


def test_paths_are_taken_as_texts(tmp_path):
    assert engine.override(config(), {"run.directory": Path("a/b"), "model": {"path": Path("m")}}).run.directory == "a/b"
    file = tmp_path / "b.jsonl"
    file.write_text("")
    assert list(evaluating.asked_sets(config(), [file])) == ["b"]
