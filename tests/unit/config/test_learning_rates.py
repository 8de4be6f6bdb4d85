"""Learning-rate schedules: their values by the formulas of the literature, and the options that go with them."""

import math
import re
from pathlib import Path

import pytest

from engine.config.learning_rates.registry import LEARNING_RATES, learning_rate_of
from engine.config.load import load_config, override, validated
from engine.config.options import Optimizer
from engine.core.errors import ConfigError
from tests.builders import config as run_config

OWN = """
from engine.config.learning_rates.base import LearningRate

class Squared(LearningRate):
    def coefficient(self, progress):
        return (1 - progress) ** 2
"""


def rates(steps: int, **options: object) -> list[float]:
    made = learning_rate_of(validated(Optimizer, "optimizer", {"learning_rate": 1e-3} | options))
    return [made.at(step) for step in range(steps)]


def test_the_default_stays_at_the_peak_bit_for_bit():
    assert rates(50) == [1e-3] * 50
    assert rates(9, warmup_steps=7) == [1e-3 * (step + 1) / 7 for step in range(7)] + [1e-3] * 2


def test_linear_falls_to_its_floor_and_stays():
    found = rates(14, schedule="linear", warmup_steps=2, decay_steps=12, floor_share=0.1)
    assert found[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert found[2:] == pytest.approx([1e-3 - 0.9e-3 * min(1.0, step / 10) for step in range(12)])
    assert rates(11, schedule="linear", decay_steps=10)[-1] == 0.0


def test_cosine_is_that_of_the_papers_code():
    """fairseq2: final + (base - final) * (1 + cos(pi * step / num_steps)) / 2, with final = 0.2 * base."""
    found = rates(101, schedule="cosine", decay_steps=100, floor_share=0.2)
    wanted = [0.2e-3 + 0.5 * (1e-3 - 0.2e-3) * (1 + math.cos(math.pi * step / 100)) for step in range(101)]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found[0] == 1e-3 and found[50] == pytest.approx(0.6e-3) and found[100] == pytest.approx(0.2e-3)


def test_a_schedule_of_ones_own(tmp_path: Path):
    (tmp_path / "squared.py").write_text(OWN)
    found = rates(5, schedule=f"{tmp_path / 'squared.py'}:Squared", decay_steps=4)
    assert found == pytest.approx([1e-3 * (1 - step / 4) ** 2 for step in range(5)])


def test_every_schedule_never_leaves_its_bounds():
    assert LEARNING_RATES.names == ("constant", "cosine", "linear")
    for name in LEARNING_RATES.names:
        decay = {"decay_steps": 20, "floor_share": 0.3} if LEARNING_RATES.load(name).decays else {}
        found = rates(40, schedule=name, warmup_steps=5, **decay)
        assert max(found) == 1e-3 and found[5:] == sorted(found[5:], reverse=True)
        assert min(found[5:]) == pytest.approx(0.3e-3 if decay else 1e-3)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"schedule": "cosine"}, "needs optimizer.decay_steps.*found none: set it to run.steps"),
        ({"schedule": "linear", "decay_steps": 4, "warmup_steps": 4}, "must exceed optimizer.warmup_steps; found 4 and 4"),
        ({"decay_steps": 4}, "of schedules that decay; found 4 and 0.0 with optimizer.schedule = 'constant'"),
        ({"floor_share": 0.1}, "of schedules that decay; found None and 0.1"),
        ({"schedule": "step"}, "optimizer.schedule must be one of constant, cosine, linear, or your own.*found 'step'"),
        ({"beta1": 1.0}, "optimizer.beta1.*less than 1; found 1.0"),
        ({"beta2": 1.0}, "optimizer.beta2.*less than 1; found 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], wanted: str):
    with pytest.raises(ConfigError, match=re.compile(wanted, re.DOTALL)):
        override(run_config(), optimizer=options)


def test_the_papers_configurations_take_the_schedule_of_the_papers_code():
    root = Path(__file__).resolve().parents[3]
    for path in (root / "configs" / "paper").glob("*.toml"):
        config = load_config(path)
        optimizer = config.optimizer
        assert (optimizer.schedule, optimizer.floor_share, optimizer.decay_steps) == ("cosine", 0.2, config.run.steps), path
        assert "fairseq2" in path.read_text("utf-8").split("\n\n")[0], path
