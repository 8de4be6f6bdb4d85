"""Rank 0's controller with fake engines and a reward that looks at a number: a row for each held-out set, what a resumed run
still knows of earlier evaluations, the score of a step, and what the guard makes it say and ask for.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.core.arrays import LogProbs, TokenIds
from engine.core.errors import InferenceError
from engine.core.types import Score
from engine.data.mixture import HeldOut, Mixture
from engine.data.prompts import PromptSet
from engine.observe import telling
from engine.observe.telling import LOGGER
from engine.rewards.base import Answer, Reward
from engine.rewards.registry import Judges
from engine.run import controller as controller_module
from engine.run.controller import Controller
from engine.run.records import Records
from tests import builders
from tests.builders import spec
from tests.rollouts import make_prompt
from tests.unit.inference.test_pool import FakeEngine

SUMS = tuple(make_prompt(f"s{i}", (i,), f"sum {i}", f"{i}", "", "") for i in range(3))
CHATS = tuple(replace(prompt, id=f"c{prompt.id}", reward="model", verifiable=False) for prompt in SUMS)


class Longest(FakeEngine):
    """Answers with as many tokens as weights have steps, and one more."""

    def completion(self, request):
        made = super().completion(request)
        num_tokens = self.version + 1
        token_ids, log_probs = TokenIds.joined([made.token_ids] * num_tokens), LogProbs.joined([made.log_probs] * num_tokens)
        return replace(made, token_ids=token_ids, log_probs=log_probs)


class Sixth(Reward):
    """A sum is always right; a chat is worth 6."""

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        return [Score(6.0 if answer.prompt.reward == "model" else 1.0, "ok") for answer in answers]

    def close(self) -> None:
        """Nothing to close."""


Open = Callable[..., Controller]


class Hearing(logging.Handler):
    """What is told in this process, as a journal would hear it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (told := getattr(record, "told", None)) is not None:
            self.events.append(told)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far, which are then forgotten."""
        found = [event for event in self.events if event["kind"] == kind]
        self.events.clear()
        return found


@pytest.fixture
def hearing():
    logger, handler = logging.getLogger(LOGGER), Hearing()
    level = logger.level
    logger.setLevel(logging.INFO)  # which also forgets what levels it knows to be off
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def open_controller(tmp_path, monkeypatch, tiny_tokenizer):
    """Opens the controller of a run that goes on at `start`, with an engine of that version; those before it are closed, for
    one process writes a run's records at a time."""
    mixture = lambda config, judging_of, tokenizer: Mixture(config.data.sources, (PromptSet(SUMS, 0, 0),), 0)  # noqa: E731
    sums = lambda config, judging_of, tokenizer: (HeldOut(0, config.data, PromptSet(SUMS, 0, 0), "sums"),)  # noqa: E731
    monkeypatch.setattr(controller_module, "model_tokenizer", lambda config, vocab_size: tiny_tokenizer)
    monkeypatch.setattr(controller_module, "load_mixture", mixture)
    monkeypatch.setattr(controller_module, "load_held_out", sums)
    monkeypatch.setattr(controller_module, "open_rewards", lambda config, reward_engine: Sixth())
    opened: list[Controller] = []

    def make(start: int = 0, version: int = 0, kept: Any = None, **guard: Any) -> Controller:
        config = builders.config(
            tmp_path,
            run={"steps": 40},
            data={"train": "train.jsonl", "held_out": "files/sums.jsonl"},
            checkpoint={"best_by": "length_normalized_reward", "every": 4},
            evaluation={"samples": 2, "every": 4},
            guard=guard,
        )
        for earlier in opened:
            earlier.finish()
        controller = Controller(spec(config), [Longest(version)], Judges(), start, kept)
        controller.pool.commit(version)
        opened.append(controller)
        return controller

    yield make
    for controller in opened:
        controller.finish()


def rows(controller: Controller, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (controller._config.run_directory / name).read_text("utf-8").splitlines()]


def record(step: int, entropy: float = 1.0) -> dict[str, float]:
    return {"step": step, "rollout_entropy": entropy, "completion_tokens_mean": 9.0, "reward_mean": 0.5}


def test_every_set_has_its_row_and_the_scores_are_the_means_over_them(open_controller: Open, hearing: Hearing):
    """Chats are worth 6: in the seed's length 6, in four times as many tokens 6 / 4. Sums stay right, at any length."""
    controller = open_controller()
    controller._sets.append(("chats", PromptSet(CHATS, 0, 0)))
    controller.evaluate(0, lambda: None)
    assert [(row["step"], row["set"], row["measure"], row["mean"]) for row in rows(controller, "evaluations.jsonl")] == [
        (0, "sums", "accuracy", 1.0),
        (0, "chats", "reward", 6.0),
    ]
    assert all(len(row["records"]) == 6 for row in rows(controller, "evaluations.jsonl"))
    assert [row["set"] for row in rows(controller, "samples.jsonl")] == ["sums"] * 3 + ["chats"] * 3
    later = open_controller(start=3, version=3)
    later._sets.append(("chats", PromptSet(CHATS, 0, 0)))
    later.evaluate(3, lambda: None)
    assert later.scores() == {0: (1 + 6) / 2, 3: (1 + 6 / 4) / 2}, "a resumed run still knows the seed's length"
    told = hearing.of("evaluation")
    assert [(event["step"], event["set"], event["mean"]) for event in told[2:]] == [(3, "sums", 1.0), (3, "chats", 6.0)]
    assert "records" not in told[0] and told[0]["unix_seconds"] > 1e9
    assert later.finish_step(record(3)) == [{"kind": "step"} | record(3)], "what was told is not told again"
    assert open_controller(start=3).scores().keys() == {0, 3}, "what was judged there stands where it is not due again"
    assert open_controller(start=2).scores().keys() == {0}, "what came after the checkpoint is forgotten"


def test_a_run_tells_which_held_out_problems_it_trains_on(open_controller: Open, hearing: Hearing):
    """All of them, before its first step: both sets are the same here."""
    open_controller()
    notes = [event["text"] for event in hearing.of("note")]
    (warning,) = [note for note in notes if note.startswith("warning: ")]
    assert warning.startswith(f"warning: data.held_out: {len(SUMS)} of {len(SUMS)} problems are also trained on, such as ")


def test_an_evaluation_tells_how_far_it_has_come(open_controller: Open, hearing: Hearing, monkeypatch):
    """In parts of whole problems, which are waited for one after another; and the start what it does."""
    monkeypatch.setattr(telling, "AGAIN_SECONDS", 0.0)
    controller = open_controller()
    assert [event["what"] for event in hearing.of("activity") if event["state"] == "done"] == [
        "tokenizer",
        "prompts",
        "engines",
        "prompts",
    ]
    many = tuple(make_prompt(f"m{i}", (i,), f"sum {i}", f"{i}", "", "") for i in range(20))
    controller._sets = [("many", PromptSet(many, 0, 0))]
    beats: list[int] = []
    controller.evaluate(0, lambda: beats.append(1))
    told = hearing.of("activity")
    assert {(event["what"], event["about"], event["total"]) for event in told} == {("evaluation", "step 0 on many", 20)}
    assert [(event["state"], event["done"]) for event in told] == [
        ("begins", 0),
        *(("goes on", n) for n in (8, 16, 20)),
        ("done", 20),
    ]
    assert len(beats) == 3 + 1, "after every wait, the one for the greedy answers included"


def test_what_a_checkpoint_kept_is_what_the_resumed_run_goes_on_from(open_controller: Open, hearing: Hearing):
    """And where the records are not what it says, the first events tell."""
    first = open_controller()
    first.evaluate(0, lambda: None)
    events = [event for step in range(4) for event in first.finish_step(record(step))]
    assert [event["kind"] for event in events].count("step") == 4
    kept = json.loads(json.dumps(first.kept(set())))
    first.finish_step(record(4))
    resumed = open_controller(start=4, version=4, kept=kept)
    assert [row["step"] for row in rows(resumed, "metrics.jsonl")] == [0, 1, 2, 3]
    assert resumed.scores() == {0: 1.0}
    assert not [event for event in hearing.of("note") if "changed" in event["text"]]
    resumed.finish_step(record(4))
    (resumed._config.run_directory / "samples.jsonl").write_text("")
    open_controller(start=4, version=4, kept=kept)
    assert "samples.jsonl was changed" in hearing.of("note")[0]["text"]


@pytest.mark.parametrize("action", ["off", "warn", "stop"])
def test_a_collapse_is_shown_written_down_and_asked_to_stop_for(open_controller: Open, action: str):
    controller = open_controller(action=action)
    events = [event for step in range(14) for event in controller.finish_step(record(step, 1.0 if step < 6 else 0.01))]
    notes = [event["text"] for event in events if event["kind"] == "note" and "guard" in event["text"]]
    if action == "off":
        assert (notes, rows(controller, "guard.jsonl"), controller.collapse) == ([], [], None)
        return
    assert len(notes) == 1
    assert notes[0].startswith("guard, step 10: entropy collapsed")
    assert [(row["step"], row["what"]) for row in rows(controller, "guard.jsonl")] == [(10, "entropy")]
    assert (controller.collapse or "").startswith("step 10: entropy collapsed" if action == "stop" else "")
    assert (controller.collapse is not None) is (action == "stop")
    resumed = open_controller(start=13, action=action)
    resumed.finish_step(record(13, 0.01))
    assert resumed.collapse is None, "a run resumed after a collapse goes on past it"
    again = open_controller(start=8, action=action)
    assert rows(again, "guard.jsonl") == []
    for step in range(8, 12):
        again.finish_step(record(step, 0.01))
    assert [row["step"] for row in rows(again, "guard.jsonl")] == [10], "and before it finds it again"


def test_what_was_opened_is_closed_whatever_fails(open_controller: Open, monkeypatch):
    """In the opposite order, also by a controller that could not be made."""
    closed: list[str] = []

    class Noting(Sixth):
        def close(self) -> None:
            closed.append("reward")

    def broken(self: Any) -> None:
        closed.append("profile")
        raise InferenceError("engine 0 is late")

    monkeypatch.setattr(controller_module, "open_rewards", lambda config, reward_engine: Noting())
    monkeypatch.setattr(controller_module.Records, "close", lambda records: closed.append("records"))
    monkeypatch.setattr(controller_module.Pool, "finish_profile", broken)
    monkeypatch.setattr(controller_module.RolloutSource, "close", lambda source: closed.append("source"))
    controller = open_controller()
    with pytest.raises(InferenceError):
        controller.finish()
    assert closed == ["source", "profile", "reward", "records"]
    closed.clear()
    monkeypatch.setattr(controller_module, "_versions", broken)
    with pytest.raises(InferenceError):
        open_controller()
    assert closed == ["profile", "reward", "records"]


def test_what_engines_run_with_is_on_record_before_anything_is_sampled(tmp_path: Path) -> None:
    """A resumed run says what is another; a new one in the same folder has nothing before it; a broken file is told."""
    config = builders.config(tmp_path)
    records = Records.open(config, 0, None)
    assert records.engines_run_with({"vllm": "1", "attention": "FLASH_ATTN"}, resumed=False) == ""
    path = config.run_directory / "versions.json"
    assert json.loads(path.read_text()) == {"vllm": "1", "attention": "FLASH_ATTN"}
    assert records.engines_run_with({"vllm": "1", "attention": "FLASH_ATTN"}, resumed=True) == ""
    told = records.engines_run_with({"vllm": "2", "attention": "FLASH_ATTN"}, resumed=True)
    assert "(vllm 1 before, 2 now)" in told
    assert json.loads(path.read_text())["vllm"] == "2"
    assert records.engines_run_with({"vllm": "3"}, resumed=False) == ""
    path.unlink()
    assert "is not on record" in records.engines_run_with({"vllm": "3"}, resumed=True)
    path.write_text("[]")
    assert "(vllm something that cannot be read before, 3 now)" in records.engines_run_with({"vllm": "3"}, resumed=True)
    path.write_text("{")
    assert "(vllm something that cannot be read before, 3 now)" in records.engines_run_with({"vllm": "3"}, resumed=True)
    records.close()


def test_versions_reach_the_command_as_plain_texts(monkeypatch: pytest.MonkeyPatch):
    """torch.__version__ is of a class of torch's: whoever reads it from another process would load torch for it."""

    class Version(str):
        pass

    pool = controller_module.Pool([], 1.0)
    monkeypatch.setattr(pool, "describe", lambda: [{"host": "h", "pid": "1", "torch": Version("2.13")}])
    found = controller_module._versions(pool)
    assert found.keys() == {"torch", "verifier"} and {type(value) for value in found.values()} == {str}
