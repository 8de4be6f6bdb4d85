"""What the comparing tools run: every configuration of theirs breaks no rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.load import load_config
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
    assert race_intervals.ALONE[str(sync.sync_interval)] in race_intervals.SIDES


@pytest.mark.parametrize("name", race.RACES)
def test_a_race_can_be_run(name: str) -> None:
    entered = race.RACES[name]
    more = [f"data.reward={race.REWARD}:last_bit"] if entered.larger else []
    load_config(QUICKSTART, [*entered.semion, *more])
    assert race.REWARD.exists()
