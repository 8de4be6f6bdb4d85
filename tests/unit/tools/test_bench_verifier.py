"""The verifier's benchmark on few rows: kinds that a block has none of, and clocks that read nothing. What it measures is not
judged here."""

import sys

import pytest

from tools import bench_verifier


def test_rates_of_empty_blocks_and_of_no_time():
    found = bench_verifier.rates([[], [(1.0, 0.0)], [(0.0, 0.5), (None, 1.5)]])
    assert found["num_answers"] == 3 and found["num_late"] == 1
    assert found["share_right"] == pytest.approx(1 / 3)
    assert found["answers_per_second"] == pytest.approx((1 / bench_verifier.CLOCK_SECONDS + 1) / 2)


def test_one_row_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "golds.jsonl").write_text('{"answer": "so it is #### 57"}\n')
    monkeypatch.setattr(sys, "argv", ["bench", "--golds", str(tmp_path / "golds.jsonl"), "--blocks", "9"])
    assert bench_verifier.main() == 0
    said = capsys.readouterr().out
    assert '"num_golds": 1' in said and "hostile" not in said


@pytest.mark.parametrize(("arguments", "why"), [(["--rows", "0"], "hold no rows"), (["--blocks", "0"], "at least 1")])
def test_nothing_to_measure_is_said(tmp_path, monkeypatch, capsys, arguments, why):
    (tmp_path / "golds.jsonl").write_text('{"answer": "57"}\n')
    monkeypatch.setattr(sys, "argv", ["bench", "--golds", str(tmp_path / "golds.jsonl"), *arguments])
    with pytest.raises(SystemExit):
        bench_verifier.main()
    assert why in capsys.readouterr().err
