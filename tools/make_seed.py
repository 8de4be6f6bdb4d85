"""Makes what the quickstart starts from where nothing can be downloaded: word problems with worked solutions in the
NuminaMath schema, a byte-level BPE tokenizer trained on them, and a randomly initialised Llama of a million or two
parameters as an ordinary Hugging Face checkpoint. It trains no model (`semion sft` does) and judges no answer.

Most of the supervised solutions show every step, the others only state the result. Both are right, but a small model
computes much better on paper than in its head; that, and sums it only half knows, leave reinforcement learning room.
Equal seeds and sizes give equal files, byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from engine.data.templates import FIGURE4, encode_prompt

NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "shells", "stars")
LARGEST = 20  # of any result: a small model learns that many sums in a minute, not more
HASTY_SHARE = 0.4  # of the supervised solutions that leave the steps out
OPERATORS: dict[str, Callable[[Fraction, int], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}

ENDING = "The final answer is $\\boxed{{{answer}}}$. I hope it is correct."

BEGIN, END_OF_TURN, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|pad|>"
SPECIAL_TOKENS = [BEGIN, END_OF_TURN, PAD, "<|start_header_id|>", "<|end_header_id|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
VOCABULARY_SIZE = 640
TOKENIZER_PROBLEMS = 3000  # a sample is enough: there are few phrases


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem: its text, and its solution as steps `result = left operator right`."""

    text: str  # {name}, {other}, {things} and the letters of `ranges` are filled in
    ranges: dict[str, tuple[int, int]]  # both ends included
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its worked solution."""

    text: str
    lines: tuple[str, ...]  # one step each, such as "6 * 3 = 18"
    answer: int


FEW, NUMBER, MANY = (2, 5), (2, 9), (8, 20)
NOW = " How many {things} does {name} have now?"
KINDS = (
    Kind("{name} has {a} {things} and finds {b} more." + NOW, {"a": MANY, "b": NUMBER}, ("p = a + b",)),
    Kind("{name} has {a} {things} and gives away {b}." + NOW, {"a": MANY, "b": NUMBER}, ("p = a - b",)),
    Kind("{name} has {a} bags with {b} {things} each." + NOW, {"a": FEW, "b": NUMBER}, ("p = a * b",)),
    Kind(
        "{name} has {a} {things}, finds {b} more and gives away {c}." + NOW,
        {"a": NUMBER, "b": NUMBER, "c": NUMBER},
        ("p = a + b", "q = p - c"),
    ),
    Kind(
        "{name} has {a} bags with {b} {things} each and finds {c} more." + NOW,
        {"a": FEW, "b": NUMBER, "c": NUMBER},
        ("p = a * b", "q = p + c"),
    ),
    Kind(
        "{name} has {a} bags with {b} {things} each and gives away {c}." + NOW,
        {"a": FEW, "b": NUMBER, "c": NUMBER},
        ("p = a * b", "q = p - c"),
    ),
    Kind(
        "{name} has {a} {things} and {other} has {b} times as many. How many do they have together?",
        {"a": NUMBER, "b": FEW},
        ("p = a * b", "q = p + a"),
    ),
    Kind(
        "{name} has {a} bags with {b} {things} each, finds {c} more and gives away {d}." + NOW,
        {"a": FEW, "b": NUMBER, "c": NUMBER, "d": NUMBER},
        ("p = a * b", "q = p + c", "r = q - d"),
    ),
    Kind(
        "{name} has {a} bags with {b} {things} each and {c} boxes with {d} {things} each." + NOW,
        {"a": FEW, "b": NUMBER, "c": FEW, "d": NUMBER},
        ("p = a * b", "q = c * d", "r = p + q"),
    ),
    Kind(
        "{name} has {a} {things}, finds {b} more, then gives away {c} and finds {d}." + NOW,
        {"a": NUMBER, "b": NUMBER, "c": NUMBER, "d": NUMBER},
        ("p = a + b", "q = p - c", "r = q + d"),
    ),
    Kind(
        "{name} has {a} {things}, finds {b} more and shares them among {c} friends. How many does each friend get?",
        {"a": NUMBER, "b": NUMBER, "c": FEW},
        ("p = a + b", "q = p / c"),
    ),
    Kind(
        "{name} has {a} bags with {b} {things} each, finds {c} more and shares them among {d} friends. "
        "How many does each friend get?",
        {"a": FEW, "b": NUMBER, "c": NUMBER, "d": FEW},
        ("p = a * b", "q = p + c", "r = q / d"),
    ),
)


def solve(steps: tuple[str, ...], numbers: dict[str, int]) -> tuple[tuple[str, ...], int] | None:
    """The steps written out with numbers, such as ("6 * 3 = 18", "18 - 5 = 13"), and the last result.

    None where a result is not a whole number from 1 to LARGEST.
    """
    known, lines = dict(numbers), []
    for step in steps:
        result, _, left, sign, right = step.split()
        value = OPERATORS[sign](Fraction(known[left]), known[right])
        if value.denominator != 1 or not 1 <= value <= LARGEST:
            return None
        known[result] = int(value)
        lines.append(f"{known[left]} {sign} {known[right]} = {value}")
    return tuple(lines), known[result]


def draw_problems(generator: random.Random) -> Iterator[Problem]:
    """Endless problems, every kind equally likely; they repeat, for the short kinds have only some thousand texts."""
    while True:
        kind = generator.choice(KINDS)
        solved = None
        while solved is None:
            numbers = {letter: generator.randint(*ends) for letter, ends in kind.ranges.items()}
            solved = solve(kind.steps, numbers)
        name, other = generator.sample(NAMES, 2)
        text = kind.text.format(name=name, other=other, things=generator.choice(THINGS), **numbers)
        yield Problem(text, *solved)


def split_problems(problems: Iterator[Problem], sizes: dict[str, int]) -> dict[str, list[Problem]]:
    """Problems for each split: no text stands in two splits, and only `sft` holds some twice."""
    taken: set[str] = set()
    splits: dict[str, list[Problem]] = {}
    for split in ("held_out", "rl"):
        splits[split] = []
        while len(splits[split]) < sizes[split]:
            problem = next(problems)
            if problem.text not in taken:
                taken.add(problem.text)
                splits[split].append(problem)
    fresh = (problem for problem in problems if problem.text not in taken)
    splits["sft"] = list(itertools.islice(fresh, sizes["sft"]))
    return splits


def make_rows(split: str, problems: list[Problem], hasty: random.Random | None = None) -> list[dict[str, str]]:
    """Rows of the NuminaMath schema; with `hasty`, it draws a share HASTY_SHARE whose solutions leave the steps out."""
    rows = []
    for index, problem in enumerate(problems):
        lines = () if hasty is not None and hasty.random() < HASTY_SHARE else problem.lines
        row = {
            "problem": problem.text,
            "solution": "\n".join([*lines, ENDING.format(answer=problem.answer)]),
            "answer": str(problem.answer),
            "source": "word_problems",
            "id": f"{split}-{index:06d}",
        }
        rows.append(row)
    return rows


def train_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges cross spaces, but neither digits, line ends nor the ends of sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n+"), "isolated"),
            pre_tokenizers.Split(Regex(r"[.?:]"), "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        text
        for row in rows[:TOKENIZER_PROBLEMS]
        for text in ("user", "assistant", "\n\n", FIGURE4.replace("{problem}", row["problem"]), row["solution"])
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised float32 Llama of 1.07 million parameters, its vocabulary that of `tokenizer`.

    The wide initialisation is on purpose: at the usual 0.02 so small a model takes twice the steps to learn to copy.
    """
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.08,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def make_seed(folder: Path, seed: int, sizes: dict[str, int]) -> dict[str, int | float]:
    """Writes a JSONL file for each split of `sizes` (sft, rl, held_out) and `random_model/` into `folder`.

    Returns what it made: rows a split, vocabulary size, parameters, mean and largest tokens of prompts and completions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hasty = random.Random(f"hasty {seed}")
    splits = {
        split: make_rows(split, problems, hasty if split == "sft" else None)
        for split, problems in split_problems(draw_problems(random.Random(f"problems {seed}")), sizes).items()
    }
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(splits["sft"])
    model = random_model(tokenizer, seed)
    disable_progress_bar()
    tokenizer.save_pretrained(folder / "random_model")
    model.save_pretrained(folder / "random_model")
    sample = splits["sft"][:500]
    prompts = [len(encode_prompt(tokenizer, row["problem"], "figure4")) for row in sample]
    completions = [len(tokenizer.encode(row["solution"])) + 1 for row in sample]
    return {
        **{f"{split}_problems": len(rows) for split, rows in splits.items()},
        "vocabulary": len(tokenizer),
        "parameters": model.num_parameters(),
        "prompt_tokens_mean": round(sum(prompts) / len(sample), 1),
        "prompt_tokens_max": max(prompts),
        "completion_tokens_mean": round(sum(completions) / len(sample), 1),
        "completion_tokens_max": max(completions),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Makes word problems, a tokenizer and a random Llama to start from.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-problems", type=int, default=25600, help="problems with solutions for `semion sft`")
    parser.add_argument("--rl-problems", type=int, default=4096, help="problems for `semion train`")
    parser.add_argument("--held-out-problems", type=int, default=512, help="problems to measure accuracy with")
    parser.add_argument("--json", type=Path, help="file to write the printed figures to")
    options = parser.parse_args(arguments)
    sizes = {"sft": options.sft_problems, "rl": options.rl_problems, "held_out": options.held_out_problems}
    if min(sizes.values()) < 1:
        parser.error(f"--sft-problems, --rl-problems, --held-out-problems must be positive; found {sizes}: raise them")
    started = time.perf_counter()
    made = make_seed(options.output, options.seed, sizes)
    made["seconds"] = round(time.perf_counter() - started, 1)
    for name, value in made.items():
        print(f"{name:24} {value:>10,}")
    if options.json is not None:
        options.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
