"""Covers engine/data: rows and each sentence about a bad one, templates, prompts, their order, supervised sequences."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.core.errors import ConfigError, DataError
from engine.data.prompts import PromptOrder, PromptSet
from engine.data.rows import Row, last_boxed, load_rows
from engine.data.supervised import supervised_sequence
from engine.data.templates import FIGURE4, encode_prompt, load_tokenizer
from engine.rewards.math.worker import judge
from tests.rollouts import make_prompt
from tests.shared_data import SHARED_DATA, needs_shared_data


def jsonl(tmp_path: Path, *lines: str | bytes | dict[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    written = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in written) + b"\n")
    return path


def row(problem: str, **fields: Any) -> Row:
    return Row(**{"problem": problem, "answer": "1", "solution": "", "source": "", "id": ""} | fields)


GOOD = {"problem": "1 + 1?", "answer": "2"}


def test_rows_take_answer_or_the_last_box_and_keep_order(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        GOOD | {"source": "amc", "id": 7, "level": 3},
        "",
        {"problem": "p", "solution": r"\boxed{1} so \boxed{\frac{1}{2}}.", "answer": None},
        {"problem": "q", "answer": 27.0},
        {"problem": "r", "answer": 0.5, "solution": r"\boxed{1/2}"},
    )
    assert load_rows(path) == [
        Row("1 + 1?", "2", "", "amc", "7"),
        Row("p", r"\frac{1}{2}", r"\boxed{1} so \boxed{\frac{1}{2}}.", "", ""),
        Row("q", "27", "", "", ""),
        Row("r", "0.5", r"\boxed{1/2}", "", ""),
    ]


def test_rows_of_gsm8k_need_no_conversion(tmp_path: Path) -> None:
    worked = "48/2 = <<48/2=24>>24 clips. #### is not it.\n#### 1,072"
    path = jsonl(tmp_path, {"question": "How many?", "answer": worked, "idx": 0}, GOOD | {"question": "other"})
    assert load_rows(path) == [Row("How many?", "1072", worked, "", ""), Row("1 + 1?", "2", "", "", "")]
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["How many?"], "answer": [worked]}), table)
    assert load_rows(table) == [Row("How many?", "1072", worked, "", "")]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("0.00001", "0.00001"),
        ("4e-5", "0.00004"),
        ("1e-05", "0.00001"),
        ("1.5e10", "15000000000"),
        ("1e23", "100000000000000000000000"),
        ("-2.50", "-2.5"),
        ("3.0", "3"),
        ("-0.0", "0"),
        ("12345678901234567890", "12345678901234567890"),
        ("0.1", "0.1"),
    ],
)
def test_a_number_as_an_answer_is_written_out_and_equals_itself(tmp_path: Path, written: str, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "p", "answer": {written}}}\n')
    assert load_rows(path)[0].answer == text
    for answer in (written, text):
        assert judge(text, rf"\boxed{{{answer}}}", True) == (1.0, "ok")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("no mark", "no mark"),
        (27, "27"),
        ("3/4", "3/4"),
        ("worked #### 5", "worked #### 5"),
        ("worked\n#### 5 apples", "5 apples"),
        ("#### 1,072", "1072"),
    ],
)
def test_a_question_with_a_plain_answer_is_a_problem_with_it(tmp_path: Path, answer: Any, gold: str) -> None:
    (read,) = load_rows(jsonl(tmp_path, {"question": "How many?", "answer": answer}))
    assert (read.problem, read.answer, read.solution) == ("How many?", gold, str(answer))


@pytest.mark.parametrize(
    ("answer", "words"), [("worked\n####  ", "must end in #### and the result"), (None, "a row needs `answer` or `solution`")]
)
def test_a_question_without_an_answer_is_a_sentence(tmp_path: Path, answer: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{words}"):
        load_rows(jsonl(tmp_path, {"question": "How many?", "answer": answer}))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{3 \boxed{57}}", "57"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"{ \boxed {5} and \boxed{6", "5"),
        (r"} \boxed{x^{2}}", "x^{2}"),
        (r"\boxed{", None),
        ("5", None),
        (r"\boxed{" * 100_000, None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"problem": "\xff"}', ["must be UTF-8", r"b'\xff'"]),
        ('{"problem": "p"', ["must be one JSON object", "mend"]),
        ("[" * 100_000, ["must be one JSON object"]),
        ('["problem"]', ["must be a JSON object", "['problem']"]),
        ({"answer": "2"}, ["`problem`", "not empty"]),
        ({"problem": " ", "answer": "2"}, ["`problem`", "not empty"]),
        ({"problem": 5, "answer": "2"}, ["`problem` must be a text", "found 5"]),
        ({"problem": "p", "answer": ["2"]}, ["`answer` must be a text or a finite number", "['2']"]),
        ({"problem": "p", "answer": True}, ["`answer`", "True"]),
        ('{"problem": "p", "answer": NaN}', ["`answer`", "nan"]),
        ({"problem": "p", "solution": 5}, ["`solution` must be a text", "found 5"]),
        ({"problem": "p", "answer": "2", "source": {}}, ["`source`"]),
        ({"problem": "\ud800", "answer": "2"}, ["`problem` must be whole characters"]),
        ({"problem": "p"}, ["needs `answer` or `solution`"]),
        ({"problem": "p", "answer": ""}, ["needs `answer` or `solution`"]),
        ({"problem": "p", "solution": r"so \boxed{5"}, ["must close the braces", "5"]),
        ({"problem": "p", "solution": "so 5"}, ["in \\boxed{...}", "so 5"]),
        ({"problem": "p", "solution": r"so \boxed{ }"}, ["in \\boxed{...}"]),
    ],
)
def test_a_bad_line_is_named_with_its_rule_and_value(
    tmp_path: Path, line: str | bytes | dict[str, Any], words: list[str]
) -> None:
    path = jsonl(tmp_path, GOOD, "", line)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ")
    assert all(word in message for word in words) and len(message) < 400 + len(str(path)), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.txt", b"a", "must end in .jsonl, .json, .csv, .jsonl.gz, .json.gz, .csv.gz, .parquet; found '.txt'"),
        ("rows.jsonl", None, "must exist"),
        ("rows.jsonl", b"", "at least one row"),
        ("rows.jsonl", b"\n\n", "at least one row"),
        ("rows.parquet", b"PAR1 but no more", "readable parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_parquet_gives_the_rows_of_jsonl(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        GOOD | {"solution": None, "extra": [1]},
        {"problem": "p", "solution": r"\boxed{5}", "answer": None},
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert load_rows(path) == load_rows(jsonl(tmp_path, *records))
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["p", "q"], "answer": ["1", None]}), path)
    with pytest.raises(DataError, match="row 2: a row needs"):
        load_rows(path)


JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # its start is slow
@given(st.dictionaries(st.sampled_from(["problem", "answer", "solution", "source", "id"]), JSON_VALUES))
def test_any_object_is_a_row_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]) -> None:
    path = jsonl(tmp_path_factory.mktemp("any"), record)
    try:
        (loaded,) = load_rows(path)
        good = bool(loaded.problem and loaded.answer)
    except DataError as error:
        good = f"{path}, line 1: " in str(error)
    assert good


@needs_shared_data("math500.jsonl")
def test_math500_loads() -> None:
    rows = load_rows(SHARED_DATA / "math500.jsonl")
    assert len(rows) == 500
    assert len(load_rows(SHARED_DATA / "amc23.jsonl")) == 40
    boxes = [last_boxed(r.solution) for r in rows]
    assert sum(box == r.answer for box, r in zip(boxes, rows, strict=True)) > 480


@needs_shared_data("gsm8k_test.jsonl")
def test_gsm8k_loads_in_its_own_form() -> None:
    rows = load_rows(SHARED_DATA / "gsm8k_test.jsonl")
    assert len(rows) == 1319
    assert all(float(r.answer) == int(float(r.answer)) for r in rows), "every result is a whole number"
    assert rows[0].answer == "18" and rows[0].problem.startswith("Janet")


def test_figure4_in_the_chat_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = encode_prompt(tiny_tokenizer, "What is {x} + %s \\1?", "figure4")
    assert all(type(token_id) is int for token_id in token_ids)
    assert tiny_tokenizer.decode(token_ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "Given the following problem, reason and give a final answer to the problem. Problem: What is {x} + %s \\1?\n"
        "Your response should end with 'The final answer is $\\boxed{[answer]}$. I hope it is correct.' where [answer] "
        "is the response to the problem.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert encode_prompt(tiny_tokenizer, "p", FIGURE4) == encode_prompt(tiny_tokenizer, "p", "figure4")


def test_a_template_that_prints_the_date_does_not_depend_on_the_day(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    dated = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        chat_template="{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}",
    )
    assert dated.decode(encode_prompt(dated, "p", "{problem}")) == "26 Jul 2024"


def test_the_class_that_a_folder_names_gives_the_tokens_that_the_library_would_choose(model_folder: Path) -> None:
    """In the spellings of transformers 4 and 5, whatever the model."""
    file = model_folder / "tokenizer_config.json"
    for name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
        ours, theirs = load_tokenizer(model_folder), AutoTokenizer.from_pretrained(str(model_folder))
        assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
        assert ours.special_tokens_map == theirs.special_tokens_map and len(ours) == len(theirs)
        for text in ("So 2 + 2 = 4,  then\n\u00e9\u4e2d\U0001f600", "<|eot_id|> x<|begin_of_text|>", " "):
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
            assert encode_prompt(ours, text, "{problem}") == encode_prompt(theirs, text, "{problem}")


def test_load_tokenizer_round_trip_and_its_errors(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    assert encode_prompt(loaded, "p?", "figure4") == encode_prompt(tiny_tokenizer, "p?", "figure4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer_config.json").write_text("{")
    for name in ("empty", "torn", "absent"):
        with pytest.raises(ConfigError, match=str(tmp_path / name)):
            load_tokenizer(tmp_path / name)
    loaded.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        encode_prompt(loaded, "p?", "figure4")


def test_prompts_drop_and_count_what_is_long_or_seen(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("a"), row("b", id="own", solution="s", source="amc"), row("a", answer="9"), row("c" * 500)]
    made = PromptSet.from_rows(rows, tiny_tokenizer, "{problem}", max_prompt_tokens=200)
    assert (made.num_dropped, made.num_duplicates) == (1, 1)
    assert [prompt.id for prompt in made.prompts] == ["ca978112ca1bbdca", "own"]  # SHA-256 of "a"
    assert made.prompts[1] == make_prompt("own", encode_prompt(tiny_tokenizer, "b", "{problem}"), "b", "1", "s", "amc")
    with pytest.raises(DataError, match="'x' for 'a' and 'b'"):
        PromptSet.from_rows([row("a", id="x"), row("b", id="x")], tiny_tokenizer, "{problem}", 200)
    with pytest.raises(DataError, match="found 1 longer than 10, 0 that came before and no other"):
        PromptSet.from_rows([row("a")], tiny_tokenizer, "{problem}", 10)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**63), st.integers(1, 70))
def test_order_is_one_permutation_an_epoch_however_cut(num_prompts: int, seed: int, prompts_per_step: int) -> None:
    order = PromptOrder(num_prompts, seed)
    num_steps = -(-3 * num_prompts // prompts_per_step)
    steps = {step: order.at(step, prompts_per_step) for step in reversed(range(num_steps))}  # any order of asking
    stream = [index for step in range(num_steps) for index in steps[step]]
    for epoch in range(3):
        assert sorted(stream[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))
    if num_prompts % prompts_per_step == 0:  # no step crosses an epoch: the permutations as they are
        assert stream == PromptOrder(num_prompts, seed).at(0, num_steps * prompts_per_step)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**63), st.integers(1, 40), st.integers(0, 1000))
def test_no_step_holds_a_prompt_twice_while_others_wait(num_prompts: int, seed: int, wanted: int, step: int) -> None:
    counts = Counter(PromptOrder(num_prompts, seed).at(step, wanted))
    assert {counts[prompt] for prompt in range(num_prompts)} <= {wanted // num_prompts, -(-wanted // num_prompts)}


def test_a_step_that_crosses_an_epoch_puts_off_only_what_it_has_already() -> None:
    """10 prompts, 4 a step: steps 2 and 7 cross an epoch; all others are the permutations', place by place."""
    order = PromptOrder(10, 3)
    plain = [index for epoch in range(4) for index in PromptOrder(10, 3).at(epoch, 10)]
    found = [index for step in range(10) for index in order.at(step, 4)]
    tail = plain[8:10]
    head = [index for index in plain[10:20] if index not in tail][:2]
    assert found[8:12] == [*tail, *head]
    assert found[10:20] == [*head, *(index for index in plain[10:20] if index not in head)]
    assert found[:10] == plain[:10] and found[20:30] == plain[20:30] and sorted(found[30:40]) == list(range(10))


def test_order_differs_by_seed_and_epoch_and_never_changes() -> None:
    epochs = [PromptOrder(20, 0).at(epoch, 20) for epoch in range(2)]
    assert epochs[0] != epochs[1] and epochs[0] != PromptOrder(20, 1).at(0, 20)
    assert PromptOrder(8, 0).at(0, 8) == PINNED_ORDER  # a change here changes every run


PINNED_ORDER = [1, 7, 3, 2, 0, 5, 6, 4]


def test_supervised_sequence_ends_in_the_end_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = make_prompt("i", (1, 2), "p", "4", "so $4$", "")
    sequence = supervised_sequence(prompt, tiny_tokenizer)
    assert list(sequence.prompt_ids) == [1, 2] and not sequence.rollout_log_probs
    assert tiny_tokenizer.decode(sequence.completion_ids) == "so $4$<|eot_id|>"
    assert sequence.completion_ids[-1] == tiny_tokenizer.eos_token_id
    with pytest.raises(DataError, match="prompt i: `solution`"):
        supervised_sequence(make_prompt("i", (1,), "p", "4", "", ""), tiny_tokenizer)
    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="end token"):
        supervised_sequence(prompt, endless)
