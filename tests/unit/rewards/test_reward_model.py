"""The reward model without a model: what its folder must hold, what it is given to read, what it is asked and when, and what
a lost or late engine becomes. tests/e2e/test_reward_model.py runs the real one.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerFast

from engine.config.options import RewardModel
from engine.core.errors import CheckpointError, ConfigError, EngineLostError, EngineStartError, InferenceError, WatchdogError
from engine.core.types import Prompt, Score
from engine.data.conversations import Conversations
from engine.inference.reward_engine import RewardEngine
from engine.models.reward_head import read_reward_head
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer, Reward
from engine.rewards.model import ModelReward
from engine.rewards.registry import Judges, RoutedReward, open_rewards
from tests.rollouts import make_prompt
from tests.unit.inference.test_pool import Answer as Future
from tests.unit.rewards.test_rewards import wait_until
from tests.unit.rollouts.test_rollouts import run_config
from tools.make_reward_model import CLS, make_reward_model

FORMS = ("classification", "athene")


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, policy_folder: Path):
    """Makes a reward model of a form in the test's folder; `template` goes before its chat template."""

    def made(form: Any, seed: int = 0, template: str = "", name: str = "reward_model") -> Path:
        folder = tmp_path / name
        make_reward_model(folder, policy_folder, form, seed)
        if template:
            file = folder / "chat_template.jinja"
            file.write_text(template + file.read_text())
        return folder

    return made


def changed(folder: Path, file: str, **changes: Any) -> Path:
    """The folder, with keys of a JSON file set, or removed where they are None."""
    tree = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return folder


def conversations(folder: Path, max_tokens: int = 512) -> Conversations:
    return Conversations(RewardModel(path=str(folder), max_tokens=max_tokens))


def read(folder: Path, message: str, answer: str) -> tuple[int, ...]:
    """What the reward model of a folder reads of a conversation that is not too long."""
    ids = conversations(folder).encode(message, answer)
    assert ids is not None
    return ids


# -- the folder


@pytest.mark.parametrize("form", FORMS)
def test_a_made_reward_model_is_of_its_form_and_equal_seeds_make_equal_files(make, form):
    folder, again, other = make(form), make(form, name="again"), make(form, seed=1, name="other")
    head = read_reward_head(folder)
    assert (head.form, head.shape.hidden) == (form, 64)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_both_forms_have_the_same_weights_and_transformers_loads_the_one_it_knows(make):
    classification, athene = make("classification"), make("athene", name="athene")
    ours = load_file(athene / "model.safetensors")
    model = LlamaForSequenceClassification.from_pretrained(classification)
    assert torch.equal(model.score.weight, ours.pop("v_head.weight"))
    assert {"score.weight", *ours} == model.state_dict().keys()


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({}, "found neither in"),
        ({"score.weight": (1, 64), "v_head.weight": (1, 64)}, "found score.weight and v_head.weight in"),
        ({"score.weight": (2, 64)}, "(num_labels = 1): score.weight must be [1, 64]; found [2, 64] in"),
        ({"v_head.weight": (1, 32)}, "(num_labels = 1): v_head.weight must be [1, 64]; found [1, 32] in"),
    ],
)
def test_a_folder_has_one_head_that_gives_one_number(make, tensors, found):
    folder = make("classification")
    save_file({name: torch.zeros(shape) for name, shape in ({"x": (1,)} | tensors).items()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"^reward_model.path .*{re.escape(found)}"):
        read_reward_head(folder)


def test_what_is_wrong_with_the_folder_is_said_of_reward_model_path(make, tmp_path):
    with pytest.raises(ConfigError, match=r"^reward_model\.path must be a plain Llama: .* found 'mistral'"):
        read_reward_head(changed(make("classification"), "config.json", model_type="mistral"))
    with pytest.raises(CheckpointError, match=r"reward_model\.path must be the folder of .* model; found no folder"):
        read_reward_head(tmp_path / "absent")
    folder = make("classification", name="torn")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"found neither: check reward_model\.path"):
        read_reward_head(folder)


# -- what it reads


def test_classification_reads_the_chat_templates_own_tokens(make, tiny_tokenizer):
    ids = conversations(make("classification")).encode(" Why? ", "So.")
    assert tiny_tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"
    )


@given(message=st.text(max_size=20), answer=st.text(max_size=20), place=st.integers(0, 3))
def test_athenes_form_reads_what_its_model_card_reads_and_ends_with_the_appended_cls(made_athene, message, answer, place):
    """A CLS token that the texts spell is text, and the card's own tokens stay those of the texts without it."""
    found, folder = made_athene
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    expected = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False) + tokenizer.cls_token)["input_ids"]
    assert list(found.encode(message, answer)) == expected
    ids = found.encode(message + CLS * (place & 1), answer + CLS * (place >> 1))
    assert ids[-1] == tokenizer.cls_token_id == 260
    assert ids.count(260) == 1
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert [n for n in ids if n in special] == [n for n in expected if n in special]


@pytest.fixture(scope="session")
def made_athene(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path) -> tuple[Conversations, Path]:
    folder = tmp_path_factory.mktemp("athene")
    make_reward_model(folder, policy_folder, "athene", 0)
    return conversations(folder, 1024), folder


def test_special_tokens_that_a_tokenizer_adds_do_not_hide_the_cls(make):
    """Llama 3's tokenizer begins any text a second time, another might end it: the CLS stays last."""
    folder = make("athene")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|eot_id|>", special_tokens=[("<|begin_of_text|>", 256), ("<|eot_id|>", 259)]
    )
    tokenizer.save_pretrained(folder)
    ids = read(folder, "a", "b")
    assert (ids[:3], ids[-2:]) == ((256, 256, 257), (259, 260))


def test_a_missing_cls_token_is_an_error_and_never_a_score(make):
    folder = changed(make("athene"), "tokenizer_config.json", cls_token=None)
    with pytest.raises(ConfigError, match=r"^reward_model\.path .*no cls_token .*no cls_token_id .*reserved_special_token_1"):
        conversations(folder)
    changed(folder, "config.json", cls_token_id=260)
    assert read(folder, "a", "b")[-1] == 260, "config.json may name it"
    changed(folder, "config.json", cls_token_id=3)  # a byte, whose text is not that token everywhere
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "$"}, "content": "!"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"found no id 3 among those of a conversation"):
        conversations(folder)


def test_a_conversation_of_too_many_tokens_is_not_read_and_none_is_cut(make):
    for form in FORMS:
        folder = make(form, name=form)
        whole = read(folder, "abc", "defg")
        exact, short = conversations(folder, len(whole)), conversations(folder, len(whole) - 1)
        assert exact.encode("abc", "defg") == whole
        assert exact.encode("abc", "defgh") is short.encode("abc", "defg") is None


def test_special_tokens_that_the_texts_spell_stay_text(make):
    """An answer cannot end its own turn, nor put the place where the reward is read behind something else."""
    for form in FORMS:
        folder = make(form, name=form)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        plain, spelled = (read(folder, "abc", text) for text in ("", f"so {''.join(tokenizer.convert_ids_to_tokens(special))}"))
        assert [number for number in spelled if number in special] == [number for number in plain if number in special]
        assert len(spelled) > len(plain) + 3


def test_a_template_reads_the_same_every_day(make):
    folder = make("classification", template="{{ date_string }}")
    assert AutoTokenizer.from_pretrained(folder).decode(conversations(folder).encode("a", "b")).startswith("26 Jul 2024<|")


def test_model_tokenizer_template_and_length_must_fit(make):
    with pytest.raises(ConfigError, match=r"^reward_model\.max_tokens must not exceed .* 1024 positions; found 1025"):
        conversations(make("classification"), 1025)
    with pytest.raises(ConfigError, match=r"^reward_model\.path .*found 261 tokens for a vocabulary of 200"):
        conversations(changed(make("athene"), "config.json", vocab_size=200))
    with pytest.raises(ConfigError, match=r"^reward_model\.path .*fails with 'no answers here'"):
        conversations(make("classification", template="{{ raise_exception('no answers here') }}"))
    (folder := make("classification", name="plain")).joinpath("chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"^reward_model\.path .*chat template; found none"):
        conversations(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"^reward_model\.path must hold a tokenizer"):
        conversations(folder)


# -- the engine


class Output:
    """What vLLM says of one prompt: a number that the last token makes, NaN for token 9."""

    def __init__(self, ids: list[int]) -> None:
        self.outputs = self
        self.probs = [math.nan if ids[-1] == 9 else ids[-1] / 2]


class Model:
    """Stands for vLLM and for the tokenizer: a text is its digits, and four of them are too many."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def encode(self, message: str, answer: str) -> tuple[int, ...] | None:
        ids = tuple(map(int, message + answer))
        return ids if len(ids) < 4 else None

    def classify(self, prompts: list[dict[str, list[int]]], use_tqdm: bool) -> list[Output]:
        self.asked.append([prompt["prompt_token_ids"] for prompt in prompts])
        return [Output(ids) for ids in self.asked[-1]]


def test_the_engine_reads_distinct_conversations_in_an_order_of_their_own():
    model, engine = Model(), object.__new__(RewardEngine)
    engine._conversations = engine._llm = model  # type: ignore[assignment]
    asked = [("2", "3"), ("1", "5"), ("2", "3"), ("12", "34"), ("1", "9"), ("", "4")]
    expected = [Score(1.5, "ok"), Score(2.5, "ok"), Score(1.5, "ok"), Score(0.0, "too_long"), Score(0.0, "invalid")]
    assert engine.score(asked) == [*expected, Score(2.0, "ok")]
    assert engine.score(asked[::-1]) == [Score(2.0, "ok"), *expected[::-1]]
    assert model.asked == [[[1, 5], [1, 9], [2, 3], [4]]] * 2
    assert engine.score([("12", "34")]) == [Score(0.0, "too_long")]
    assert len(model.asked) == 2, "nothing is asked where nothing can be read"


# -- the reward


class Call(Future):
    """A call that has ended, or with TimeoutError never does."""

    def on_done(self, told: Callable[[], object]) -> None:
        if not isinstance(self.error, TimeoutError):
            told()


class FakeScorer:
    """Answers at once, the score of an answer being its length; `errors` come first, one a call of score."""

    def __init__(self, *errors: Exception, start: Exception | None = None, name: str = "the reward engine") -> None:
        self.errors, self.start, self.name = list(errors), start, name
        self.restarts = 0
        self.asked: list[Sequence[tuple[str, str]]] = []

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "describe":
            return Call({"form": "fake"}, self.start)
        self.asked.append(arguments[0])
        error = self.errors.pop(0) if self.errors else None
        return Call([Score(float(len(answer)), "ok") for _, answer in arguments[0]], error)

    def restart(self) -> None:
        self.restarts += 1


class Killable(FakeScorer):
    """Answers when it is told to; until it is killed, and anew when it is restarted, unless that fails with `then`."""

    def __init__(self, name: str, then: Exception | None = None) -> None:
        super().__init__(name=name)
        self.then = then
        self.open: list[tuple[Waiting, Any]] = []

    def call(self, method: str, *arguments: Any) -> Any:
        call = Waiting()
        if method == "describe" and not self.restarts:
            call.set_result({})
            return call
        if method == "score":
            self.asked.append(arguments[0])
        self.open.append((call, [Score(float(len(text)), "ok") for _, text in arguments[0]] if arguments else {}))
        return call

    def go_on(self) -> None:
        for call, value in self.open:
            call.set_result(value)
        self.open.clear()

    def kill(self, error: Exception | None = None) -> None:
        """All calls at once, as Ray has it."""
        owed, self.open = self.open, []
        for call, _ in owed:
            call.set_exception(error or EngineLostError(f"the process of {self.name} ended: killed; its log is a.log"))


class Waiting(concurrent.futures.Future[Any]):
    def on_done(self, told: Callable[[], object]) -> None:
        self.add_done_callback(lambda _: told())


def prompt(problem: str, reward: str = "model") -> Prompt:
    return make_prompt(problem, (1,), problem, "", "", "", reward)


def test_equal_conversations_are_asked_once_and_all_get_the_score():
    engine = FakeScorer()
    reward = ModelReward([engine], 5.0)
    items = [Answer(prompt("a"), "x"), Answer(prompt("b"), "x"), Answer(prompt("a"), "yy"), Answer(prompt("a"), "x")]
    assert [score.value for score in reward.score(items)] == [1.0, 1.0, 2.0, 1.0]
    assert engine.asked == [(("a", "x"), ("a", "yy")), (("b", "x"),)], "a group in each call"
    assert reward.score([]) == []
    assert len(engine.asked) == 2
    reward.close()


LOST = EngineLostError("the process of the reward engine ended: killed")


def test_a_lost_engine_is_started_anew_once_and_asked_again(caplog):
    engine = FakeScorer(LOST)
    assert ModelReward([engine], 5.0).score([Answer(prompt("a"), "xyz")]) == [Score(3.0, "ok")]
    assert (engine.restarts, engine.asked) == (1, [(("a", "xyz"),)] * 2)
    assert caplog.messages == [
        "the process of the reward engine ended: killed; it was asked for 1 answers to 1 prompts: starting it anew; asked for "
        "these now: the reward engine"
    ]


@contextmanager
def judging(reward: ModelReward) -> Iterator[tuple[Arrivals[Answer], concurrent.futures.Future[list[Score]]]]:
    """A judging under way; the answers end with the block."""
    arriving = Arrivals[Answer]()
    with ThreadPoolExecutor(1) as thread, arriving:
        yield arriving, thread.submit(reward.score_as_they_arrive, arriving)


def test_a_loss_is_noticed_while_answers_still_arrive_and_others_take_what_it_had(caplog):
    """Also what comes later, until it is up again; then it has its own groups again."""
    first, second = Killable("reward engine 0 on node 1"), Killable("reward engine 1 on node 2")
    reward, items = ModelReward([first, second], 60.0), in_groups(8, size=2)
    with judging(reward) as (arriving, scores):
        arriving.put(dict(enumerate(items[:8])))
        assert wait_until(lambda: len(first.open) == len(second.open) == 2)
        second.kill()
        assert wait_until(lambda: len(first.open) == 4), "at once, with half of the answers to come"
        assert second.restarts == 1 and not scores.done()
        arriving.put({place: items[place] for place in (8, 9, 10, 11)})
        assert wait_until(lambda: len(first.open) == 6)
        second.go_on()
        assert wait_until(lambda: reward._engines[1].starting is None)
        arriving.put({place: items[place] for place in (12, 13, 14, 15)})
        assert wait_until(lambda: len(second.open) == 1 and len(first.open) == 7)
        first.go_on()
        second.go_on()
    assert [score.value for score in scores.result(20)] == [float(i + 1) for i in range(16)]
    assert caplog.messages == [
        "the process of reward engine 1 on node 2 ended: killed; its log is a.log; it was asked for 4 answers to 2 prompts: "
        "starting it anew; asked for these now: reward engine 0 on node 1"
    ]


def test_an_engine_that_cannot_start_again_is_asked_nothing_more_and_the_last_one_ends_the_run_at_once(caplog):
    failing = EngineStartError("the process of reward engine 1 ended: no memory")
    first, second = Killable("reward engine 0"), Killable("reward engine 1")
    reward, items = ModelReward([first, second], 60.0), in_groups(4)
    with judging(reward) as (arriving, scores):
        arriving.put(dict(enumerate(items[:2])))
        assert wait_until(lambda: len(second.open) == 1)
        second.kill()
        assert wait_until(lambda: second.restarts == 1 and len(first.open) == 2)
        second.kill(failing)
        assert wait_until(lambda: reward._engines[1].is_out)
        assert "no memory: it is asked nothing more until the run is started again" in caplog.text
        arriving.put({2: items[2], 3: items[3]})
        assert wait_until(lambda: len(first.open) == 4)
        first.open, later = first.open[:2], first.open[2:]  # it judges two, and is lost over another
        first.go_on()
        first.open = later
        first.kill()
        assert wait_until(lambda: first.restarts == 1 and len(first.open) == 3), "it starts anew, and is asked again"
        began = time.monotonic()
        first.kill(EngineStartError("the process of reward engine 0 ended: no memory"))
        with pytest.raises(EngineStartError, match="reward engine 0 ended: no memory"):
            scores.result(10)
        assert time.monotonic() - began < 10


def test_a_group_under_which_two_engines_are_lost_ends_the_run():
    first, second = Killable("reward engine 0"), Killable("reward engine 1")
    reward, items = ModelReward([first, second], 60.0), in_groups(3, size=3)
    with judging(reward) as (arriving, scores):
        arriving.put(dict(enumerate(items[:6])))
        assert wait_until(lambda: len(first.open) == len(second.open) == 1)
        first.go_on()
        second.go_on()
        assert wait_until(lambda: all(engine.is_seen for engine in reward._engines))
        arriving.put(dict(list(enumerate(items))[6:]))
        assert wait_until(lambda: len(first.open) == 1)
        first.kill()
        assert wait_until(lambda: len(second.open) == 1)
        second.kill()
        with pytest.raises(
            EngineLostError,
            match=r"engine 1 ended: .* asked for 3 answers to 1 prompts, and is the second that was lost over one",
        ):
            scores.result(10)


def test_engines_that_died_before_a_judging_are_no_fault_of_its_first_group():
    """Whose loss is noticed when they are asked next, one after another for the same group."""
    engines = [FakeScorer(name=f"reward engine {number}") for number in range(4)]
    reward, items = ModelReward(engines, 5.0), in_groups(4)
    reward.score(items)
    for engine in engines[:3]:
        engine.errors.append(LOST)
    assert reward.score(items[:1]) == [Score(1.0, "ok")]
    assert sum(engine.restarts for engine in engines) >= 2 and not any(engine.is_out for engine in reward._engines)


def test_a_start_whose_answer_does_not_come_is_told_by_name():
    engine = FakeScorer(LOST, name="reward engine 0")
    reward = ModelReward([engine], 5.0)
    engine.start = TimeoutError()
    with ThreadPoolExecutor(1) as thread, Arrivals[Answer]() as arriving:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        arriving.put({0: in_groups(1)[0]})
        assert wait_until(lambda: scores.done() or reward._engines[0].starting is not None)
        starting = reward._engines[0].starting
        if starting is not None:  # it is said to be there, and does not get here
            starting.is_done = True
            reward._woken.set()
        with pytest.raises(InferenceError, match="reward engine 0 did not answer 'describe' within"):
            scores.result(10)


def in_groups(count: int, size: int = 1) -> list[Answer]:
    """Groups of so many answers, of which each is one letter longer than the one before."""
    return [Answer(prompt(f"p{i // size}"), "x" * (i + 1), group=i // size, group_size=size) for i in range(count * size)]


def test_several_engines_are_dealt_groups_in_turn_and_all_asked_at_once():
    engines = [FakeScorer() for _ in range(3)]
    reward, items = ModelReward(engines, 5.0), in_groups(5)
    assert [score.value for score in reward.score(items)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [engine.asked for engine in engines] == [
        [(("p0", "x"),), (("p3", "xxxx"),)],
        [(("p1", "xx"),), (("p4", "xxxxx"),)],
        [(("p2", "xxx"),)],
    ]
    assert [score.value for score in reward.score(items[:1])] == [1.0]
    assert [len(engine.asked) for engine in engines] == [3, 2, 1], "who has nothing to judge is not asked"


@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
def test_what_an_engine_is_asked_together_does_not_depend_on_when_answers_arrive(order, cuts):
    """Each group whole, in the order of its places, by the engine of its number, as soon as its last answer is there."""
    engines, items = [FakeScorer(), FakeScorer()], in_groups(4, size=3)
    arriving, reward = Arrivals[Answer](), ModelReward(engines, 5.0)
    steps = [0, *sorted(cuts), 12]
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        with arriving:
            for start, stop in itertools.pairwise(steps):
                arriving.put({place: items[place] for place in order[start:stop]})
        assert [score.value for score in scores.result(20)] == [float(place + 1) for place in range(12)]
    for number, engine in enumerate(engines):
        wanted = [tuple((f"p{g}", "x" * (3 * g + i + 1)) for i in range(3)) for g in (number, number + 2)]
        assert {*map(tuple, engine.asked)} == {*wanted} and len(engine.asked) == len(wanted)


def test_a_group_is_asked_while_others_still_arrive():
    engine, items = FakeScorer(), in_groups(2, size=2)
    arriving, reward = Arrivals[Answer](), ModelReward([engine], 5.0)
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        with arriving:
            arriving.put({3: items[3], 0: items[0]})
            arriving.put({2: items[2]})
            assert wait_until(lambda: engine.asked == [(("p1", "xxx"), ("p1", "xxxx"))]) and not scores.done()
            arriving.put({1: items[1]})
        assert [score.value for score in scores.result(20)] == [1.0, 2.0, 3.0, 4.0]


def test_the_engine_that_is_late_is_named():
    late = [FakeScorer(name="reward engine 0"), FakeScorer(TimeoutError(), name="reward engine 1")]
    with pytest.raises(
        InferenceError, match=r"reward engine 1 did not answer 'score' within reward_model\.timeout_seconds = 0\.2"
    ):
        ModelReward(late, 0.2).score(in_groups(5))


@pytest.mark.parametrize(
    ("errors", "restarts", "kind", "sentence"),
    [
        ((LOST, LOST), 1, InferenceError, "the reward engine ended: killed"),
        ((TimeoutError(),), 0, InferenceError, r"answer 'score' within reward_model\.timeout_seconds = 0\.2: raise it"),
        ((LOST, TimeoutError()), 1, InferenceError, r"answer 'score' within reward_model\.timeout_seconds = 0\.2"),
        ((WatchdogError("it failed"),), 0, WatchdogError, "it failed"),
    ],
)
def test_what_a_second_start_does_not_mend_ends_the_run(errors, restarts, kind, sentence):
    engine = FakeScorer(*errors)
    with pytest.raises(kind, match=sentence):
        ModelReward([engine], 0.2).score([Answer(prompt("a"), "x")])
    assert engine.restarts == restarts


@pytest.mark.parametrize(
    ("start", "sentence"),
    [(LOST, "the reward engine ended"), (TimeoutError(), "answer 'describe' within reward_model.timeout_seconds = 5.0")],
)
def test_an_engine_that_does_not_start_is_an_error_before_anything_is_asked(start, sentence):
    engine = FakeScorer(start=start)
    with pytest.raises(InferenceError, match=sentence):
        ModelReward([engine], 5.0)
    assert engine.restarts == 0


# -- several rewards


class Named(Reward):
    """A reward that answers (its number, place among what it was asked)."""

    def __init__(self, number: int) -> None:
        self.number, self.closed = number, 0
        self.asked: list[Answer] = []

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        self.asked = list(answers)
        return [Score(100.0 * self.number + place, "ok") for place in range(len(answers))]

    def close(self) -> None:
        self.closed += 1


@given(st.lists(st.sampled_from(["math", "model", "function"]), max_size=12))
def test_every_prompt_of_a_mixed_batch_goes_to_the_reward_it_names_and_order_is_kept(names):
    rewards = {"math": Named(1), "model": Named(2), "function": Named(3)}
    items = [Answer(prompt(f"p{i}", name), f"t{i}") for i, name in enumerate(names)]
    with RoutedReward(rewards) as routed:
        scores = routed.score(items)
    places = [names[:i].count(name) for i, name in enumerate(names)]
    assert [score.value for score in scores] == [
        100.0 * rewards[name].number + place for name, place in zip(names, places, strict=True)
    ]
    for name, reward in rewards.items():
        assert reward.asked == [item for item in items if item.prompt.reward == name]
        assert reward.closed == 1


def test_only_the_rewards_that_sources_name_are_opened():
    config = run_config(data={"reward": "model"}, reward_model={"path": "unused"})
    with open_rewards(config, Judges([FakeScorer()])) as routed:
        assert list(routed._rewards) == ["model"]
        assert routed.score([Answer(prompt("a"), "xy")]) == [Score(2.0, "ok")]


def test_patience_counts_both_starts_of_the_engine_where_there_is_one():
    assert run_config().reward_model.patience_seconds == 0
    with_model = run_config(data={"reward": "model"}, reward_model={"path": "unused", "timeout_seconds": 7.0})
    assert with_model.reward_model.patience_seconds == 14
