"""Judging: verdicts are read strictly, both orders are asked, nothing is asked twice, what fails is told and counted, and
the figures against arithmetic by hand. The endpoint is a real HTTP server.
"""

import importlib.util
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import cli
from engine.benchmarks import endpoint, win_rate
from engine.benchmarks import judge as judging
from engine.benchmarks.answers import Answer
from engine.benchmarks.endpoint import Endpoint
from engine.benchmarks.judge import VERDICTS, Judged, games_of, messages_of, verdict_of
from engine.core.errors import DataError, InferenceError, RequestError
from tests.unit.benchmarks.chat_server import ChatServer, completion

KEY = "sk-secret-0123456789"
MIRRORED = dict(zip(VERDICTS, VERDICTS[::-1], strict=True))
QUESTIONS = [f"question {i}" for i in range(6)]


def answers(generator, texts):
    return [Answer(q, q, text, generator) for q, text in zip(QUESTIONS, texts, strict=True)]


@pytest.fixture
def serve():
    with ExitStack() as servers:
        yield lambda reply: servers.enter_context(ChatServer(reply))


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """`semion judge` of six good answers against six bad ones: (exit code, what it printed, its figures, its ledger)."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(judging, "MAX_FAILED_IN_A_ROW", 4)
    opened = endpoint.open_endpoint
    monkeypatch.setattr(
        endpoint, "open_endpoint", lambda *options: replace(opened(*options), attempts=2, backoff_seconds=0.001)
    )
    for name, text in (("ours", "good"), ("theirs", "bad")):
        rows = [{"dataset": "d", "instruction": q, "output": f"{text} {q}", "generator": name} for q in QUESTIONS]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))

    def judge(server, *more):
        figures, ledger = tmp_path / "figures.json", tmp_path / "judged" / "replies.jsonl"
        figures.unlink(missing_ok=True)
        arguments = ["judge", str(tmp_path / "ours.json"), "--against", str(tmp_path / "theirs.json"), "--endpoint", server.url]
        arguments += ["--model", "judge-1", "--output", str(ledger), "--key-env", "JUDGE_KEY", "--json", str(figures)]
        code = cli.main([*arguments, "--concurrency", "2", *more])
        said = capsys.readouterr()
        rows = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
        return code, said.out + said.err, json.loads(figures.read_text()) if figures.exists() else None, rows

    return judge


def prefers_good(body, number=0):
    shown = body["messages"][1]["content"]
    return completion("[[A>>B]]" if shown.index("good") < shown.index("bad") else "so: [[B>A]].")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        *((f"because.\n[[{v}]]", v) for v in VERDICTS),
        ("[[A>B]] as I said: [[A>B]]", "A>B"),
        ("a matrix [[1, 2]] and [[B>A]]", "B>A"),
        ("", None),
        ("A>B", None),
        ("[A>B]", None),
        ("[[A > B]]", None),
        ("[[A>>>B]]", None),
        ("[[B=A]]", None),
        ("[[A<B]]", None),
        ("[[A>B]] or rather [[A=B]]", None),
        ("[[A>B]] or rather [[A>>>B]]", None),
    ],
)
def test_a_verdict_is_one_of_five_labels_or_none(text, verdict):
    assert verdict_of(text) == verdict


def test_both_orders_are_asked_and_a_changed_answer_is_another_game():
    ours, theirs, asked = answers("ours", ["x"] * 6), answers("theirs", ["y"] * 6), Endpoint("http://h", "j")
    games = games_of(ours, theirs, asked)
    assert [(g.question_id, g.model_first) for g in games] == [(q, first) for q in QUESTIONS for first in (True, False)]
    assert json.loads(games[0].body)["messages"] == messages_of(QUESTIONS[0], "x", "y")
    assert json.loads(games[1].body)["messages"] == messages_of(QUESTIONS[0], "y", "x")
    keys = {g.key for g in games}
    assert len(keys) == 12
    assert not keys & {g.key for g in games_of(ours, theirs, Endpoint("http://h", "k"))}
    assert not keys & {g.key for g in games_of(ours, answers("theirs", ["z"] * 6), asked)}
    assert keys == {g.key for g in games_of(ours, theirs, Endpoint("http://elsewhere", "j", "key"))}
    with pytest.raises(DataError, match="found none for 'question 5'"):
        games_of(ours, theirs[:5], asked)


def test_a_whole_comparison(run, serve):
    server = serve(prefers_good)
    code, printed, figures, rows = run(server)
    assert code == 0, printed
    assert len(server.asked) == len(rows) == 12
    assert {(figures["win_rate"], figures["arena_score"], figures["standard_error"])} == {(1.0, 1.0, 0.0)}
    assert figures["first_win_rate"] == 0.5
    assert figures["verdicts"] == {"A>>B": 6, "B>A": 6}
    assert (figures["model"], figures["baseline"], figures["judge"]) == ("ours", "theirs", "judge-1")
    assert (figures["num_questions"], figures["num_games"], figures["num_unparsable"], figures["num_failed"]) == (6, 12, 0, 0)
    assert {row["verdict"] for row in rows} == {"A>>B", "B>A"}
    assert "100.0% ± 0.0%" in printed


def test_a_judge_that_likes_the_first_is_found_out(run, serve):
    _, _, figures, _ = run(serve(lambda body, number: completion("[[A>B]]")))
    assert (figures["win_rate"], figures["first_win_rate"]) == (0.5, 1.0)


def test_nothing_is_asked_twice_also_after_a_torn_line(run, serve, tmp_path):
    run(serve(prefers_good))
    again = serve(prefers_good)
    assert run(again)[0] == 0
    assert again.asked == []
    ledger = tmp_path / "judged" / "replies.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]) + lines[-1][:40])
    code, _, figures, rows = run(again)
    assert (code, len(again.asked), len(rows), figures["win_rate"]) == (0, 1, 12, 1.0)
    run(again, "--model", "judge-2")
    assert len(again.asked) == 13, "another judge is asked everything"
    ledger.write_text("[]\n")
    code, printed, _, _ = run(again)
    assert (code, "must be a verdict" in printed) == (3, True)


@pytest.mark.parametrize(
    "text",
    [
        '[{"instruction": "q", "output": "a"}]',
        '{"key": "k", "verdict": "A>B", "reply": "torn',
        '{"key": "k", "verdict": "A>B"}\n{"key": 3, "verdict": "A>B"}\nrest',
        '{"key": "k", "verdict": "won"}\n',
        '{"key": "k"}\nrest',
        "[" * 100_000 + "\n",
        "\n",
        "\x00\udcff\n",
    ],
)
def test_a_file_that_is_no_ledger_is_named_and_left_as_it_is(serve, tmp_path, text):
    """Also where its only line has no newline at its end, as of most JSON."""
    file, data = tmp_path / "precious.json", text.encode("utf-8", "surrogateescape")
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"precious\.json.* must .*; found .*name another --output"):
        judging.judge([], Endpoint("http://h", "j"), file, 1, {})
    assert file.read_bytes() == data


@pytest.mark.parametrize("other", ["ours.json", "theirs.json", "questions.json", "figures.json"])
def test_replies_have_a_file_of_their_own(run, serve, tmp_path, other):
    server, before = serve(prefers_good), (tmp_path / "ours.json").read_bytes()
    output = str(tmp_path / "judged" / ".." / other)
    code, printed, _, _ = run(server, "--questions", str(tmp_path / "questions.json"), "--output", output)
    assert (code, "--output must be a file of its own" in printed) == (2, True), printed
    assert (server.asked, (tmp_path / "ours.json").read_bytes()) == ([], before)


class Slow(Endpoint):
    """Answers the first request when it is told to stop, as one does that was under way; the others end as told."""

    def ask(self, body, stopped):
        if body == b"0":
            assert stopped.wait(30)
            return "[[A>B]]"
        if self.model == "hopeless":
            raise InferenceError("no such model")
        raise RequestError("refused")


@pytest.mark.parametrize(("model", "why"), [("hopeless", "no such model"), ("broken", "found 4 requests in a row")])
def test_a_reply_that_comes_after_the_end_is_kept(monkeypatch, tmp_path, model, why):
    monkeypatch.setattr(judging, "MAX_FAILED_IN_A_ROW", 4)
    games = [judging.Game(str(n), True, str(n).encode(), f"key {n}") for n in range(50)]
    with pytest.raises(InferenceError, match=why):
        judging.judge(games, Slow("http://h", model), tmp_path / "ledger.jsonl", 2, {})
    (row,) = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert (row["key"], row["verdict"]) == ("key 0", "A>B")


def test_an_empty_reply_is_written_down_and_counted(run, serve):
    server = serve(lambda body, number: completion(None) if number == 1 else prefers_good(body))
    code, _, figures, rows = run(server)
    assert (code, figures["num_unparsable"], figures["num_failed"], len(server.asked)) == (0, 1, 0, 12)
    assert [row["reply"] for row in rows if row["verdict"] is None] == [""]


def test_an_unreadable_verdict_is_counted_and_is_no_tie(run, serve):
    def reply(body, number):
        return completion("I cannot say.") if "question 0" in body["messages"][1]["content"] else prefers_good(body)

    server = serve(reply)
    code, _, figures, rows = run(server)
    assert (code, figures["num_unparsable"], figures["num_games"], figures["num_questions"]) == (0, 2, 10, 5)
    assert figures["win_rate"] == 1.0
    assert [row["verdict"] for row in rows].count(None) == 2
    server.reply = lambda body, number: completion("[[A=B]] [[A>B]]")
    code, printed, figures, _ = run(server, "--model", "judge-2")
    assert (code, figures) == (3, None)
    assert "at least one reply must hold a verdict; found none in 12" in printed


def test_a_pair_that_fails_is_told_after_the_figures_and_asked_next_time(run, serve):
    def reply(body, number):
        return (400, {}, b"too long") if "question 1" in body["messages"][1]["content"] else prefers_good(body)

    server = serve(reply)
    code, printed, figures, rows = run(server)
    assert (code, len(rows), figures["num_failed"], figures["num_games"]) == (5, 10, 2, 10)
    assert "2 of 12 comparisons have no reply and count nowhere" in printed
    assert "'too long'; run the command again" in printed
    server.asked.clear()
    server.reply = prefers_good
    code, _, figures, rows = run(server)
    assert (code, len(server.asked), len(rows), figures["num_failed"]) == (0, 2, 12, 0)


def test_hopeless_endpoints_end_the_command_at_once_and_what_was_judged_stays(run, serve):
    server = serve(lambda body, number: prefers_good(body) if number <= 3 else (500, {}, b"down"))
    code, printed, figures, rows = run(server)
    assert (code, figures, len(rows)) == (5, None, 3)
    assert "found 4 requests in a row without an answer" in printed
    assert len(server.asked) <= 3 + 2 * (4 + 2), "two attempts each, and two under way"
    server = serve(lambda body, number: (401, {}, b"who are you"))
    code, printed, _, _ = run(server)
    assert (code, "check both and the key" in printed) == (5, True)
    assert len(server.asked) <= 2, "those under way at once"


def test_the_key_is_in_no_output(run, serve, tmp_path):
    def reply(body, number):
        if number == 1:
            return 400, {}, f"key {KEY} has no right".encode()
        return completion(f"Your key is {KEY}. [[A=B]]")

    server = serve(reply)
    code, printed, _, rows = run(server, "--verbose")
    assert (code, len(rows)) == (5, 11)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert "[key]" in printed
    texts = [printed, *(file.read_text() for file in tmp_path.rglob("*") if file.is_file())]
    assert not any(KEY in text for text in texts)


def test_the_command_refuses_what_cannot_work(run, serve, monkeypatch):
    server = serve(prefers_good)
    assert "--concurrency must be above 0" in run(server, "--concurrency", "0")[1]
    assert "found nothing in NO_KEY" in run(server, "--key-env", "NO_KEY")[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, printed, _, _ = run(server, "--length-controlled")
    assert (code, "pip install alpaca_eval==0.6.6" in printed) == (2, True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    code, printed, _, _ = run(server, "--length-controlled")
    assert (code, "AlpacaEval's 805 questions" in printed) == (3, True)
    assert server.asked == []


JUDGED = st.lists(
    st.builds(Judged, st.sampled_from(QUESTIONS), st.booleans(), st.sampled_from([*VERDICTS, None])), min_size=1, max_size=30
).filter(lambda games: any(game.verdict for game in games))


@given(JUDGED)
@settings(deadline=None, max_examples=60)
def test_the_other_side_wins_what_this_side_loses(judged):
    ours = win_rate.win_rates(judged)
    swapped = win_rate.win_rates([Judged(g.question_id, not g.model_first, g.verdict) for g in judged])
    mirrored = win_rate.win_rates([Judged(g.question_id, g.model_first, MIRRORED.get(str(g.verdict))) for g in judged])
    for theirs in (swapped, mirrored):
        assert theirs["win_rate"] == pytest.approx(1 - ours["win_rate"])
        assert theirs["arena_score"] == pytest.approx(1 - ours["arena_score"])
        assert theirs["standard_error"] == pytest.approx(ours["standard_error"])
    assert ours["num_games"] + ours["num_unparsable"] == len(judged)
    assert ours["arena_interval"][0] <= ours["arena_score"] + 1e-12
    assert ours["arena_interval"][1] >= ours["arena_score"] - 1e-12 or ours["num_questions"] < 6


def test_figures_worked_out_by_hand():
    """Question 0: a strong win and a tie, 1: a loss and an unreadable reply. Rates 3/4 and 0; weights 3, 1, 1."""
    games = [("0", True, "A>>B"), ("0", False, "A=B"), ("1", False, "A>B"), ("1", True, None)]
    found = win_rate.win_rates([Judged(*game) for game in games])
    assert found["win_rate"] == pytest.approx(0.375)
    assert found["arena_score"] == pytest.approx(3.5 / 5)
    assert found["first_win_rate"] == pytest.approx(2.5 / 3)
    assert found["verdicts"] == {"A=B": 1, "A>>B": 1, "A>B": 1}


def test_the_standard_error_is_that_of_a_mean_over_questions():
    draw = np.random.default_rng(1)
    verdicts = draw.choice(VERDICTS, 500)
    judged = [Judged(str(i), True, str(verdict)) for i, verdict in enumerate(verdicts)]
    points = np.array([win_rate.points_of(game) for game in judged])
    found = win_rate.win_rates(judged)
    assert found["standard_error"] == pytest.approx(points.std(ddof=1) / np.sqrt(500), rel=0.1)
    low, high = found["arena_interval"]
    assert low < found["arena_score"] < high
    assert found == win_rate.win_rates(judged), "the resampling is seeded"


def comparison(num_questions=805):
    """A judged comparison of AlpacaEval's size in which longer answers win more often, ours being the longer ones."""
    draw = np.random.default_rng(0)
    questions = [f"q{i}" for i in range(num_questions)]
    ours = [Answer(q, q, "x" * int(draw.integers(200, 1000)), "ours") for q in questions]
    theirs = [Answer(q, q, "x" * int(draw.integers(100, 700)), "theirs") for q in questions]
    chances = [1 / (1 + np.exp(-(len(a.output) - len(b.output)) / 150)) for a, b in zip(ours, theirs, strict=True)]
    judged = [Judged(q, True, "A>B" if draw.random() < chance else "B>A") for q, chance in zip(questions, chances, strict=True)]
    return judged, ours, theirs


def test_the_length_controlled_win_rate_is_asked_of_the_package(monkeypatch):
    """The other test asks the package itself, where it is installed."""
    asked = []

    def get_length_controlled_winrate(annotations, save_weights_dir):
        asked.append((annotations, save_weights_dir))
        return {"length_controlled_winrate": 42.0, "lc_standard_error": 1.5}

    module = ModuleType("alpaca_eval.metrics.glm_winrate")
    module.get_length_controlled_winrate = get_length_controlled_winrate  # type: ignore[attr-defined]
    for name in ("alpaca_eval", "alpaca_eval.metrics"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    judged, ours, theirs = comparison(3)
    judged = [*judged[:2], Judged("q0", False, "A=B"), Judged("q2", True, None)]
    found = win_rate.length_controlled(judged, ours, theirs, "judge-1")
    assert found == {"length_controlled_win_rate": 0.42, "length_controlled_standard_error": 0.015}
    ((annotations, folder),) = asked
    assert folder is None, "the package would write into its own folder"
    first = annotations[0]
    assert (first["output_2"], first["generator_2"]) == (ours[0].output, "ours"), "the second is the model, as in the package"
    assert (first["output_1"], first["generator_1"], first["annotator"]) == (theirs[0].output, "theirs", "judge-1")
    assert first["preference"] == 1 + (win_rate.points_of(judged[0]) + 0.5) / 2
    assert np.isnan(annotations[2]["preference"])


@pytest.mark.skipif(importlib.util.find_spec("alpaca_eval") is None, reason="alpaca_eval is not installed")
def test_the_package_takes_the_advantage_of_length_away(tmp_path, monkeypatch):
    """Its own table of difficulties, which needs a network, is replaced by one of the same form."""
    from alpaca_eval.metrics import glm_winrate

    draw, rows = np.random.default_rng(3), ["index,std_delta_len,preference,instruction_difficulty,not_gamed_baseline,model"]
    for model in ("concise", "verbose"):
        rows += [f"{i},{draw.normal():.4f},{draw.random():.4f},{np.sin(i):.4f},False,{model}" for i in range(805)]
    (tmp_path / "df_gamed.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **arguments: str(tmp_path / "df_gamed.csv"))
    judged, ours, theirs = comparison()
    win_rate.check_length_control(ours)
    found = win_rate.length_controlled(judged, ours, theirs, "judge-1")
    assert win_rate.win_rates(judged)["win_rate"] > 0.7
    assert 0.4 < found["length_controlled_win_rate"] < 0.6
    assert 0 < found["length_controlled_standard_error"] < 0.05
