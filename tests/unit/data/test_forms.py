"""Every form of a row that is read, case by case (prompt_forms.jsonl, pair_forms.jsonl), the files they come in, and that all
that is wrong with a file can be told at once."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from engine.core.errors import DataError
from engine.data.preferences import pair_texts, read_pairs
from engine.data.rows import Row, has_columns, load_rows, read_rows, sample_rows

HERE = Path(__file__).parent


def cases(name: str) -> list[Any]:
    found = [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()]
    return [pytest.param(case, id=case["form"]) for case in found]


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / name


def turns(case: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((role, text) for role, text in case.get("messages", ()))


@pytest.mark.parametrize("case", cases("prompt_forms.jsonl"))
def test_a_prompt_is_read_in_the_form_that_people_have(tmp_path, case):
    path = write(tmp_path, case["row"])
    if "fault" in case:
        with pytest.raises(DataError) as caught:
            load_rows(path, columns=case.get("columns"))
        assert str(caught.value).startswith(f"{path}, line 1: ") and case["fault"] in str(caught.value)
        return
    texts = {name: case.get(name, "") for name in ("problem", "answer", "solution", "source", "id")}
    wanted = Row(**texts, messages=turns(case))
    assert load_rows(path, columns=case.get("columns")) == [wanted]
    (kept,) = load_rows(path, columns=case.get("columns"), keep_columns=True)
    assert json.loads(kept.columns) == case["row"], "what nothing reads is kept for rewards"
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([case["row"]]), table)
    assert load_rows(table, columns=case.get("columns")) == [wanted], "whatever columns are read of it"


@pytest.mark.parametrize("case", cases("pair_forms.jsonl"))
def test_a_pair_is_read_in_the_form_that_people_have(tmp_path, case):
    path = write(tmp_path, case["row"])
    if "fault" in case:
        (error,) = read_pairs(path, case.get("columns"))
        assert isinstance(error, DataError) and str(error).startswith(f"{path}, line 1: ") and case["fault"] in str(error)
        return
    wanted = (case["problem"], case["chosen"], case["rejected"], turns(case))
    assert pair_texts("here", case["row"], case.get("columns")) == wanted
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([case["row"]]), table)
    assert list(read_pairs(table, case.get("columns"))) == [wanted]


def test_without_a_need_for_answers_a_gold_that_is_no_text_is_the_rewards_to_read(tmp_path):
    row = {"prompt": "Write f.", "reward_model": {"ground_truth": {"tests": ["f(1)"]}}, "answer": ["a", "b"], "output": [1]}
    (read,) = load_rows(write(tmp_path, row), needs_answer=False, keep_columns=True)
    assert (read.problem, read.answer, read.solution, json.loads(read.columns)) == ("Write f.", "", "", row)


# -- files

ROWS = [{"problem": "1 + 1?", "answer": "2"}, {"problem": 'a, "b"\nand ü?', "answer": "007"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
CSV = 'problem,answer,extra\r\n1 + 1?,2,\r\n"a, ""b""\nand ü?",007,x\r\n'.encode()
FILES = {
    "rows.jsonl": LINES,
    "bom.jsonl": codecs.BOM_UTF8 + LINES,
    "rows.jsonl.gz": gzip.compress(LINES, mtime=0),
    "rows.json": ARRAY,
    "bom.json": codecs.BOM_UTF8 + b"\n " + ARRAY,
    "rows.json.gz": gzip.compress(ARRAY, mtime=0),
    "lines.json": LINES,
    "rows.csv": CSV,
    "bom.csv": codecs.BOM_UTF8 + CSV,
    "rows.csv.gz": gzip.compress(codecs.BOM_UTF8 + CSV, mtime=0),
}
LINE_BY_LINE = ("rows.jsonl", "bom.jsonl", "rows.jsonl.gz", "lines.json")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    wanted = [Row("1 + 1?", "2", "", "", ""), Row('a, "b"\nand ü?', "007", "", "", "")]
    assert load_rows(path) == wanted
    assert sample_rows(path) == (wanted, True)
    place = "line 3" if "csv" in name else "line 2" if name in LINE_BY_LINE else "row 2"
    assert load_rows(path)[1].where == f"{path}, {place}"


def test_a_cell_of_csv_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("problem,answer\n" + "x" * 200_000 + ",1\n")
    assert len(load_rows(path)[0].problem) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"problem,answer\n1,2\n1,2,3\n", r"line 3: must have 2 cells, as line 1; found 3"),
        ("a.csv", b"problem,problem\n1,2\n", "line 1: must name every column once"),
        ("a.csv", b'problem,answer\n"1,2\n', "line 2: must be CSV; found: unexpected end of data"),
        ("a.csv", b"problem,answer\n\xff,2\n", r"must be UTF-8; found byte b'\\xff'"),
        ("a.csv", b"", "at least one row"),
        ("a.jsonl.gz", b"{}", "must be a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "must be a whole gzip file"),
        ("a.json", b"[{}", "must be one JSON object; .*: write an array of objects"),
        ("a.json", b"[1]", "row 1: a row must be a JSON object"),
        ("a.json", b"[]", "at least one row"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_rows(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_all_that_is_wrong_with_a_file_can_be_told_at_once(tmp_path):
    path = write(tmp_path, ROWS[0], {"answer": "2"}, ROWS[1], [1], {"problem": "p"})
    path.write_text(path.read_text() + "{\n" + json.dumps(ROWS[0]) + "\n}")
    read = list(read_rows(path))
    assert [type(row) for row in read] == [Row, DataError, Row, DataError, DataError, DataError, Row, DataError]
    faults = [str(row).removeprefix(f"{path}, ") for row in read if isinstance(row, DataError)]
    assert [fault.split(":")[0] for fault in faults] == ["line 2", "line 4", "line 5", "line 6", "line 8"]
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert str(caught.value).endswith(faults[0])
    with pytest.raises(DataError) as several:
        sample_rows(path)
    assert len(several.value.faults) == 3 + 1
    assert "found 5 of 8 rows that cannot" in str(several.value.faults[-1])


def test_a_row_of_unknown_names_is_told_how_to_name_them(tmp_path):
    with pytest.raises(DataError, match=r"`problem` must be .*: add it, or name its column by data\.columns\.problem$"):
        load_rows(write(tmp_path, {"q": "1 + 1?", "answer": "2"}))


def test_a_suite_has_the_columns_of_data_where_its_first_row_does(tmp_path):
    path = write(tmp_path, {"q": {"text": "1"}, "answer": "2"})
    assert has_columns(path, {"problem": "q.text"}) and has_columns(path, {"problem": "x", "answer": "answer"})
    assert not has_columns(path, {"problem": "q.words"}) and not has_columns(path, None)
