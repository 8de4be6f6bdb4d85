"""Open-ended questions and answers: both benchmarks' files are read, what is written is what their tools expect and can be
read back, and each mistake in a file is a sentence.
"""

import json
from pathlib import Path

import pytest

from engine import cli
from engine.benchmarks.answers import Answer, load_answers, write_answers
from engine.benchmarks.open_ended import prompts_of, sample_answers
from engine.benchmarks.questions import Question, load_questions
from engine.core.errors import ConfigError, DataError
from engine.inference.pool import Pool
from tests import builders
from tests.shared_data import SHARED_DATA, needs_shared_data
from tests.unit.inference.test_pool import FakeEngine

ALPACA = [
    {"dataset": "helpful_base", "instruction": "Name {problem} three.", "output": "a reference", "generator": "davinci"},
    {"dataset": "koala", "instruction": "And now?", "output": "", "generator": "davinci"},
]
ARENA = [
    {"uid": "u1", "category": "arena-hard-v0.1", "cluster": "c", "prompt": "Write."},
    {"question_id": "u2", "turns": [{"content": "Sum up."}]},
]


def written(path: Path, rows: object) -> Path:
    lines = [json.dumps(row) for row in rows] if isinstance(rows, list) else [str(rows)]
    path.write_text(json.dumps(rows) if path.suffix == ".json" and isinstance(rows, list) else "\n".join(lines))
    return path


def sampled(tmp_path, questions, tokenizer, max_prompt_tokens=200):
    tokenizer.save_pretrained(tmp_path / "model")
    config = builders.config(
        model={"path": str(tmp_path / "model")},
        data={"max_prompt_tokens": max_prompt_tokens},
        sampling={"max_tokens": 2048},
    )
    engine = FakeEngine()
    prompts = prompts_of(config, questions)
    completions = sample_answers(config, prompts, Pool([engine], 5.0))
    (asked, _) = next(arguments for method, arguments in engine.calls if method == "submit")
    return prompts, completions, asked


def test_questions_of_both_benchmarks(tmp_path):
    first, second = load_questions(written(tmp_path / "alpaca.json", ALPACA))
    assert (first.instruction, first.dataset, second.dataset) == ("Name {problem} three.", "helpful_base", "koala")
    assert first.id != second.id
    found = load_questions(written(tmp_path / "arena.jsonl", ARENA))
    assert found == [Question("u1", "Write.", "arena"), Question("u2", "Sum up.", "arena")]


@needs_shared_data("arena_hard_v01.jsonl")
def test_arena_hards_own_file():
    questions = load_questions(SHARED_DATA / "arena_hard_v01.jsonl")
    assert len(questions) == 500
    assert questions[0] == Question(
        "328c149ed45a41c0b9d6f14659e63599", "Use ABC notation to write a melody in the style of a folk tune.", "arena_hard_v01"
    )


def test_the_instruction_stands_alone_in_the_chat_template_and_is_sampled_as_the_paper_samples(tmp_path, tiny_tokenizer):
    questions = load_questions(written(tmp_path / "alpaca.json", ALPACA))
    prompts, completions, asked = sampled(tmp_path, questions, tiny_tokenizer)
    assert tiny_tokenizer.decode(prompts[0].token_ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName {problem} three.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert [(r.temperature, r.top_p, r.max_tokens) for r in asked] == [(0.6, 0.9, 2048)] * 2
    assert [c.prompt_id for c in completions] == [q.id for q in questions]
    with pytest.raises(DataError, match=r"must fit data.max_prompt_tokens = 20; found \d+ tokens"):
        sampled(tmp_path, questions, tiny_tokenizer, 20)


def test_alpaca_evals_outputs(tmp_path, tiny_tokenizer):
    questions = load_questions(written(tmp_path / "alpaca.json", ALPACA))
    _, completions, _ = sampled(tmp_path, questions, tiny_tokenizer)
    write_answers(tmp_path / "out.json", "alpaca_eval", questions, [(c.text, len(c.token_ids)) for c in completions], "tiny")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"dataset": row["dataset"], "instruction": row["instruction"], "output": c.text, "generator": "tiny"}
        for row, c in zip(ALPACA, completions, strict=True)
    ]
    answers = load_answers(tmp_path / "out.json")
    assert answers == [Answer(q.id, q.instruction, c.text, "tiny") for q, c in zip(questions, completions, strict=True)]
    assert [a.output for a in load_answers(tmp_path / "alpaca.json")] == ["a reference", ""], "the reference's own file"


def test_arena_hards_model_answers(tmp_path, tiny_tokenizer):
    questions = load_questions(written(tmp_path / "arena.jsonl", ARENA))
    _, completions, _ = sampled(tmp_path, questions, tiny_tokenizer)
    write_answers(tmp_path / "tiny.jsonl", "arena_hard", questions, [(c.text, len(c.token_ids)) for c in completions], "tiny")
    rows = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["u1", "u2"]
    for row, completion in zip(rows, completions, strict=True):
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["choices"] == [{"index": 0, "turns": [{"content": completion.text, "token_len": 1}]}]
        assert (row["model_id"], len(row["answer_id"])) == ("tiny", 22)
    assert len({row["answer_id"] for row in rows}) == 2
    answers = load_answers(tmp_path / "tiny.jsonl", questions)
    assert [a.instruction for a in answers] == ["Write.", "Sum up."]
    with pytest.raises(ConfigError, match="--questions is required"):
        load_answers(tmp_path / "tiny.jsonl")
    with pytest.raises(DataError, match="found id 'u2'"):
        load_answers(tmp_path / "tiny.jsonl", questions[:1])


def test_a_question_that_is_asked_twice_has_two_answers(tmp_path):
    twice = [{"instruction": "Say.", "output": text, "generator": "g"} for text in ("one", "two")]
    first, second = load_answers(written(tmp_path / "twice.json", twice))
    assert first.question_id != second.question_id
    assert [q.id for q in load_questions(tmp_path / "twice.json")] == [first.question_id, second.question_id]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("a.txt", [], r"must end in \.json"),
        ("a.json", "{", "must be JSON"),
        ("a.json", '{"instruction": "x"}', "must be a list"),
        ("a.json", "[]", "at least one"),
        ("a.jsonl", "7", "line 1: must be a JSON object"),
        ("a.jsonl", [{"uid": "u"}], "`instruction` must be a text"),
        ("a.jsonl", [{"uid": "u", "prompt": " "}], "`prompt` must be a text"),
        ("a.jsonl", [{"uid": "u", "turns": []}], "`turns` must hold one turn"),
        ("a.jsonl", [ARENA[0], ARENA[0]], "found 'u1' again"),
    ],
)
def test_a_bad_file_of_questions(tmp_path, name, rows, said):
    with pytest.raises(DataError, match=said):
        load_questions(written(tmp_path / name, rows))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ALPACA[0] | {"output": None}], "an answer must be a text"),
        ([{"instruction": "x", "output": "y"}], "`generator` must be a text"),
        ([ALPACA[0], ALPACA[1] | {"generator": "other"}], "answers of one model"),
        ([{"question_id": "u1", "choices": []}], "`choices` must hold a turn"),
        ([{"question_id": "u1", "model_id": "m", "choices": [{"turns": [{"content": "x"}]}]}] * 2, "each question once"),
    ],
)
def test_a_bad_file_of_answers(tmp_path, rows, said):
    questions = load_questions(written(tmp_path / "arena.jsonl", ARENA))
    with pytest.raises(DataError, match=said):
        load_answers(written(tmp_path / "answers.json", rows), questions)


def test_the_command_wants_a_new_file_of_the_formats_kind(tmp_path, capsys):
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 4, "vocab_size": 67, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    (tmp_path / "train.jsonl").write_text("{}")
    tree = f'[run]\ndirectory = "r"\nsteps = 1\n[model]\npath = "{tmp_path}"\n[data]\ntrain = "{tmp_path}/train.jsonl"\n'
    (tmp_path / "run.toml").write_text(tree)
    asked = ["generate", str(tmp_path / "run.toml"), "--questions", "q.json", "--format", "alpaca_eval", "--output"]
    for output in ("answers.jsonl", str(tmp_path / "train.jsonl")):
        assert cli.main([*asked, output]) == 2
        assert "must be a new file that ends in .json," in capsys.readouterr().err
