"""What the records of rollouts cost: seconds of CPU a million tokens before a step is handed on and in the thread that writes,
bytes a token on disk, and what going on from a checkpoint costs runs of several ages; beside the form of before, JSON lines
written where the step waits, which is written out here as the peer. bench_scale.py prints it.

Texts are the `answer` of each row of --texts, split into tokens by a byte-level BPE that is trained on them; without, words
drawn by Zipf's law. Log-probs are float32, of tokens drawn from softmaxes of which three quarters are peaked, as a trained
model's are. No model runs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.load import load_config
from engine.config.options import RolloutRecords
from engine.core.arrays import LogProbs, TokenIds
from engine.core.jsonl import JsonlLedger
from engine.core.segment_cut import cut_back, find_cut
from engine.core.segments import segments_of
from engine.core.types import Completion, Prompt, Rollout, RolloutGroup, Score
from engine.rollouts.ledger import RolloutLedger, ledger_rows
from engine.rollouts.writer import RolloutFolder, RolloutWriter

VOCABULARY = 32_000
CLASSES = 4096  # of the softmaxes that log-probs are of: they set their shape, and a larger one takes longer to draw
SPEC = "configs/scale/llama-3.1-8b-16x24.toml"


def records(texts: str | None, num_steps: int, ages: Sequence[int]) -> dict[str, Any]:
    """Prints and returns what writing costs and what going on from a checkpoint does; `texts`: a file of answers."""
    source = Source(texts)
    steps = [source.step(step, 64, 8, 700) for step in range(num_steps)]
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"writing": writing(Path(folder), steps)}
        found["restart"] = [restart(Path(folder) / f"age{age}", source, age) for age in ages]
    show(found)
    return found


class Source:
    """Rollouts as an engine returns them, with texts."""

    def __init__(self, texts: str | None) -> None:
        self._draw = np.random.default_rng(0)
        self._pieces: list[str] | None = None
        if texts is None:
            self._stream = np.minimum(self._draw.zipf(1.15, 3_000_000) - 1, VOCABULARY - 1).astype(np.int32)
            self._words = [f" {np.base_repr(word, 36).lower()}" for word in range(VOCABULARY)]
        else:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

            answers = [json.loads(line)["answer"] for line in Path(texts).read_text("utf-8").splitlines()]
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
            tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator(answers, trainer)
            encoded = tokenizer.encode_batch([f"{answer}\n\n" for answer in answers])
            self._stream = np.array([token for one in encoded for token in one.ids], np.int32)
            self._words = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
        self._log_probs = self._softmaxes(200_000)

    def _softmaxes(self, count: int) -> np.ndarray:
        """[count] float32 log-probs of drawn tokens."""
        import torch

        torch.manual_seed(0)
        parts = []
        for _ in range(0, count, 1000):
            logits = torch.randn(1000, CLASSES) * torch.exp(torch.randn(1000, 1) * 0.6 + 1)
            peaks = torch.nn.functional.one_hot(torch.randint(CLASSES, (1000,)), CLASSES)
            logits += (torch.rand(1000, 1) < 0.75) * peaks * torch.rand(1000, 1) * 40
            log_probs = torch.log_softmax(logits, -1)
            parts.append(log_probs.gather(1, torch.multinomial(log_probs.exp(), 1))[:, 0])
        return np.asarray(torch.cat(parts).numpy())

    def step(self, step: int, prompts: int, samples: int, tokens: int) -> list[RolloutGroup]:
        """The groups of a step."""
        groups = []
        for place in range(prompts):
            rollouts = []
            for sample in range(samples):
                length = int(np.clip(self._draw.lognormal(np.log(tokens) - 0.18, 0.6), 1, 4 * tokens))
                begin = int(self._draw.integers(0, len(self._stream) - length))
                ids = TokenIds.copied(self._stream[begin : begin + length])
                log_probs = LogProbs.copied(self._log_probs[self._draw.integers(0, len(self._log_probs), length)])
                text = "".join(self._words[token] for token in ids)
                seed = int(self._draw.integers(0, 2**62))
                made = Completion(f"{place:016x}", sample, seed, step, ids, log_probs, text, "stop")
                rollouts.append(Rollout(made, Score(float(sample % 2), "ok")))
            groups.append(RolloutGroup(Prompt(f"{place:016x}", TokenIds.of([1, 2, 3]), "", "", "", ""), step, tuple(rollouts)))
        return groups


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of this thread's CPU, and of the whole process's."""
    own, all_threads = time.thread_time(), time.process_time()
    action()
    return time.thread_time() - own, time.process_time() - all_threads


def writing(folder: Path, steps: Sequence[Sequence[RolloutGroup]]) -> dict[str, Any]:
    """CPU a million tokens and bytes a token of both forms, from the same rollouts."""
    num_tokens = sum(len(r.completion.token_ids) for groups in steps for group in groups for r in group.rollouts)
    ledger = JsonlLedger(folder / "before.jsonl")

    def before() -> None:
        for groups in steps:
            ledger.append(row for group in groups for row in ledger_rows(group))

    RolloutWriter(RolloutFolder(folder / "warm", RolloutRecords())).append(0, steps[0][:1])  # loads its libraries
    writer = RolloutWriter(RolloutFolder(folder / "rollouts", RolloutRecords()))

    def hand_over() -> None:
        for step, groups in enumerate(steps):
            writer.append(step, groups)

    was, _ = timed(before)
    now, _ = timed(hand_over)
    writer.settle()
    again = RolloutFolder(folder / "thread", RolloutRecords())

    def write() -> None:
        for step, groups in enumerate(steps):
            again.append(step, groups)

    in_thread, with_others = timed(write)
    again.close()
    writer.close()
    packed = folder / "packed"
    parts = RolloutFolder(packed, RolloutRecords())
    parts._segments._segment_bytes = 1  # every step's rows are packed, as those of full segments are
    for step, groups in enumerate(steps):
        parts.append(step, groups)
    parts.append(len(steps), steps[0])
    parts.close()
    full = [segment for segment in segments_of(packed) if segment.is_packed]
    rows = sum(segment.rows.stat().st_size for segment in full)
    columns = sum(segment.columns.stat().st_size for segment in full if segment.columns is not None)
    plain = sum(path.stat().st_size for path in (folder / "rollouts").glob("*.jsonl"))
    read = RolloutLedger(folder / "rollouts")
    assert all(
        [row.rollout() for row in read.rows(step)] == [rollout for group in groups for rollout in group.rollouts]
        for step, groups in enumerate(steps)
    ), "what is read back is what was written, bit for bit"
    million = 1e6 / num_tokens
    return {
        "tokens": num_tokens,
        "steps": len(steps),
        "before_cpu_seconds_per_million": was * million,
        "handed_over_cpu_seconds_per_million": now * million,
        "thread_cpu_seconds_per_million": in_thread * million,
        "thread_and_libraries_cpu_seconds_per_million": with_others * million,
        "before_bytes_per_token": (folder / "before.jsonl").stat().st_size / num_tokens,
        "rows_bytes_per_token": plain / num_tokens,
        "packed_rows_bytes_per_token": rows / num_tokens,
        "columns_bytes_per_token": columns / num_tokens,
    }


def restart(folder: Path, source: Source, age: int) -> dict[str, Any]:
    """What it costs to go on from a checkpoint that a run of so many steps wrote, two steps before it was lost: its own segment
    of five steps, and those of before, which are links to one."""
    steps = [source.step(step, 8, 4, 200) for step in range(age - 5, age + 2)]
    folder.mkdir()
    store = RolloutFolder(folder / "one", RolloutRecords())
    store._segments._segment_bytes = 1
    for step in range(2):
        store.append(step, steps[0])
    store.close()
    place = folder / "rollouts"
    place.mkdir()
    for first in range(0, age - 40, 40):
        os.link(folder / "one" / "00000000-00000000.jsonl.zst", place / f"{first:08d}-{first + 39:08d}.jsonl.zst")
        os.link(folder / "one" / "00000000.arrows", place / f"{first:08d}.arrows")
    store = RolloutFolder(place, RolloutRecords())
    for step, groups in zip(range(age - 5, age), steps, strict=False):
        store.append(step, groups)
    known = store.sync()
    for step, groups in zip(range(age, age + 2), steps[5:], strict=True):
        store.append(step, groups)
    store.close()
    best: dict[str, Any] = {"steps": age, "segments": len(segments_of(place))}
    for _ in range(7):
        copy = folder / "copy"
        shutil.copytree(place, copy, copy_function=os.link)
        for path in copy.glob(f"{known['segment']:08d}*" if known else ""):  # a link's file would be cut too
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)

        def go_on(copy: Path = copy) -> None:
            cut_back(copy, find_cut(copy, age, known))
            RolloutFolder(copy, RolloutRecords()).close()

        read, written = moved()
        busy, _ = timed(go_on)
        again = moved()
        best["cpu_milliseconds"] = min(best.get("cpu_milliseconds", 1e9), busy * 1000)
        best["bytes_read"], best["bytes_written"] = again[0] - read, again[1] - written
        shutil.rmtree(copy)
    return best


def moved() -> tuple[int, int]:
    """Bytes that this process has read and written through any call."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text("utf-8").splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def show(found: dict[str, Any]) -> None:
    """Tables, and what a day of a large run writes."""
    w = found["writing"]
    print(f"{w['tokens']:,} tokens of {w['steps']} steps; seconds of CPU a million tokens:")
    print(f"  JSON lines where the step waits, as before  {w['before_cpu_seconds_per_million']:.3f}")
    print(f"  handed over to the thread                   {w['handed_over_cpu_seconds_per_million']:.4f}")
    print(f"  the thread itself                           {w['thread_cpu_seconds_per_million']:.3f}")
    total = w["packed_rows_bytes_per_token"] + w["columns_bytes_per_token"]
    print("bytes a token:")
    print(f"  JSON lines, as before                       {w['before_bytes_per_token']:.2f}")
    print(f"  rows of the newest segment                  {w['rows_bytes_per_token']:.2f}")
    print(f"  rows of a full one, packed                  {w['packed_rows_bytes_per_token']:.2f}")
    print(f"  tokens and log-probs                        {w['columns_bytes_per_token']:.2f}")
    print(f"  in all                                      {total:.2f}, {total / w['before_bytes_per_token']:.3f} of before")
    config = load_config(SPEC)
    a_step = config.data.prompts_per_step * config.algorithm.samples_per_prompt * 700
    for name, size in (("before", w["before_bytes_per_token"]), ("now", total)):
        day = 20_500 * a_step * size / 1e9
        print(f"24 h of {SPEC} (20,500 steps of {a_step:,} tokens), {name}: {day:.0f} GB")
    print("steps | segments | to go on: ms of CPU | bytes read | written")
    for row in found["restart"]:
        cost = (f"{row['cpu_milliseconds']:.1f}", f"{row['bytes_read']:,}", f"{row['bytes_written']:,}")
        print(" | ".join([f"{row['steps']:,}", str(row["segments"]), *cost]))
