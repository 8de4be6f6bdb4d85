"""Where data are read from: dataset folders and the hub beside files, what each refuses, and digests of what they hold. The
tests of the library `datasets` need it installed and say so where it is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from engine.core.errors import ConfigError, DataError
from engine.data.records import check_source, file_digest, records, source_digest
from engine.data.rows import load_rows

LIBRARY = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the library `datasets` is not installed")
ROWS: list[dict[str, Any]] = [
    {"problem": "1 + 1?", "answer": "2", "extra": [1]},
    {"problem": "1 + 2?", "answer": "3", "extra": None},
]


def saved(folder: Path) -> Path:
    """ROWS as `datasets` saves them."""
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    return folder


def jsonl(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "rows.jsonl"


@LIBRARY
def test_a_saved_dataset_gives_the_rows_of_jsonl(tmp_path):
    folder = saved(tmp_path / "dataset")
    assert load_rows(folder) == load_rows(jsonl(tmp_path))
    assert [record for _, record in records(folder, ("problem",))] == [{"problem": row["problem"]} for row in ROWS]
    assert [where for where, _ in records(folder, ("problem",))] == [f"{folder}, row {n}" for n in (1, 2)]
    assert list(records(folder, ("absent",))) == []


@LIBRARY
def test_a_dataset_that_cannot_be_read_is_named(tmp_path):
    folder = saved(tmp_path / "dataset")
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match="dataset: must be a dataset that can be read; found"):
        load_rows(folder)


@LIBRARY
def test_the_hub_is_asked_for_configuration_and_split_and_needs_its_cache(tmp_path, monkeypatch):
    """Without a network the real library says that it is offline; a fake one shows what it is asked for."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"hf://nobody/nothing: must be in the local cache of the hub, .* `HF_HUB_OFFLINE=0"):
        load_rows("hf://nobody/nothing")
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("hf://a/b", "hf://a/b:test", "hf://a/b:main:test"):
        assert [row.answer for row in load_rows(source)] == ["2", "3"]
    assert asked == [("a/b", None, "train"), ("a/b", None, "test"), ("a/b", "main", "test")]


def test_without_the_library_the_sentence_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source in (tmp_path, "hf://a/b"):
        with pytest.raises(ConfigError, match=r"needs the library `datasets`; .* -r requirements/common\.txt"):
            load_rows(source)


@pytest.mark.parametrize("source", ["hf://a", "hf://a/b/c", "hf:///b", "hf://a/b:", "hf://a/b:c:d:e", "hf://"])
def test_a_name_of_the_hub_has_one_form(source):
    with pytest.raises(DataError, match=r"must read hf://owner/name\[:config\]\[:split\]"):
        check_source(source)


def test_a_folder_must_be_one_dataset(tmp_path):
    with pytest.raises(DataError, match=r"must be one that `datasets` saved; found no state\.json"):
        check_source(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=f"found a folder of several splits: name one of them, as {tmp_path}/train"):
        check_source(tmp_path)


def test_of_a_conversation_parquet_reads_only_what_messages_need(tmp_path):
    turn = {"role": "user", "content": "Hi", "country": "x", "toxic": False, "header": {"accept-language": "en"}}
    table = pyarrow.Table.from_pylist([{"conversation": [turn, turn | {"role": "assistant"}], "model": "m", "turn": 1}])
    path = tmp_path / "chat.parquet"
    pyarrow.parquet.write_table(table, path)
    ((where, record),) = records(path, ("conversation", "language"))
    assert where == f"{path}, row 1"
    part = {"role": "user", "content": "Hi", "toxic": False}
    assert record == {"conversation": [part, part | {"role": "assistant"}]}
    assert [row.problem for row in load_rows(path, needs_answer=False)] == ["Hi"]


def test_a_digest_is_of_the_contents(tmp_path):
    path = jsonl(tmp_path)
    before = source_digest(path)
    assert before == file_digest(path) and before is not None and len(before) == 64
    path.write_text(path.read_text() + "\n")
    assert source_digest(path) != before
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "data.arrow").write_bytes(b"1")
    one = source_digest(folder)
    (folder / "data.arrow").write_bytes(b"12")
    assert source_digest(folder) not in (one, None)
    assert source_digest(tmp_path / "gone") is None
