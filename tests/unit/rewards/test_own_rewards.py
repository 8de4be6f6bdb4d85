"""The user's own rewards through real workers: what they see, what they may return, several in one run and on one prompt,
groups, slow ones, keys of an API, and that a run notices when one was written anew.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import RunConfig, dump_config, load_config
from engine.config.options import Rewards
from engine.core.errors import CheckpointError, ConfigError, DataError
from engine.core.jsonl import JsonlLedger
from engine.core.types import Completion, Judging, Prompt, Rollout, RolloutGroup, Score
from engine.data.mixture import load_mixture
from engine.data.rows import load_rows
from engine.data.templates import load_tokenizer
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer, Reward, answer_of
from engine.rewards.function import FunctionReward
from engine.rewards.pool import slots
from engine.rewards.registry import RoutedReward, check_pairing, checks, identities, judging_of, open_rewards, reward_class
from engine.rollouts.ledger import RolloutLedger, ledger_rows
from engine.rollouts.metrics import rollout_metrics
from engine.rollouts.source import groups_of
from tests.rollouts import make_completion, make_prompt
from tests.unit.rollouts.test_rollouts import run_config
from tests.unit.run.test_checkpoint import commit, open_checkpoints
from tests.unit.run.test_checkpoint import run_config as checkpoint_config

IFEVAL = '''
"""Whether a completion follows the instructions of its row, as IFEval's loose accuracy counts them."""
from engine.rewards.base import reward

def followed(instruction, completion):
    kind = instruction["type"]
    if kind == "max_words":
        return len(completion.split()) <= instruction["n"]
    if kind == "no_commas":
        return "," not in completion
    raise ValueError(f"no such instruction: {kind}")

@reward(verifiable=True)
def ifeval(completion, row):
    return {each["type"]: float(followed(each, completion)) for each in row["instructions"]}
'''
MINE = '''
import asyncio, os, time
from engine.rewards.base import Reward, reward
from engine.core.types import Score

def length_penalty(completion, num_tokens, finish_reason):
    return -float(num_tokens) if finish_reason == "length" else 0.0

def everything(**kwargs):
    return float(sorted(kwargs) == ["answer", "completion", "finish_reason", "num_tokens", "problem", "row"])

def changes_the_row(completion, row):
    if completion == "outside":
        row["n"] = 2
    elif completion == "inside":
        row["list"].append(3)
    return float(row["n"])

def rank(problem, group, num_tokens):
    if "spoil" in group:
        return [1.0]
    order = sorted(group)
    return [{"rank": float(order.index(each)), "tokens": float(n)} for each, n in zip(group, num_tokens)]

def parts(completion):
    return {"correct": 1.0, "format": float(completion), "big": 1e308}

def shaped(parts, completion):
    return 10 * parts["ifeval"] - parts["length_penalty"] if completion != "raise" else 1 / 0

def scored(completion):
    time.sleep(float(completion))
    return 1.0

async def asked(completion):
    if completion == "block":
        time.sleep(60)
    if completion == "die":
        os._exit(7)
    if completion == "leave":
        raise SystemExit(0)
    if completion == "raise":
        raise KeyError("no reply")
    await asyncio.sleep(float(completion))
    return 1.0

def yields(completion):
    yield 1.0

class NoReward:
    def __call__(self, completion):
        return 1.0

class Unfinished(Reward):
    pass

class Confused(Reward):
    @classmethod
    def check(cls, config, name):
        1 / 0

    def score(self, answers):
        return []

class Awaiting:
    async def __call__(self, completion):
        await asyncio.sleep(0)
        return {"length": float(len(completion))}

awaiting = Awaiting()

@reward(parts="big")
def misdeclared(completion):
    return {"big": 1.0}

@reward(parts=("long", "rare"))
def declared(completion):
    return {"long": 1.0}

@reward(deterministic=False)
def counted(completion):
    counted.calls += 1
    return float(counted.calls)

@reward(deterministic=False)
async def counted_awaiting(completion):
    counted.calls += 1
    return float(counted.calls)

counted.calls = 0

def sees(completion):
    return float(os.environ.get(completion) == "secret")

class Longest(Reward):
    """In the run's own process."""

    verifiable = True
    wants_row = True

    def score(self, answers):
        return [Score(float(len(each.completion) > each.row["n"]), "ok") for each in answers]
'''


def check_all(config):
    check_pairing(config)
    for check in checks(config):
        check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    (made / "ifeval.py").write_text(IFEVAL)
    (made / "mine.py").write_text(MINE)
    return made


def own(folder: Path, name: str, **options: Any) -> FunctionReward:
    tables = {"workers": 1, "deadline_seconds": 30.0} | options
    return FunctionReward(Rewards(**tables), f"{folder}/mine.py:{name}", "data.reward")


def prompt(name: str = "id", row: Any = None, reward: str = "math") -> Prompt:
    return make_prompt(name, (1,), f"problem {name}", "7", "", "", reward, row="" if row is None else json.dumps(row))


def answers(texts: Sequence[str], asked: Prompt | None = None) -> list[Answer]:
    return [Answer(asked or prompt(), text, len(text), "stop") for text in texts]


def ok(*values: float) -> list[Score]:
    return [Score(value, "ok") for value in values]


def test_a_reward_from_outside_in_one_file_is_trained_with_beside_math(folder, model_folder, tmp_path):
    """The whole way: rows with columns, prompts, judging in workers, metrics, the ledger and back."""
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "3+4?", "answer": "7", "secret": "not kept"}))
    instructions = [{"type": "max_words", "n": 2}, {"type": "no_commas"}]
    (tmp_path / "if.jsonl").write_text(json.dumps({"prompt": "Say hi.", "instructions": instructions, "id": "hi"}))
    named = f"{folder}/ifeval.py:ifeval"
    mix = {"train": str(tmp_path / "if.jsonl"), "reward": named, "prompts_per_step": 1}
    data = {"train": str(tmp_path / "math.jsonl"), "prompts_per_step": 1, "mix": (mix,), "max_prompt_tokens": 400}
    config = run_config(data=data, model={"path": str(model_folder)}, rewards={"deadline_seconds": 30.0})
    check_all(config)
    prompts = load_mixture(config, judging_of, load_tokenizer(model_folder)).at(0)
    assert [(each.reward, each.verifiable) for each in prompts] == [("math", True), (named, True)]
    assert prompts[0].row == "", "memory is for who asks for it"
    texts = (r"\boxed{7}", "8", "hi there", "well, hi there")
    completions = [
        make_completion(prompts[i // 2].id, i % 2, i, 0, (1, 2, 3), (-1.0, -1.0, -1.0), text, "stop")
        for i, text in enumerate(texts)
    ]
    with open_rewards(config) as reward:
        groups = scored(prompts, completions, reward)
    scores = [rollout.score for group in groups for rollout in group.rollouts]
    assert scores[:2] == ok(1.0, 0.0)
    followed, broken = (("max_words", 1.0), ("no_commas", 1.0)), (("max_words", 0.0), ("no_commas", 0.0))
    assert scores[2:] == [Score(2.0, "ok", followed), Score(0.0, "ok", broken)]
    metrics = rollout_metrics(groups, None)
    assert metrics["accuracy"] == 0.5
    assert (metrics["reward_mean_math"], metrics["reward_mean_ifeval"]) == (0.5, 1.0)
    assert (metrics["reward_max_words_mean"], metrics["reward_no_commas_mean"]) == (0.5, 0.5)
    ledger = JsonlLedger(tmp_path / "ledger.jsonl")
    ledger.append(row for group in groups for row in ledger_rows(group))
    ledger.close()
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert "reward_parts" not in lines[0] and lines[2]["reward_parts"] == {"max_words": 1.0, "no_commas": 1.0}
    assert RolloutLedger(tmp_path / "ledger.jsonl").groups(0, {each.id: each for each in prompts}, 2, 2) == groups


@pytest.mark.parametrize("named", ["{folder}/judge.py:f", "judge:f", "inner.judge:f"])
@pytest.mark.parametrize("source", ["data.reward", "rewards.function", "data.reward_combine"])
def test_a_reward_that_was_written_anew_is_refused_on_resume_by_name(tmp_path, monkeypatch, named, source):
    """However it is named: the file behind it is what counts, and it is not run to see that."""
    monkeypatch.chdir(tmp_path)
    name = named.format(folder=tmp_path)
    file = tmp_path / ("inner/judge.py" if "inner" in named else "judge.py")
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise SystemExit('imported')")
    changes: dict[str, Any] = {
        "data.reward": {"data": {"train": "t.jsonl", "reward": ["math", name]}},
        "rewards.function": {"data": {"train": "t.jsonl", "reward": "function"}, "rewards": {"function": name}},
        "data.reward_combine": {"data": {"train": "t.jsonl", "reward": ["math", "x.py:g"], "reward_combine": name}},
    }[source]
    commit(tmp_path, 5, **changes)
    assert open_checkpoints(tmp_path).load(checkpoint_config(tmp_path, **changes)).step == 5
    file.write_text("raise SystemExit('imported') # another")
    with pytest.raises(CheckpointError, match=f"^{source}.* must be what .* was written with; found other contents"):
        open_checkpoints(tmp_path).load(checkpoint_config(tmp_path, **changes))


def test_it_is_sent_what_its_parameters_ask_for(folder):
    row = {"n": 1, "list": [1, {"a": None}]}
    config = Rewards(deadline_seconds=30.0)
    with own(folder, "length_penalty") as penalty:
        assert penalty.facts.asks == ("completion", "num_tokens", "finish_reason")
        assert penalty._request(answers(["abc"])[0]) == ("abc", 3, "stop")
        assert penalty.score([Answer(prompt(), "abc", 3, "length"), Answer(prompt(), "abc", 3, "stop")]) == ok(-3.0, 0.0)
    with FunctionReward(config, f"{folder}/mine.py:everything", "data.reward") as everything:
        assert everything.score(answers(["x"], prompt(row=row))) == ok(1.0)


def test_a_row_is_frozen_in_depth(folder):
    row = {"n": 1, "list": [1, 2]}
    with own(folder, "changes_the_row") as reward:
        outside, inside, fine = reward.score(answers(["outside", "inside", "fine"], prompt(row=row)))
    assert (outside.status, inside.status, fine) == ("invalid", "invalid", Score(1.0, "ok"))
    assert "TypeError: a row is frozen" in outside.problem and "AttributeError" in inside.problem


def test_rows_keep_their_columns_only_for_who_asks(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "p", "answer": "5", "instructions": [{"n": 1}]}\n')
    (kept,), (plain,) = load_rows(file, keep_columns=True), load_rows(file)
    assert json.loads(kept.columns) == {"problem": "p", "answer": "5", "instructions": [{"n": 1}]}
    assert plain.columns == ""
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"problem": "p", "answer": "5", "k": [{"n": 1}], "raw": b"1"}])
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table.drop_columns(["raw"]), tmp_path / "rows.parquet")
    assert json.loads(load_rows(tmp_path / "rows.parquet", keep_columns=True)[0].columns)["k"] == [{"n": 1}]
    parquet.write_table(table, tmp_path / "raw.parquet")
    with pytest.raises(DataError, match=r"row 1: a row that a reward looks at must be .*found b'1': leave the column"):
        load_rows(tmp_path / "raw.parquet", keep_columns=True)
    assert load_rows(tmp_path / "raw.parquet")[0].answer == "5"


def test_a_group_is_judged_together_and_in_any_order_of_groups(folder):
    first, second = (answers(texts, prompt(name)) for name, texts in (("a", ["c", "a", "b"]), ("b", ["z", "yy"])))
    spoilt = answers(["spoil", "x"], prompt("c"))
    with own(folder, "rank") as reward:
        given = reward.score([*first, *second, *spoilt])
        again = reward.score([*spoilt, *second, *first])
        twice = reward.score([Answer(prompt("a"), text, 1, "stop", group) for group in (0, 1) for text in ("b", "a")])
    assert [score.value for score in given[:5]] == [3.0, 1.0, 2.0, 2.0, 2.0]
    assert given[3].parts == (("rank", 1.0), ("tokens", 1.0))
    assert {score.status for score in given[5:]} == {"invalid"} and "a list of 2 results" in given[6].problem
    assert again == [*given[5:], *given[3:5], *given[:3]]
    assert [dict(score.parts)["rank"] for score in twice] == [1.0, 0.0, 1.0, 0.0], "two groups of one prompt"


def test_named_parts_are_weighted_and_their_sum_must_be_finite(folder):
    with own(folder, "parts", weights={"format": 0.25, "big": 0.0}) as reward:
        assert reward.score(answers(["2"])) == [Score(1.5, "ok", (("correct", 1.0), ("format", 2.0), ("big", 1e308)))]
    with own(folder, "parts", weights={"big": 10.0}) as reward:
        (score,) = reward.score(answers(["2"]))
    assert score.status == "invalid" and "must be finite; found inf" in score.problem


def combined(folder: Path, **source: Any) -> RunConfig:
    named = ["{}/ifeval.py:ifeval", "{}/mine.py:length_penalty"]
    names = [name.format(folder) for name in named]
    return run_config(data={"reward": names} | source, rewards={"deadline_seconds": 30.0})


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ({}, 1.0 - 9.0),
        ({"reward_weights": [1.0, 0.1]}, 1.0 - 0.9),
        ({"reward_combine": "product"}, -9.0),
        ({"reward_combine": "min"}, -9.0),
        ({"reward_combine": "{}/mine.py:shaped"}, 19.0),
    ],
)
def test_several_rewards_of_one_prompt_become_one_with_parts(folder, source, value):
    """What the first one says decides what is right, whatever the others take off."""
    config = combined(folder, **{k: v.format(folder) if isinstance(v, str) else v for k, v in source.items()})
    assert judging_of(config, config.data) == Judging(verifiable=True, needs_answer=False, wants_row=True)
    check_all(config)
    asked = prompt(row={"instructions": [{"type": "no_commas"}]}, reward=config.data.judge)
    with open_rewards(config) as reward:
        long, wrong, short = reward.score(
            [Answer(asked, "hi there", 9, "length"), Answer(asked, "a, b", 9, "length"), Answer(asked, "hi", 2, "stop")]
        )
    parts = (("ifeval", 1.0), ("ifeval/no_commas", 1.0), ("length_penalty", -9.0))
    assert (long.value, long.status, long.parts, long.correct) == (pytest.approx(value), "ok", parts, True)
    assert not wrong.correct and short.correct
    assert short.value == (0.0 if source.get("reward_combine") in ("product", "min") else pytest.approx(1.0, rel=9.1))


def test_an_answer_that_one_of_several_could_not_judge_is_not_judged(folder):
    config = combined(folder, reward_combine=f"{folder}/mine.py:shaped")
    good, bad = ({"instructions": [{"type": kind}]} for kind in ("no_commas", "unheard of"))
    asked = [Answer(prompt(row=row, reward=config.data.judge), text, 1, "stop") for row, text in
             ((good, "x"), (bad, "x"), (good, "raise"))]  # fmt: skip
    with open_rewards(config) as reward:
        scores = reward.score(asked)
        assert [score.status for score in scores] == ["ok", "invalid", "invalid"]
        assert "no such instruction: unheard of" in reward.problems[config.data.rewards[0]]
        assert "ZeroDivisionError" in reward.problems[config.data.reward_combine]
    group = RolloutGroup(asked[0].prompt, 0, tuple(Rollout(_completion(a), s) for a, s in zip(asked, scores, strict=True)))
    assert len(group.judged) == 1
    rows = ledger_rows(group)
    assert [row.get("correct") for row in rows] == [True, None, None]


def _completion(answer: Answer) -> Completion:
    return make_completion("id", 0, 0, 0, (1,), (-1.0,), answer.completion, "stop")


def test_a_class_of_the_users_own_judges_in_this_process(folder):
    name = f"{folder}/mine.py:Longest"
    config = run_config(data={"reward": name})
    assert issubclass(reward_class(config, name), Reward)
    assert judging_of(config, config.data) == Judging(verifiable=True, needs_answer=False, wants_row=True)
    assert list(identities(config)) == [f"data.reward {name}"]
    with open_rewards(config) as reward:
        assert reward.score(answers(["a", "abc"], prompt(row={"n": 2}, reward=name))) == ok(0.0, 1.0)


def test_verifiable_is_what_the_reward_says_of_itself(folder):
    for name, expected in (("ifeval.py:ifeval", True), ("mine.py:length_penalty", False)):
        config = run_config(data={"reward": f"{folder}/{name}"}, algorithm={"pairing": "best_worst"})
        assert judging_of(config, config.data).verifiable is expected
        if expected:
            check_pairing(config)
        else:
            with pytest.raises(ConfigError, match=r"^algorithm\.pairing .*'best_worst' and no such source: leave"):
                check_pairing(config)


@pytest.mark.parametrize("function", ["asked", "scored"])
def test_eight_answers_at_once_take_as_long_as_one(folder, function):
    texts = [f"1.{i}" for i in range(8)]
    with own(folder, function, concurrency=8) as reward:
        reward.score(answers(["0"]))
        started = time.monotonic()
        assert reward.score(answers(texts)) == ok(*[1.0] * 8)
        seconds = time.monotonic() - started
    assert 1.7 <= seconds < 6.0, "one after another they take 10.8 s; the slack is a busy machine's"


@pytest.mark.parametrize("function", ["asked", "scored"])
def test_a_late_answer_neither_spoils_nor_delays_the_good_ones(folder, function):
    texts = ["0.1", "77", "0.2", "0.3"]
    with own(folder, function, concurrency=4, deadline_seconds=3.0) as reward:
        assert reward.score(answers(texts)) == [*ok(1.0), Score(0.0, "timeout"), *ok(1.0, 1.0)]
        assert reward.score(answers(texts[::-1])) == [*ok(1.0, 1.0), Score(0.0, "timeout"), *ok(1.0)]


def test_what_one_awaited_answer_does_to_its_process_is_its_own_status_only(folder, monkeypatch):
    """A call that blocks the loop, a death, an exit and an error among good answers, in any order."""
    expected = {
        **{"block": Score(0.0, "timeout"), "die": Score(0.0, "died"), "leave": Score(0.0, "invalid")},
        **{"raise": Score(0.0, "invalid"), "0.1": Score(1.0, "ok"), "0.2": Score(1.0, "ok")},
    }
    texts = list(expected)
    with own(folder, "asked", concurrency=6, deadline_seconds=2.0) as reward:
        (worker,) = reward._workers
        for order in (texts, texts[::-1]):
            given = dict(zip(order, reward.score(answers(order)), strict=True))
            assert given == expected
        assert reward._workers == [worker]
    assert "KeyError: 'no reply'" in given["raise"].problem and "SystemExit" in given["leave"].problem


def test_equal_answers_are_judged_again_where_the_function_says_so(folder):
    with own(folder, "counted") as reward:
        assert reward.score(answers(["x", "x", "x"])) == ok(1.0, 2.0, 3.0)


def test_the_first_problem_of_a_reward_is_a_warning_and_equal_ones_are_not_repeated(caplog):
    class Raising(Reward):
        def score(self, given):
            return [Score(0.0, "invalid", problem=f"Traceback {each.completion}") for each in given]

    with RoutedReward({"math": Raising()}) as routed:
        routed.score(answers(["one", "two"]))
        routed.score(answers(["three"]))
    assert [record.getMessage() for record in caplog.records] == [
        "reward math raised at an answer, which counts as not judged: Traceback one"
    ]


def test_children_are_replaced_before_they_grow_old(folder, monkeypatch):
    assert slots.ANSWERS_PER_CHILD == 1000
    with own(folder, "counted", concurrency=2) as reward:
        given = [score.value for score in reward.score(answers(["x"] * 2100))]
    assert max(given) <= 1000.0 and given.count(1.0) >= 3


def test_a_batch_that_ends_where_an_awaiting_child_is_full_does_not_stall(folder):
    """1,008 answers with 8 at once: the child is full with some still waiting and nobody left to wake the worker."""
    started = time.monotonic()
    with own(folder, "counted_awaiting", concurrency=8) as reward:
        given = [score.value for score in reward.score(answers(["x"] * 1008))]
    assert max(given) <= 1000.0 and given.count(1.0) == 2
    assert time.monotonic() - started < 60, "without the fresh child the answers wait for their deadlines"


def test_variables_are_seen_by_name_and_must_be_set(folder, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    monkeypatch.setenv("OTHER_KEY", "secret")
    with own(folder, "sees", environment=("JUDGE_API_KEY",)) as reward:
        assert reward.score(answers(["JUDGE_API_KEY", "OTHER_KEY"])) == ok(1.0, 0.0)
    monkeypatch.delenv("JUDGE_API_KEY")
    config = run_config(data={"reward": f"{folder}/mine.py:sees"}, rewards={"environment": ["JUDGE_API_KEY"]})
    with pytest.raises(ConfigError, match=r"^rewards\.environment .* found no JUDGE_API_KEY: set it"):
        check_all(config)
    assert "secret" not in "".join(capfd.readouterr())


def test_names_that_cannot_judge_are_sentences(folder, tmp_path):
    (tmp_path / "torn.py").write_text("raise OSError('no disk')\n")
    for name, said in (
        (f"{tmp_path}/torn.py:f", r"data\.reward must name a module that can be imported; .* OSError\('no disk'\)"),
        (f"{folder}/mine.py:gone", r"data\.reward must name something of .* found no gone"),
        (f"{folder}/mine.py:shaped", "`parts` is for a rule of data.reward_combine"),
        (f"{folder}/mine.py:yields", "must name a function that returns its result; found .*yields, which yields: use return"),
        (f"{folder}/mine.py:NoReward", "or a class that extends engine.rewards.base.Reward; found .* as <class '.*NoReward'>"),
        (f"{folder}/mine.py:Unfinished", r"must have a method score\(self, answers\); found none"),
        (f"{folder}/mine.py:Confused", r"failed with ZeroDivisionError: division by zero \(.*mine\.py, line \d+\): mend it"),
        (f"{folder}/mine.py:misdeclared", r"@reward\(parts=\.\.\.\) must be a list of names; found 'big'"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_all(run_config(data={"reward": name}))
    config = combined(folder, reward_combine=f"{folder}/mine.py:rank")
    with pytest.raises(ConfigError, match=r"^data\.reward_combine combines the rewards of one completion"):
        check_all(config)


def test_a_configuration_with_all_of_it_reads_back_equal(tmp_path):
    data = {"train": "t.jsonl", "reward": ["math", "a.py:f"], "reward_weights": [1.0, 0.5]}
    data |= {"mix": [{"train": "u.jsonl", "reward": "m.n:g"}]}
    rewards = {"weights": {"a b": 0.5}, "environment": ["KEY"], "concurrency": 8}
    tree = {"run": {"directory": "r", "steps": 1}, "model": {"path": "m"}, "data": data, "rewards": rewards}
    config = RunConfig.model_validate(tree)
    assert config.data.judge == "sum(math, 0.5*a.py:f)" and config.data.mix[0].judge == "m.n:g"
    (tmp_path / "c.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.toml") == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def scored(prompts: Sequence[Prompt], completions: Sequence[Completion], reward: Reward) -> list[RolloutGroup]:
    """Groups of equally many completions a prompt."""
    size = len(completions) // len(prompts)
    asked = [answer_of(prompts[i // size], completion, i // size) for i, completion in enumerate(completions)]
    return groups_of(0, prompts, completions, reward.score(asked))


class Fixed(Reward):
    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        return ok(*[self.value] * len(answers))


def test_metrics_of_functions_of_one_name_are_told_apart():
    names = ["a.py:f", "b.py:f"]
    prompts = [prompt(name, reward=name) for name in names]
    completions = [make_completion(name, 0, 0, 0, (1,), (-1.0,), "x", "stop") for name in names]
    groups = scored(prompts, completions, RoutedReward({"a.py:f": Fixed(1.0), "b.py:f": Fixed(2.0)}))
    metrics = rollout_metrics(groups, None)
    assert (metrics["reward_mean_a_py_f"], metrics["reward_mean_b_py_f"]) == (1.0, 2.0)
    assert not any(math.isnan(metrics[name]) for name in metrics if name.startswith("reward"))


def test_an_object_that_is_awaited_when_called_judges(folder):
    with own(folder, "awaiting") as reward:
        assert [score.value for score in reward.score(answers(["x", "xyz"]))] == [1.0, 3.0]


def test_weights_name_parts_that_are_returned(folder):
    """What a function declares is looked at before anything starts; of any other at the first answers."""
    with own(folder, "parts", weights={"fromat": 0.25, "big": 0.0}) as reward:
        routed = RoutedReward({"math": reward})
        part = Arrivals[Answer](is_part=True)
        with part:
            part.put(dict(enumerate(answers(["0"]))))
        routed.score_as_they_arrive(part)  # of a step of which more follows: others may return it
        with pytest.raises(ConfigError, match=r"^rewards\.weights must .* found fromat, and the parts big, correct, format"):
            routed.score(answers(["0"]))
    data = {"reward": f"{folder}/mine.py:declared"}
    check_all(run_config(data=data, rewards={"weights": {"rare": 2.0}}))
    with pytest.raises(ConfigError, match=r"found lnog, and the parts long, rare: mend the name, or declare"):
        check_all(run_config(data=data, rewards={"weights": {"lnog": 2.0}}))
    with pytest.raises(ConfigError, match="found format, and the parts none"):
        check_all(run_config(rewards={"weights": {"format": 2.0}}))
