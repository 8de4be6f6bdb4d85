"""Data: files that are not there or of another kind, rows that cannot be used, prompts that do not fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.unit.first_hour.case import Case, Made, accepted, both, folders, refused, rows, text

GOOD = {"problem": "1+1", "answer": "2", "solution": "It is 2."}
TRAIN = "train.jsonl"


def row(**changes: Any) -> Made:
    """A second row with fields of its own; one that is ... is left out."""
    changed = GOOD | {"problem": "2+2", "answer": "4"} | changes
    return rows(TRAIN, GOOD, {key: value for key, value in changed.items() if value is not ...})


def line(content: str | bytes) -> Made:
    """A second line of this content."""
    data = content if isinstance(content, bytes) else content.encode()
    return text(TRAIN, json.dumps(GOOD).encode() + b"\n" + data + b"\n")


def table(file: str, **columns: list[Any]) -> Made:
    """A parquet file."""
    return lambda folder: pyarrow.parquet.write_table(pyarrow.table(columns), folder / file)


def gz(content: bytes, cut: int = 0) -> Made:
    """train.jsonl.gz, without its last bytes."""

    def made(folder: Path) -> None:
        packed = gzip.compress(content)
        (folder / "train.jsonl.gz").write_bytes(packed[: len(packed) - cut])

    return made


CHECK = "check run.toml "
OTHER = CHECK + "data.train="
LINES = (json.dumps(GOOD) + "\n").encode() * 50
MESSAGES = [{"role": "user", "content": "1+1"}]
CASES: list[Case] = [
    # what the option names
    refused("no file", OTHER + "gone.jsonl", 3, "data.train", "gone.jsonl", "found none"),
    refused("no file to evaluate on", CHECK + "data.held_out=gone.jsonl", 3, "data.held_out", "gone.jsonl"),
    refused("no suite", "eval run.toml --suite gone.jsonl", 3, "--suite", "gone.jsonl"),
    refused(
        "a relative path from elsewhere",
        OTHER + "../nowhere/train.jsonl",
        3,
        "data.train",
        "../nowhere/train.jsonl",
        "relative to the working directory",
    ),
    refused(
        "a home folder in quotes",
        "check run.toml 'data.train=~/train.jsonl'",
        3,
        "data.train",
        "~/train.jsonl",
        "write the whole path",
    ),
    refused("a pattern of files", "check run.toml 'data.train=train-*.parquet'", 3, "data.train", "train-*.parquet"),
    refused("an address", OTHER + "https://host/train.jsonl", 3, "data.train", "https://host/train.jsonl", "download"),
    refused("a bucket", OTHER + "s3://bucket/train.jsonl", 3, "data.train", "s3://bucket/train.jsonl", "download"),
    refused(
        "a dataset of the hub without its sign", OTHER + "openai/gsm8k", 3, "data.train", "openai/gsm8k", "hf://openai/gsm8k"
    ),
    refused(
        "a dataset of the hub that is not in the cache",
        OTHER + "hf://openai/gsm8k:main",
        3,
        "hf://openai/gsm8k:main",
        "HF_HUB_OFFLINE=0",
    ),
    refused("a dataset's address cut short", OTHER + "hf://gsm8k", 3, "hf://gsm8k", "hf://owner/name"),
    refused("a folder without a dataset", OTHER + "empty", 3, "data.train", "empty", made=folders("empty")),
    refused(
        "a folder of parquet files",
        OTHER + "shards",
        3,
        "data.train",
        "shards",
        "shards/a.parquet",
        made=both(folders("shards"), table("shards/a.parquet", problem=["1"], answer=["1"])),
    ),
    refused("the folder of a model", OTHER + "model", 3, "data.train", "model"),
    refused(
        "a folder of several splits",
        OTHER + "both",
        3,
        "both/train",
        made=text("both/dataset_dict.json", '{"splits": ["train"]}'),
    ),
    refused("a damaged dataset", OTHER + "saved", 3, "saved", made=text("saved/state.json", "{}")),
    refused("a text file", OTHER + "train.txt", 3, "train.txt", ".jsonl", made=text("train.txt", "1+1")),
    refused("a sheet", OTHER + "train.xlsx", 3, "train.xlsx", ".csv", made=text("train.xlsx", b"PK")),
    refused("no suffix", OTHER + "train", 3, "train", ".jsonl", made=text("train", "{}")),
    refused("a device", OTHER + "/dev/null", 3, "/dev/null"),
    refused(
        "a link to nothing",
        OTHER + "link.jsonl",
        3,
        "link.jsonl",
        made=lambda folder: (folder / "link.jsonl").symlink_to("gone"),
    ),
    refused("a name with a line break", "check run.toml 'data.train=a\nb.jsonl'", 2, "data.train", "control", sentences=2),
    # the file
    refused("an empty file", CHECK, 3, "data.train", "found none", made=text(TRAIN, "")),
    refused("only blank lines", CHECK, 3, "data.train", "found none", made=text(TRAIN, "\n \n\n")),
    refused("only comments", CHECK, 3, "data.train", "line 1", "JSON", made=text(TRAIN, "# to do\n")),
    refused("bytes", CHECK, 3, "data.train", "line 1", made=text(TRAIN, bytes(range(128, 256)))),
    refused("NUL in a file", CHECK, 3, "data.train", "line 2", made=line(b"\0\0")),
    refused(
        "Latin-1",
        CHECK,
        3,
        "data.train",
        "line 2",
        "UTF-8",
        made=line('{"problem": "Zürich", "answer": "1"}'.encode("latin-1")),
    ),
    refused("UTF-16", CHECK, 3, "data.train", "UTF-8", made=text(TRAIN, json.dumps(GOOD).encode("utf-16"))),
    accepted(
        "byte order mark and Windows line ends", CHECK, made=text(TRAIN, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    ),
    accepted("no line end at the end", CHECK, made=text(TRAIN, json.dumps(GOOD))),
    accepted("emoji, other alphabets and a NUL within a text", CHECK, made=row(problem="😀 两 + 两 = \u0000 ?")),
    refused("a line cut short", CHECK, 3, "data.train", "line 2", "JSON", made=line('{"problem": "2+2", "ans')),
    refused("two objects on a line", CHECK, 3, "data.train", "line 2", made=line(json.dumps(GOOD) * 2)),
    refused("quotes of Python", CHECK, 3, "data.train", "line 2", "JSON", made=line("{'problem': '2+2', 'answer': '4'}")),
    refused(
        "a comma behind the last field",
        CHECK,
        3,
        "data.train",
        "line 2",
        "JSON",
        made=line('{"problem": "2+2", "answer": "4",}'),
    ),
    refused("NaN as JSON", CHECK, 3, "data.train", "line 2", made=line('{"problem": "2+2", "answer": NaN}')),
    refused("an array in JSONL", CHECK, 3, "data.train", "line 1", made=text(TRAIN, json.dumps([GOOD, GOOD]))),
    refused(
        "a JSON object spread over lines",
        CHECK,
        3,
        "data.train",
        "line 1",
        made=text(TRAIN, json.dumps(GOOD, indent=2)),
        sentences=4,
    ),
    refused(
        "an object that holds the rows",
        OTHER + "train.json",
        3,
        "train.json",
        "data",
        made=text("train.json", json.dumps({"data": [GOOD]})),
    ),
    accepted("an array of objects", OTHER + "train.json", made=text("train.json", json.dumps([GOOD]))),
    refused("an array of texts", OTHER + "train.json", 3, "train.json", "row 1", made=text("train.json", '["1+1"]')),
    refused("a broken array", OTHER + "train.json", 3, "train.json", "JSON", made=text("train.json", '[{"problem": "1+1"')),
    refused("JSON nested beyond reason", CHECK, 3, "data.train", "line 2", made=line("[" * 100000 + "]" * 100000)),
    refused("a page for the data", CHECK, 3, "data.train", "line 1", made=text(TRAIN, "<!DOCTYPE html><html></html>")),
    refused(
        "what git did not fetch",
        CHECK,
        3,
        "data.train",
        "line 1",
        made=text(TRAIN, "version https://git-lfs.github.com/spec/v1\n"),
    ),
    accepted("gzip", OTHER + "train.jsonl.gz", made=gz(LINES)),
    refused("gzip cut short", OTHER + "train.jsonl.gz", 3, "train.jsonl.gz", "gzip", made=gz(LINES, 12)),
    refused("no gzip", OTHER + "train.jsonl.gz", 3, "train.jsonl.gz", "gzip", made=text("train.jsonl.gz", json.dumps(GOOD))),
    accepted("CSV", OTHER + "train.csv", made=text("train.csv", 'problem,answer\n"1+1",2\n')),
    refused(
        "CSV without names", OTHER + "train.csv", 3, "train.csv", "line 2", "problem", made=text("train.csv", "1+1,2\n2+2,4\n")
    ),
    refused(
        "CSV with a name twice", OTHER + "train.csv", 3, "train.csv", "line 1", made=text("train.csv", "problem,problem\n1,2\n")
    ),
    refused(
        "CSV with a comma that is not quoted",
        OTHER + "train.csv",
        3,
        "train.csv",
        "line 2",
        "quotes",
        made=text("train.csv", "problem,answer\n1,2,3\n"),
    ),
    refused(
        "CSV with semicolons", OTHER + "train.csv", 3, "train.csv", "problem", made=text("train.csv", "problem;answer\n1+1;2\n")
    ),
    accepted("parquet", OTHER + "train.parquet", made=table("train.parquet", problem=["1+1"], answer=[2])),
    refused(
        "parquet of other columns",
        OTHER + "train.parquet",
        3,
        "train.parquet",
        "row 1",
        "data.columns",
        made=table("train.parquet", text=["1+1"], label=["2"]),
    ),
    refused(
        "parquet without rows",
        OTHER + "train.parquet",
        3,
        "train.parquet",
        "found none",
        made=table("train.parquet", problem=[], answer=[]),
    ),
    refused("parquet that is none", OTHER + "train.parquet", 3, "train.parquet", "parquet", made=text("train.parquet", "PAR1")),
    # rows
    refused("a number for a row", CHECK, 3, "line 2", "3", made=line("3")),
    refused("null for a row", CHECK, 3, "line 2", "None", made=line("null")),
    refused("an empty row", CHECK, 3, "line 2", "problem", made=line("{}")),
    refused("no problem", CHECK, 3, "line 2", "`problem`", made=row(problem=...)),
    refused("an empty problem", CHECK, 3, "line 2", "`problem`", made=row(problem="")),
    refused("a blank problem", CHECK, 3, "line 2", "`problem`", made=row(problem=" \n")),
    refused("null for a problem", CHECK, 3, "line 2", "`problem`", made=row(problem=None)),
    refused("a number for a problem", CHECK, 3, "line 2", "`problem`", "3", made=row(problem=3)),
    refused("a list for a problem", CHECK, 3, "line 2", "`problem`", "['1', '2']", made=row(problem=["1", "2"])),
    refused("an object for a problem", CHECK, 3, "line 2", "`problem`", "{'text': '1'}", made=row(problem={"text": "1"})),
    refused("a boolean for a problem", CHECK, 3, "line 2", "`problem`", "True", made=row(problem=True)),
    refused("no answer", CHECK, 3, "line 2", "`answer`", made=row(answer=..., solution=...)),
    refused("an empty answer", CHECK, 3, "line 2", "`answer`", made=row(answer="", solution=...)),
    refused("a list of answers", CHECK, 3, "line 2", "`answer`", "['4', 'four']", made=row(answer=["4", "four"])),
    refused("a boolean for an answer", CHECK, 3, "line 2", "`answer`", "True", made=row(answer=True)),
    refused("an infinite answer", CHECK, 3, "line 2", made=line('{"problem": "2+2", "answer": Infinity}')),
    refused("an answer beyond every number", CHECK, 3, "line 2", "`answer`", made=line('{"problem": "2+2", "answer": 1e999}')),
    accepted("an answer of thirty digits", CHECK, made=row(answer=123456789012345678901234567890)),
    refused(
        "an answer of ten thousand digits", CHECK, 3, "line 2", made=line('{"problem": "2+2", "answer": ' + "9" * 10000 + "}")
    ),
    refused("a mark without a result", CHECK, 3, "line 2", "####", made=row(answer="It is 4.\n####")),
    refused("a solution without a box", CHECK, 3, "line 2", "boxed", made=row(answer=..., solution="It is 4.")),
    refused("a box that is not closed", CHECK, 3, "line 2", "braces", made=row(answer=..., solution=r"\boxed{4")),
    refused("a list for a solution", CHECK, 3, "line 2", "`solution`", made=row(solution=["a"])),
    refused("a list for an id", CHECK, 3, "line 2", "`id`", made=row(id=["a"])),
    refused("half a character", CHECK, 3, "line 2", "`problem`", made=line('{"problem": "\\ud83d", "answer": "4"}')),
    refused(
        "an id of two problems",
        CHECK,
        3,
        "data.train",
        "'a'",
        made=rows(TRAIN, GOOD | {"id": "a"}, GOOD | {"id": "a", "problem": "2+2"}),
    ),
    accepted("columns beside", CHECK, made=row(topic="sums", level=3, tests=[{"in": 1}])),
    accepted("question and answer", CHECK, made=rows(TRAIN, {"question": "1+1", "answer": "2"})),
    accepted("messages", CHECK, made=rows(TRAIN, {"messages": MESSAGES, "answer": "2"})),
    refused(
        "names that are not known", CHECK, 3, "line 1", "data.columns", made=rows(TRAIN, {"aufgabe": "1+1", "ergebnis": "2"})
    ),
    refused(
        "names in capital letters",
        CHECK,
        3,
        "line 1",
        "data.columns",
        "Problem",
        made=rows(TRAIN, {"Problem": "1+1", "Answer": "2"}),
    ),
    refused(
        "a column that is not there",
        "check run.toml 'data.columns={problem=\"frage\"}'",
        3,
        "data.columns.problem",
        "frage",
        sentences=8,
    ),
    refused(
        "a role that is not known",
        CHECK,
        3,
        "messages[0].role",
        "'user1'",
        made=rows(TRAIN, {"messages": [{"role": "user1", "content": "1"}], "answer": "2"}),
    ),
    refused(
        "a message without a role", CHECK, 3, "messages[0]", made=rows(TRAIN, {"messages": [{"content": "1"}], "answer": "2"})
    ),
    refused(
        "a message that is a picture",
        CHECK,
        3,
        "messages[0].content",
        made=rows(TRAIN, {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "answer": "2"}),
    ),
    refused(
        "a message that calls a tool",
        CHECK,
        3,
        "tool calls",
        made=rows(TRAIN, {"messages": [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [{}]}], "answer": "2"}),
    ),
    refused(
        "messages without a user",
        CHECK,
        3,
        "line 1",
        made=rows(TRAIN, {"messages": [{"role": "system", "content": "1"}], "answer": "2"}),
    ),
    refused("messages that are texts", CHECK, 3, "line 1", made=rows(TRAIN, {"messages": ["1+1"], "answer": "2"})),
    refused(
        "faults in a hundred rows",
        CHECK,
        3,
        "line 1",
        "found 100 of 100 rows",
        made=rows(TRAIN, *[{"problem": n} for n in range(100)]),
        sentences=4,
    ),
    refused(
        "faults in both files",
        CHECK,
        3,
        "data.train",
        "data.held_out",
        made=both(row(problem=3), rows("held.jsonl", {"problem": 3})),
        sentences=2,
    ),
    # what does not fit
    refused("prompts that are all too long", CHECK + "data.max_prompt_tokens=20", 3, "data.max_prompt_tokens", "20"),
    refused(
        "a row of a megabyte alone", CHECK, 3, "data.max_prompt_tokens", made=rows(TRAIN, GOOD | {"problem": "word " * 200000})
    ),
    refused(
        "supervised rows without solutions",
        "sft run.toml sft.checkpoint_out=out",
        3,
        "`solution`",
        made=rows(TRAIN, {"problem": "1+1", "answer": "2"}),
    ),
    refused(
        "a solution that is too long",
        "sft run.toml sft.checkpoint_out=out",
        2,
        "trainer.microbatch_tokens",
        made=row(solution="x" * 9000),
    ),
    refused(
        "pairs without the rejected",
        CHECK + "sync.sync_interval=never data.replay=pairs.jsonl",
        3,
        "pairs.jsonl, line 2",
        "`rejected`",
        made=rows("pairs.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}),
    ),
    refused(
        "a ledger with steps missing",
        CHECK + "sync.sync_interval=never data.replay=old.jsonl",
        3,
        "old.jsonl",
        "step",
        made=rows("old.jsonl", *[{"step": step, "prompt_id": "p", "token_ids": [1]} for step in range(3)]),
    ),
    refused(
        "a ledger that is empty",
        CHECK + "sync.sync_interval=never data.replay=old.jsonl",
        3,
        "old.jsonl",
        made=text("old.jsonl", ""),
    ),
]
