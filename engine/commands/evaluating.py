"""`semion eval`, `semion generate` and `semion judge`: how good a model is, on problems with an answer and on questions
without one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.commands.common import shown, write_figures
from engine.config.load import load_config
from engine.core.errors import ConfigError, InferenceError


def evaluate_model(options: argparse.Namespace) -> None:
    """Accuracy or mean reward of model.path on every held_out of [data], judged as its source says, or accuracy on --suite,
    judged by Math-Verify."""
    _take_model(options)
    config = load_config(options.config, options.overrides)
    from engine.api.evaluating import evaluate

    def say(text: str) -> None:
        print(text, flush=True)

    def told(name: str, figures: Mapping[str, Any]) -> None:
        say(f"{name}: {figures['measure']} {shown(figures, 'mean')} ± {shown(figures, 'standard_error')}")

    suite = options.suite or ()
    done = evaluate(config, suite, output=options.output, say=say, told=told, verbose=options.verbose)
    _print_sets(config.model.path, {name: found.figures for name, found in done.items()})
    if len(done) > 1 or suite:
        write_figures({"suites": {name: found.figures for name, found in done.items()}}, options.json)
    else:
        (only,) = done.values()
        write_figures(only.figures | {"records": only.records}, options.json)


def _print_sets(model: str, found: dict[str, dict[str, Any]]) -> None:
    """A column a set: six values of k beside one another would not fit a terminal."""
    from engine.observe.progress import print_table

    every = found.values()
    ks = sorted({int(k) for figures in every for k in figures["pass_at"]})
    rows = [
        ("figure", *found),
        ("measure", *(f["measure"] for f in every)),
        ("mean ± s.e.", *(f"{shown(f, 'mean')} ± {shown(f, 'standard_error')}" for f in every)),
        ("over seeds", *(f"± {shown(f, 'seed_spread')}" for f in every)),
        *((f"pass@{k}", *(f"{f['pass_at'][str(k)]:.1%}" if str(k) in f["pass_at"] else "-" for f in every)) for k in ks),
        ("truncated", *(f"{f['truncated']:.1%}" for f in every)),
        ("tokens", *(f"{f['completion_tokens_mean']:.1f}" for f in every)),
        ("problems × seeds", *(f"{f['num_problems']} × {f['num_seeds']}" for f in every)),
    ]
    print_table(f"evaluation of {model}", rows)


def generate(options: argparse.Namespace) -> None:
    """Answers every question of a benchmark once, in its own format."""
    _take_model(options)
    config = load_config(options.config, options.overrides)
    from engine.api.preflight import check
    from engine.benchmarks.answers import SUFFIX, write_answers
    from engine.benchmarks.open_ended import prompts_of, sample_answers
    from engine.benchmarks.questions import load_questions
    from engine.inference.pool import Pool
    from engine.run.processes import Cluster

    output = Path(options.output)
    if output.exists() or output.suffix != SUFFIX[options.format]:
        raise ConfigError(
            f"--output must be a new file that ends in {SUFFIX[options.format]}, as --format {options.format} wants; found "
            f"{output}: name another"
        )
    spec = check(config, "generate")
    questions = load_questions(options.questions)
    prompts = prompts_of(config, questions)
    name = options.name or Path(config.model.path).resolve().name
    with Cluster(spec, verbose=options.verbose, folder=output.parent) as cluster:
        pool = Pool(cluster.start_engines(), config.inference.timeout_seconds)
        completions = sample_answers(config, prompts, pool)
    lengths = [len(completion.token_ids) for completion in completions]
    said = [(completion.text, length) for completion, length in zip(completions, lengths, strict=True)]
    write_answers(output, options.format, questions, said, name)
    figures = {
        "name": name,
        "num_questions": len(questions),
        "completion_tokens_mean": sum(lengths) / len(lengths),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
    }
    print(f"{output}: {len(questions)} answers of {name}, {figures['completion_tokens_mean']:.1f} tokens in the mean")
    write_figures(figures, options.json)


def judge(options: argparse.Namespace) -> None:
    """Win rates of one file of answers against another's. InferenceError, after the figures, when some were not judged."""
    from engine.benchmarks import win_rate
    from engine.benchmarks.answers import load_answers
    from engine.benchmarks.endpoint import open_endpoint
    from engine.benchmarks.judge import games_of, judge
    from engine.benchmarks.questions import load_questions

    if options.concurrency < 1:
        raise ConfigError(f"--concurrency must be above 0; found {options.concurrency}: raise it")
    _check_ledger(options)
    endpoint = open_endpoint(options.endpoint, options.model, options.key_env, options.timeout_seconds)
    questions = load_questions(options.questions) if options.questions else None
    answers, baseline = load_answers(options.answers, questions), load_answers(options.against, questions)
    if options.length_controlled:
        win_rate.check_length_control(answers)
    names = {"model": answers[0].generator, "baseline": baseline[0].generator, "judge": options.model}
    games = games_of(answers, baseline, endpoint)
    judged, failed = judge(games, endpoint, Path(options.output), options.concurrency, names)
    missing = InferenceError(
        f"{len(games) - len(judged)} of {len(games)} comparisons have no reply and count nowhere, the first because "
        f"{next(iter(failed), 'none was made')}; run the command again to ask for those only"
    )
    if failed and not judged:
        raise missing
    figures = names | win_rate.win_rates(judged) | {"num_failed": len(games) - len(judged)}
    if options.length_controlled:
        figures |= win_rate.length_controlled(judged, answers, baseline, options.model)
    _print_win_rates(figures)
    write_figures(figures, options.json)
    if failed:
        raise missing


def _check_ledger(options: argparse.Namespace) -> None:
    """ConfigError when --output, where replies are kept, is a file of another use."""
    others = {"--against": options.against, "--questions": options.questions, "--json": options.json}
    for name, path in {"ANSWERS": options.answers, **others}.items():
        if path is not None and Path(path).resolve() == Path(options.output).resolve():
            raise ConfigError(f"--output must be a file of its own; found {options.output}, which is also {name}: name another")


def _print_win_rates(f: dict[str, Any]) -> None:
    from engine.observe.progress import print_table

    low, high = f["arena_interval"]
    rows = [
        ("figure", "value"),
        ("win rate", f"{f['win_rate']:.1%} ± {f['standard_error']:.1%}"),
        ("strong verdicts thrice", f"{f['arena_score']:.1%} ({low:.1%} to {high:.1%})"),
        ("win rate of the first answer", f"{f['first_win_rate']:.1%}"),
        ("questions, comparisons", f"{f['num_questions']}, {f['num_games']}"),
        ("unreadable, without reply", f"{f['num_unparsable']}, {f['num_failed']}"),
    ]
    if "length_controlled_win_rate" in f:
        shown = f"{f['length_controlled_win_rate']:.1%} ± {f['length_controlled_standard_error']:.1%}"
        rows.append(("length-controlled win rate", shown))
    print_table(f"{f['model']} against {f['baseline']}, judged by {f['judge']}", rows)


def _take_model(options: argparse.Namespace) -> None:
    if options.model is not None:
        from engine.models.config_file import require_folder

        require_folder(options.model, "--model")
        options.overrides.append(f"model.path={json.dumps(options.model, ensure_ascii=False)}")
