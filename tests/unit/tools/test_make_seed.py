"""The seed problems, tokenizer and random model of `tools/make_seed.py`: right, disjoint, repeatable and loadable. How
well a model trained on them does is measured by the quickstart, not here.
"""

import hashlib
import importlib.util
import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from engine.data.rows import last_boxed, load_rows
from engine.data.templates import FIGURE4, encode_prompt

SIZES = ["--sft-problems", "1500", "--rl-problems", "300", "--held-out-problems", "200"]
SPLITS = ("sft", "rl", "held_out")
LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def load_tool() -> ModuleType:
    file = Path(__file__).parents[3] / "tools" / "make_seed.py"
    spec = importlib.util.spec_from_file_location("make_seed", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_seed"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("seed")
    tool.main(["--output", str(root / "made"), "--seed", "3", *SIZES, "--json", str(root / "made.json")])
    return root / "made"


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()] for split in SPLITS
    }


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "random_model")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_equal_seeds_make_equal_files_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    for seed in ("3", "4"):
        tool.main(["--output", str(tmp_path / seed), "--seed", seed, *SIZES])
    assert digests(tmp_path / "3") == digests(folder)
    other = digests(tmp_path / "4")
    for file in (*(f"{split}.jsonl" for split in SPLITS), "random_model/model.safetensors"):
        assert other[file] != digests(folder)[file], file


def test_no_problem_stands_in_two_splits(rows: dict[str, list[dict[str, str]]]) -> None:
    texts = {split: {row["problem"] for row in rows[split]} for split in SPLITS}
    assert not texts["sft"] & texts["rl"] and not texts["sft"] & texts["held_out"] and not texts["rl"] & texts["held_out"]
    assert {split: len(rows[split]) for split in SPLITS} == {"sft": 1500, "rl": 300, "held_out": 200}
    assert len(texts["rl"]) == 300 and len(texts["held_out"]) == 200
    ids = [row["id"] for split in SPLITS for row in rows[split]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_is_right_and_the_last_one_is_boxed(rows: dict[str, list[dict[str, str]]], split: str) -> None:
    for row in rows[split]:
        *work, ending = row["solution"].split("\n")
        assert ending == f"The final answer is $\\boxed{{{row['answer']}}}$. I hope it is correct.", row
        known = set(re.findall(r"\d+", row["problem"]))
        for line in work:
            match = LINE.fullmatch(line)
            assert match is not None, row
            left, sign, right, result = match.groups()
            x, y = Fraction(left), Fraction(right)
            exact = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign]
            assert exact == int(result), row
            assert {left, right} <= known, (line, row)  # nothing appears from nowhere
            known.add(result)
        if work:
            assert work[-1].endswith(f" = {row['answer']}"), row


def meaning(problem: str) -> Fraction:
    """The answer read from the words alone, phrase by phrase, apart from the tool's table of kinds."""
    problem = re.sub(r"and (\d+) boxes with (\d+)", lambda found: f"finds {int(found[1]) * int(found[2])}", problem)
    problem = re.sub(r"has (\d+) times as many", r"times \1", problem)
    phrases = re.findall(r"(has|bags with|finds|gives away|among|times) (\d+)", problem)
    assert len(phrases) == len(re.findall(r"\d+", problem)), problem
    total = Fraction(0)
    for phrase, number in ((phrase, int(digits)) for phrase, digits in phrases):
        total = {
            "has": Fraction(number),
            "finds": total + number,
            "gives away": total - number,
            "bags with": total * number,
            "among": total / number,
            "times": total + total * number,
        }[phrase]
    return total


def test_answers_follow_from_the_words(rows: dict[str, list[dict[str, str]]]) -> None:
    for split in SPLITS:
        for row in rows[split]:
            assert meaning(row["problem"]) == int(row["answer"]), row


def test_kinds_and_steps_are_varied(rows: dict[str, list[dict[str, str]]]) -> None:
    shapes = {re.sub(r"\d+|\b(?:" + "|".join((*tool.NAMES, *tool.THINGS)) + r")\b", "_", row["problem"]) for row in rows["rl"]}
    assert len(shapes) == len(tool.KINDS) >= 8
    assert {row["solution"].count("\n") for row in rows["rl"]} == {1, 2, 3}


def test_only_supervised_solutions_leave_the_steps_out(rows: dict[str, list[dict[str, str]]]) -> None:
    hasty = {split: sum("\n" not in row["solution"] for row in rows[split]) for split in SPLITS}
    assert hasty["rl"] == hasty["held_out"] == 0
    assert abs(hasty["sft"] / 1500 - tool.HASTY_SHARE) < 0.065  # five standard errors


def test_the_engine_reads_the_rows(folder: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    for split in SPLITS:
        read = load_rows(folder / f"{split}.jsonl")
        assert [row.problem for row in read] == [row["problem"] for row in rows[split]]
        assert all(row.answer == last_boxed(row.solution) for row in read)


def test_the_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[dict[str, str]]]) -> None:
    texts = [FIGURE4.replace("{problem}", row["problem"]) for row in rows["held_out"]]
    texts += [row["solution"] for split in SPLITS for row in rows[split][:200]]
    for text in [*texts, "Größe 3½ µ 数学 🙂\t\r\n\n  x", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1024")] == ["1", "0", "2", "4"]
    mixed = [text for text in tokenizer.get_vocab() if re.search(r"\d", text) and len(text) > 1]
    assert mixed == []
    assert len(tokenizer) == tool.VOCABULARY_SIZE


def test_prompts_and_completions_are_short(tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[dict[str, str]]]) -> None:
    # What keeps the quickstart within its minutes on two cores.
    for row in rows["held_out"]:
        assert len(encode_prompt(tokenizer, row["problem"], "figure4")) <= 32
        assert len(tokenizer.encode(row["solution"])) + 1 <= 40


def test_the_chat_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "3 + 4 = ?"}]
    asked = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n3 + 4 = ?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == asked
    messages.append({"role": "assistant", "content": "7"})
    answered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert answered == asked + "7<|eot_id|>"
    # A prompt and a completion tokenized apart are what they are together.
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(answered) == [*prompt, *tokenizer.encode("7"), tokenizer.eos_token_id]


def test_transformers_loads_the_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "random_model")
    assert model.config.model_type == "llama" and model.config.vocab_size == len(tokenizer)
    assert 1_000_000 <= model.num_parameters() <= 5_000_000
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_figures_are_written(folder: Path) -> None:
    made = json.loads((folder.parent / "made.json").read_text("utf-8"))
    assert (made["sft_problems"], made["rl_problems"], made["held_out_problems"]) == (1500, 300, 200)
    assert made["vocabulary"] == tool.VOCABULARY_SIZE


@pytest.mark.parametrize("option", ["--sft-problems", "--rl-problems", "--held-out-problems"])
def test_an_empty_split_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--output", str(tmp_path / "made"), option, "0"])
    assert stopped.value.code == 2 and option in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
