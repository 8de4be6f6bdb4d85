"""How good a model is on problems: sets of held-out problems, or other files, sampled and judged on one start of the engines.
It prints nothing; whoever wants to follow it gives a function that is told of each set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.api.faults.look import parts_of
from engine.api.preflight import examine
from engine.config.load import RunConfig
from engine.config.options import Source
from engine.core.errors import ConfigError, combined
from engine.data.mixture import held_out_sources, load_prompts, longest_asked
from engine.data.rows import has_columns
from engine.data.templates import model_tokenizer
from engine.evaluation import accuracy, suites
from engine.inference.pool import Pool
from engine.rewards.registry import judging_of, open_rewards
from engine.run.processes import Cluster
from engine.run.spec import resolve

SAY_SECONDS = 10.0  # between two lines on how far an evaluation has come


class Evaluated(NamedTuple):
    """What an evaluation of a set came to."""

    figures: dict[str, Any]  # mean, standard error, pass@k and settings
    records: list[dict[str, Any]]  # one for each problem and sample


def evaluate(
    config: RunConfig,
    suite: Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    told: Callable[[str, Mapping[str, Any]], None] = lambda name, figures: None,
    verbose: bool = False,
) -> dict[str, Evaluated]:
    """Accuracy or mean reward of model.path by set: on every held_out of [data], judged as its source says, or on the files of
    `suite`, judged by Math-Verify.

    `output`: a folder that keeps records and figures; what is there with equal settings is not done again. `say` is told a line
    about each set, `told` its name and figures when it is done. Raises the SemionError of what the preflight or the engines
    found.
    """
    sets = asked_sets(config, suite)
    if faults := examine(config, "eval", sets=sets if suite else None):
        raise combined(faults)
    settings = {name: suites.settings_of(config, source) for name, source in sets.items()}
    folder = Path(output) if output else None
    done: dict[str, Evaluated] = {}
    for name in sets:
        if folder and (figures := suites.load_finished(folder, name, settings[name])):
            say(f"{name}: done before, with equal settings, in {folder}")
            done[name] = Evaluated(figures, suites.load_records(folder, name))
    if due := {name: source for name, source in sets.items() if name not in done}:
        done |= _sample(config, due, settings, folder, say, told, verbose)
    return {name: done[name] for name in sets}


def asked_sets(config: RunConfig, suite: Sequence[str | Path]) -> dict[str, Source]:
    """The sets to evaluate by name, as sources whose held_out they are; empty where nothing is held out. data.columns is of a
    suite whose first row has one of them; another suite is read by the usual names."""
    if isinstance(suite, (str, os.PathLike)) or not all(isinstance(path, (str, os.PathLike)) for path in suite):
        raise ConfigError(f"suite must be a list of files of problems; found {suite!r}: make it one")
    if suite:
        data = config.data
        return {
            name: Source(
                train=path,
                held_out=path,
                template=data.template,
                system=data.system,
                columns=data.columns if has_columns(path, data.columns) else None,
                reward="math",
            )
            for name, path in suites.suite_names([os.fspath(path) for path in suite]).items()
        }
    return {name: config.data.sources[place] for name, place in held_out_sources(config).items()}


def _sample(
    config: RunConfig,
    due: Mapping[str, Source],
    settings: Mapping[str, dict[str, Any]],
    folder: Path | None,
    say: Callable[[str], None],
    told: Callable[[str, Mapping[str, Any]], None],
    verbose: bool,
) -> dict[str, Evaluated]:
    """Each set on one start of the engines; written when it is done."""
    spec = resolve(config, parts_of(config, "eval", due), digests=False)
    tokenizer, longest = model_tokenizer(config, spec.shape.vocab_size), longest_asked(config)
    prompts = {
        name: load_prompts(config, source, str(source.held_out), judging_of(config, source), tokenizer, longest=longest)
        for name, source in due.items()
    }
    for name, found in prompts.items():
        say(f"{name}: {found}")
        if found.warning:
            say(f"{name}: warning: {found.warning}")
    done = {}
    with Cluster(spec, verbose=verbose, folder=folder) as cluster:
        pool = Pool(cluster.start_engines(), config.inference.timeout_seconds)
        sources = list(due.values())
        with open_rewards(config, cluster.start_judges(sources), sources) as reward:
            for name in due:
                asked = prompts[name]
                further = _further(name, len(asked.prompts[: config.evaluation.max_problems]), say)
                result = accuracy.evaluate(
                    config, asked.prompts, pool, reward, part_done=further, num_too_long=asked.num_dropped
                )
                left_out = {"num_duplicates": asked.num_duplicates}
                figures = {"suite": name, "settings": settings[name]} | result.summary() | left_out
                done[name] = Evaluated(figures, list(result.records))
                if folder:
                    suites.save(folder, name, *done[name])
                told(name, figures)
    return done


def _further(name: str, total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Says now and then how many problems of a set are done."""
    said = time.monotonic()

    def further(num_problems: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_SECONDS and num_problems < total:
            said = time.monotonic()
            say(f"{name}: {num_problems} of {total} problems")

    return further
