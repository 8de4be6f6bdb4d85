"""The deadlines of a run that its forecast would not keep: of a checkpoint, of engines' answers and of a reward model's. A run
that is planned so would end with the error of whoever waited. Seconds are the forecast's, with all that is guessed in them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from engine.core.errors import ConfigError
from engine.forecast.disk import Saving
from engine.forecast.seconds import Forecast
from engine.run.spec import Spec

GUESSES_ARE_OFF = 2.0  # docs/planner.md, figures of others: forecasts by data sheets and guesses were within 1.73


def slack_of(measured: Collection[str]) -> float:
    """How many times longer than a deadline what engines need must be by the forecast for the deadline to be too short.
    `measured`: the constants that are of the machine at hand; where an iteration's is not among them, engines' seconds are
    guesses."""
    return 1.0 if "iteration_seconds" in measured else GUESSES_ARE_OFF


def missed(spec: Spec, saved: Saving | None, found: Forecast | None, slack: float = 1.0) -> list[ConfigError]:
    """An error for each deadline that is too short. `saved`: of a run with checkpoints; `found`: of one that samples. `slack`:
    see `slack_of`."""
    return [*_checkpoint(spec, saved), *(_waits(spec, found, slack) if found is not None else ())]


def _checkpoint(spec: Spec, saved: Saving | None) -> Iterator[ConfigError]:
    """While ranks write, rank 0 waits for what is new on the disk, and every rank's newest bytes may be on their way there."""
    deadline = spec.config.trainer.timeout_seconds
    if saved is not None and saved.silent_seconds > deadline:
        yield ConfigError(
            f"trainer.timeout_seconds must be longer than a checkpoint may show nothing new on the disk; found {deadline:g} "
            f"for {saved.silent_seconds:,.0f} s, in which all trainer ranks write what each of them has under way: raise it, "
            f"or give the disk's own --disk-gigabytes-per-second"
        )


def _waits(spec: Spec, found: Forecast, slack: float) -> Iterator[ConfigError]:
    calibrate = ", or give the machine's own constants (--calibration)" if slack > 1 else ""
    inference, model = spec.config.inference.timeout_seconds, spec.config.reward_model.timeout_seconds
    evaluation = found.evaluation_wait_seconds or 0.0
    for wait, what, fix in (
        (found.longest_wait_seconds, "an engine takes for a step's responses", "lower sampling.max_tokens"),
        (evaluation, "an engine takes for a part of an evaluation", "lower evaluation.samples or sampling.max_tokens"),
    ):
        if wait > slack * inference:
            yield ConfigError(
                f"inference.timeout_seconds must be longer than {what}; found {inference:g} for {wait:,.0f} s by the forecast: "
                f"raise it or {fix}{calibrate}"
            )
    if spec.starts_reward_engine and found.judging_seconds > slack * model:
        yield ConfigError(
            f"reward_model.timeout_seconds must be longer than the reward model takes for a step's answers; found {model:g} "
            f"for {found.judging_seconds:,.0f} s by the forecast: raise it or lower sampling.max_tokens{calibrate}"
        )
