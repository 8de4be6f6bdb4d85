"""What the comparing tools run: every configuration of theirs breaks no rule."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from engine.config.load import load_config
from engine.run.nodes import PROCESS_ENVIRONMENT
from tools import compare_regimes, race, race_intervals

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "configs" / "quickstart.toml"


@pytest.mark.parametrize(
    "options", [pytest.param(o, id=f"{s}: {n}") for s, of in compare_regimes.STUDIES.items() for n, o in of.items()]
)
def test_a_regime_of_a_study_can_be_run(options: list[str]) -> None:
    load_config(QUICKSTART, [*options, "trainer.tensor_parallel=1", "checkpoint.every=end"])


def test_one_name_is_one_run_in_every_study() -> None:
    """Studies share the folder of a run of one name and seed."""
    found: dict[str, list[str]] = {}
    for study in compare_regimes.STUDIES.values():
        for name, options in study.items():
            assert sorted(options) == found.setdefault(name, sorted(options))


@pytest.mark.parametrize("model", race_intervals.OPTIONS)
@pytest.mark.parametrize("side", race_intervals.SIDES)
def test_a_side_of_the_race_of_regimes_counts_whole_intervals_while_engines_sample(side: str, model: str) -> None:
    own, before, counted, after = race_intervals.SIDES[side]
    sync = load_config(QUICKSTART, [*race_intervals.OPTIONS[model], *own]).sync
    assert isinstance(sync.sync_interval, int)
    assert counted % sync.sync_interval == 0 and before >= sync.sync_interval
    assert after == sync.lookahead * sync.sync_interval, "beside the last steps nothing is sampled"
    alone = race_intervals.ALONE.get(side, side)
    assert f"sync.sync_interval={sync.sync_interval}" in race_intervals.SIDES[alone][0]
    assert not sync.lookahead or alone != side


@pytest.mark.parametrize("name", race.RACES)
def test_a_race_can_be_run(name: str) -> None:
    entered = race.RACES[name]
    more = [f"data.reward={race.REWARD}:last_bit"] if entered.larger else []
    load_config(QUICKSTART, [*entered.semion, *more])
    assert race.REWARD.exists()


def test_both_sides_of_a_race_have_one_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Above all what malloc is told, which is a tenth of a step."""
    told: list[dict[str, str]] = []
    (tmp_path / "trl.json").write_text("{}")
    monkeypatch.setattr(race, "execute", lambda command, folder, environment: told.append(environment))
    options = argparse.Namespace(peer="python", model="m", steps=1, processes=2)
    race.trl(next(iter(race.RACES.values())), options, tmp_path / "problems.jsonl", 3, tmp_path)
    (environment,) = told
    assert environment["GLIBC_TUNABLES"] == PROCESS_ENVIRONMENT["GLIBC_TUNABLES"] != ""


def test_rewards_of_both_sides_are_told_with_an_error() -> None:
    """Of three rounds that differ by 0.1, 0.2 and 0.3, the error of the mean is 0.1 / sqrt(3)."""
    theirs = [[0.0, 0.5, 0.5], [0.0, 0.4, 0.4], [0.0, 0.3, 0.3]]
    ours = [[0.9, 0.6, 0.6], [0.9, 0.6, 0.6], [0.9, 0.6, 0.6]]
    told = race.told_rewards({"TRL": theirs, "Semion": ours})
    assert told.endswith("TRL 0.400, Semion 0.600; Semion's is higher by +0.200 ± 0.058 over 3 rounds")
    assert race.told_rewards({"TRL": [[]], "Semion": [[0.5, 0.25]]}).endswith("half: Semion 0.250")


def test_each_round_has_problems_of_its_own_while_there_are_any(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    entered = next(iter(race.RACES.values()))
    count = 2 * entered.sizes["prompts"]
    data.write_text("".join(f"{row}\n" for row in range(2 * count + 1)))
    options = argparse.Namespace(data=str(data), steps=2)

    def first(round_: int) -> int:
        return int(race.problems_of(entered, options, round_, tmp_path).read_text().splitlines()[0])

    assert [first(0), first(1), first(2)] == [0, count, 0]
