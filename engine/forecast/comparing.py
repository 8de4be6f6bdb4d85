"""A forecast held against a run that was: what the run's records say of each part of a step, what the forecast says, and the
constants with which it would say the same. It reads rows; files are found elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Many
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from engine.config.load import RunConfig
from engine.core.errors import ConfigError
from engine.forecast.calibration import Measured
from engine.forecast.constants import Constants
from engine.forecast.lengths import LogNormal, Recorded, Workload
from engine.forecast.seconds import Forecast
from engine.observe.predicted import Part

Row = Mapping[str, Any]
ROUNDS = 6  # of scaling constants until the forecast agrees
WORTH = 0.002  # of a step's time; a part that took less tells nothing
ABOUT = {
    "step": "a step",
    "rollouts": "waiting for responses",
    "rewards": "waiting for rewards",
    "host": "handing out, packing",
    "training": "training",
    "reference": "of it the reference's and split groups' forward",
    "weight sync": "weight sync, engines asleep and awake",
    "sampling": "an engine samples, beside all that",
    "records": "between steps: records",
    "checkpoint": "a checkpoint: the trainer stands still",
    "checkpoint written": "a checkpoint: until it is written, beside training",
    "evaluation": "an evaluation",
    "start": "from the command to the first step's end",
}
EACH = ("checkpoint", "checkpoint written", "evaluation", "start")
# Constants that make a part, and whether they grow with it (1) or shrink (-1).
MADE_OF: dict[str, dict[str, int]] = {
    "training": {"train_peak_share": -1, "layer_row_seconds": 1, "step_seconds": 1, "sum_seconds": 1, "hop_seconds": 1},
    "sampling": {
        "iteration_seconds": 1,
        "request_iteration_seconds": 1,
        "collective_seconds": 1,
        "decode_memory_share": -1,
        "decode_peak_share": -1,
        "prefill_peak_share": -1,
    },
    "host": {"sampled_megatoken_seconds": 1, "trained_megatoken_seconds": 1},
    "rewards": {"verified_per_second": -1, "function_per_second": -1},
    "weight sync": {"sync_seconds": 1, "sleep_seconds": 1},
    "checkpoint written": {"disk_gigabytes_per_second": -1},
    "start": {"start_seconds": 1},
}


def counted(rows: Many[Row], config: RunConfig) -> Many[Row]:
    """The steps that are measured by: those after what was sampled first. Where there are no more, all of them: the first of an
    interval waits for most of it, so none may be left out."""
    warm = config.schedule.opens(0).stop
    return [row for row in rows if row["step"] >= warm] or rows


def measured(rows: Many[Row], every: Many[Row], events: Iterable[Row], starts: Iterable[Row]) -> dict[str, float]:
    """Seconds of each part by the rows of metrics.jsonl that count, all of them, and those of events.jsonl and startup.jsonl;
    only those that are on record."""

    def mean(name: str) -> float:
        return fmean(row.get(name) or 0.0 for row in rows)

    judged = mean("reward_seconds")
    waited = mean("wait_seconds") + mean("finish_seconds") + mean("rollout_seconds")
    known = waited + mean("sync_seconds") + mean("train_seconds")
    found = {
        "step": mean("step_seconds"),
        "rollouts": waited - judged,
        "rewards": judged,
        "host": max(0.0, mean("step_seconds") - known),
        "training": mean("train_seconds"),
        "weight sync": mean("sync_seconds"),
        "sampling": mean("generation_seconds"),
    }
    if all("score_seconds" in row for row in rows):
        found["reference"] = mean("score_seconds")
    written = [row for row in events if row.get("kind") == "activity" and row.get("what") == "checkpoint"]
    saved = {int(words[1]) for row in written if (words := row["about"].split())[1:2] and words[1].isdecimal()}
    between = {row["step"]: gap for before, row in pairwise(every) if (gap := _gap(before, row)) is not None}
    quiet = [gap for step, gap in between.items() if step not in saved]
    standing = [gap for step, gap in between.items() if step in saved]
    evaluations = [row["evaluation_seconds"] for row in every if row.get("evaluation_seconds")]
    first = [row["seconds"] for row in starts if row["step"] == 0]
    if quiet:
        found["records"] = median(quiet)
    if standing:
        found["checkpoint"] = max(0.0, median(standing) - found.get("records", 0.0))
    if written:
        found["checkpoint written"] = fmean(row["seconds"] for row in written)
    if evaluations:
        found["evaluation"] = fmean(evaluations)
    if first:
        found["start"] = first[0]
    return found


def _gap(before: Row, row: Row) -> float | None:
    """Seconds between the end of a step and the beginning of the next one; None where a restart was between."""
    if row["step"] != before["step"] + 1 or None in (row.get("unix_seconds"), before.get("unix_seconds")):
        return None
    gap = row["unix_seconds"] - before["unix_seconds"] - row["step_seconds"] - (row.get("evaluation_seconds") or 0.0)
    return float(gap) if gap >= 0 else None


def predicted(found: Forecast) -> dict[str, float]:
    """The same parts of a forecast, those that it knows."""
    each = {
        "step": found.step_seconds,
        **found.parts,
        "reference": found.train_parts["reference"] + found.train_parts["again"],
        "sampling": found.sampling_seconds,
        "checkpoint": found.checkpoint_seconds,
        "checkpoint written": found.checkpoint_disk_seconds,
        "start": found.start_seconds + found.step_seconds,
    }
    return each if found.evaluation_seconds is None else each | {"evaluation": found.evaluation_seconds}


def compared(said: Mapping[str, float], seen: Mapping[str, float]) -> tuple[Part, ...]:
    """Both, part by part; what a run did not do is left out."""
    return tuple(
        Part(name, about, "each" if name in EACH else "step", said.get(name), seen[name])
        for name, about in ABOUT.items()
        if name in seen
    )


def workload_of(rows: Many[Row], lengths: Many[int], config: RunConfig, path: str) -> Workload:
    """What a run was asked, by its records: `lengths` of responses, prompts and signal as its metrics have them."""
    cap, most = config.sampling.max_tokens, config.data.max_prompt_tokens
    prompts = fmean(row.get("prompt_tokens_mean") or most / 2 for row in rows)
    signal = 1.0 - fmean(row.get("skipped_share") or 0.0 for row in rows)
    return Workload(Recorded(tuple(sorted(lengths)), cap, path), LogNormal(max(1.0, prompts), 0.0, most), max(signal, 1e-3))


def recalibrated(
    forecast: Callable[[Constants], Forecast], seen: Mapping[str, float], constants: Constants, how: str
) -> dict[str, Measured]:
    """The constants with which the forecast of a run says of each part what its records say: those that make a part are scaled
    together until it does. ConfigError where the records hold no step."""
    if not seen.get("training"):
        raise ConfigError("--from-run must name a run with steps on record; found none: name another run")
    nothing = dict.fromkeys(("sync_seconds", "sleep_seconds", "start_seconds"), 0.0)
    scaled: set[str] = set()
    for _ in range(ROUNDS):
        said = predicted(forecast(constants))
        bare = predicted(forecast(constants.model_copy(update=nothing)))
        read = bare["start"] - bare["step"]
        rest = {"weight sync": bare["weight sync"], "start": said["step"] + read}  # that no constant of the part makes
        changed: dict[str, float] = {}
        for part, factors in MADE_OF.items():
            own, wanted = said.get(part, 0.0) - rest.get(part, 0.0), seen.get(part, 0.0) - rest.get(part, 0.0)
            if seen.get(part, 0.0) > WORTH * seen["step"] and own > 0:
                ratio = max(wanted, WORTH * own) / own
                changed |= {name: getattr(constants, name) * ratio**power for name, power in factors.items()}
        constants = constants.model_copy(update=_within(changed, constants))
        scaled |= changed.keys()
    return {
        name: Measured(value=getattr(constants, name), how=how)
        for name in Constants.model_fields
        if name in scaled or (name == "peak_teraflops" and "train_peak_share" in scaled)
    }


def _within(changed: dict[str, float], constants: Constants) -> dict[str, float]:
    """The constants with no share above 1: what is more is more of the peak, or of the memory's bandwidth, itself."""
    for names, whole in (
        (("train_peak_share", "decode_peak_share", "prefill_peak_share"), "peak_teraflops"),
        (("decode_memory_share",), "memory_gigabytes_per_second"),
    ):
        shares = {name: changed.get(name, getattr(constants, name)) for name in names}
        over = max(1.0, *shares.values())
        if over > 1:
            changed |= {name: share / over for name, share in shares.items()}
            changed[whole] = getattr(constants, whole) * over
    return changed
