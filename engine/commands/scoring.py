"""`semion score`: judges the rows of a file with any reward, for people who want to check a verifier or a function of their own
on their own data. It needs no configuration file, and no engine but the reward model's; options of the reward are flags.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands.common import write_figures
from engine.config.load import RunConfig, validated
from engine.config.options import RewardModel, Rewards
from engine.config.rewards import REWARDS
from engine.core.arrays import NO_TOKENS
from engine.core.errors import ConfigError, DataError, combined
from engine.core.files import atomic_write

if TYPE_CHECKING:
    from engine.core.types import Score
    from engine.rewards.base import Answer
    from engine.rewards.registry import RoutedReward

FIELDS = ("problem", "answer", "completion", "expected", "num_tokens", "finish_reason")
MAX_SHOWN = 20  # disagreeing rows in the table; the files have all
UNJUDGED = {  # what a row's status means
    "timeout": "longer than --deadline-seconds",
    "died": "its process ended: an exit, a crash, or more than --memory-mebibytes",
}
OF_REWARDS = ("unevaluated", "function", "environment", "workers", "concurrency", "deadline_seconds", "memory_mebibytes")
OF_MODEL = ("reward_model", "max_tokens")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "file", metavar="FILE", help="JSONL or parquet; a row has answer and completion, and may have problem and expected"
    )
    own = "path/to/file.py:name or package.module:name"
    parser.add_argument("--reward", required=True, metavar="NAME", help=f"what judges, as data.reward: math, model or {own}")
    parser.add_argument("--unevaluated", choices=["accept", "refuse"], help="expressions left to compute (accept)")
    parser.add_argument("--function", metavar="PLACE:NAME", help="of --reward function; --reward PLACE:NAME says the same")
    parser.add_argument("--environment", metavar="VARIABLE", action="append", help="that functions may see; may be repeated")
    parser.add_argument("--reward-model", metavar="FOLDER", help="the reward model, as reward_model.path")
    parser.add_argument("--max-tokens", type=int, help="of a conversation for the reward model (4096)")
    parser.add_argument("--workers", type=int, help="processes that judge (one a core, 64 at most)")
    parser.add_argument("--concurrency", type=int, help="answers at once in each of them (1)")
    parser.add_argument(
        "--deadline-seconds",
        type=float,
        help="longest judging of one answer: CPU time of 'math', wall-clock time of a function (2)",
    )
    parser.add_argument("--memory-mebibytes", type=int, help="address space of one worker (3072)")
    parser.add_argument("--output", metavar="FILE", help="JSONL file to make: each row with its score and status")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")


def score(options: argparse.Namespace) -> None:
    """Scores the file, prints a table, and writes what was asked for."""
    from engine.observe.progress import print_table

    if options.output and Path(options.output).exists():
        raise ConfigError(f"--output must be a new file; found {options.output}: name another")
    flags = {name: getattr(options, name) for name in (*OF_REWARDS, *OF_MODEL)}
    given = {name: value for name, value in flags.items() if value is not None}
    figures, scored = score_file(options.file, options.reward, **given)
    if options.output:
        with atomic_write(options.output) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in scored)
    print_table(f"semion score {options.file}", table(figures))
    if figures["disagreeing"]:
        print_table("rows that disagree", disagreements(figures["disagreeing"]))
    write_figures(figures, None, options.json)
    if figures["mean"] is None:
        statuses = ", ".join(f"{count} {status}" for status, count in figures["statuses"].items())
        first = next((row["error"] for row in scored if row["status"] != "ok" and row.get("error")), "")
        raise DataError(
            f"{options.file}: at least one row must be judged; found {statuses}: mend the reward or the rows"
            + "".join(f" ({status}: {why})" for status, why in UNJUDGED.items() if status in figures["statuses"])
            + (f"; the first was given up for {brief_error(first)}" if first else "")
        )


def brief_error(text: str) -> str:
    """The last line of a traceback that says something, in a line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return " ".join(lines[-1].split()[:40]) if lines else ""


def score_file(file: str, reward: str, **flags: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the figures of a file's rows under a reward, its rows with their score and status). `flags`: the reward's options, named
    as the flags of `semion score`.

    ConfigError for a flag of another reward, DataError for a row that cannot be judged.
    """
    from engine.rewards.math.reward import versions
    from engine.rewards.registry import judging_of

    check_flags(reward, flags)
    config = config_of(file, reward, flags)
    records, rows = load(file, every_column=judging_of(config, config.data).wants_row)
    with opened(config) as judge:
        results = [result_of(given) for given in judge.score(answers_of(config, records, rows))]
    figures = {"file": file, "reward": reward, "versions": versions()}
    figures |= measure([row | result for row, result in zip(rows, results, strict=True)])
    return figures, [record | result for record, result in zip(records, results, strict=True)]


def check_flags(reward: str, flags: Mapping[str, Any]) -> None:
    """ConfigError for a flag of another reward, which would change nothing, and without the reward model's folder."""
    takes = {name: REWARDS.load(name).OPTIONS for name in REWARDS.names}
    own = tuple(name for name in takes["function"] if name != "function")
    for name in flags:
        if name not in takes.get(reward, own):
            takers = " or ".join(other for other, names in takes.items() if name in names)
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is of --reward {takers or 'none'}; found it beside --reward {reward}: leave it out")
    if "reward_model" in takes.get(reward, own) and "reward_model" not in flags:
        raise ConfigError(f"--reward {reward} needs --reward-model; found none: name the reward model's folder")


def config_of(file: str, reward: str, flags: Mapping[str, Any]) -> RunConfig:
    """The flags as the configuration of a run that only judges. ConfigError names the option that cannot be."""
    if ":" not in reward and reward not in REWARDS.names:
        fix = f"write {reward}:NAME, with the function's name" if reward.endswith(".py") else "choose one"
        raise ConfigError(
            f"--reward must be one of {', '.join(REWARDS.names)}, or your own as path/to/file.py:name or package.module:name; "
            f"found {reward!r}: {fix}"
        )
    if reward == "function" and "function" not in flags:
        raise ConfigError("--reward function needs --function; found none: name path/to/file.py:name")
    rewards = {name: flags[name] for name in OF_REWARDS if name in flags}
    reward_model = {key: flags[name] for name, key in (("reward_model", "path"), ("max_tokens", "max_tokens")) if name in flags}
    with as_flags("rewards"):
        validated(Rewards, "rewards", rewards)
    with as_flags("reward_model"):
        validated(RewardModel, "reward_model", reward_model)
    unused = {"run": {"directory": "unused", "steps": 1}, "model": {"path": flags.get("reward_model", "unused")}}
    data = {"train": file, "reward": reward}
    return validated(RunConfig, "", unused | {"data": data, "rewards": rewards, "reward_model": reward_model})


@contextmanager
def as_flags(section: str) -> Iterator[None]:
    """A ConfigError of a section names the flag that its option was given by."""
    try:
        yield
    except ConfigError as error:
        names = {f"{section}.{name}": f"--{name.replace('_', '-')}" for name in (*OF_REWARDS, *OF_MODEL)}
        names["reward_model.path"] = "--reward-model"
        said = [str(fault) for fault in error.faults]
        raise combined(
            [ConfigError(names.get(key, key) + text.removeprefix(key)) for text in said for key in [text.partition(":")[0]]]
        ) from error


@contextmanager
def opened(config: RunConfig) -> Iterator[RoutedReward]:
    """The reward of the flags, with an engine where it judges on one. ConfigError when it cannot judge."""
    from engine.rewards.registry import checks, open_rewards, uses_engine

    for check in checks(config):
        check()
    if not uses_engine(config.data.sources):
        with open_rewards(config) as reward:
            yield reward
        return
    from engine.run.processes import Cluster
    from engine.run.spec import resolve

    spec = resolve(config, ("reward_engine",), digests=False)
    with Cluster(spec) as cluster, open_rewards(config, cluster.start_judges()) as reward:
        yield reward


def load(path: str, every_column: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(The rows of the file as they are, what is scored of them: `row` counts from 1.) DataError names file and row."""
    from engine.data.forms import text_of
    from engine.data.records import records
    from engine.data.rows import columns_of

    found, rows = [], []
    for number, (where, record) in enumerate(records(path, None if every_column else FIELDS), start=1):
        if not isinstance(record, dict):
            raise DataError(f"{where}: a row must be a JSON object with named fields; found {record!r:.80}: mend it")
        if not isinstance(record.get("completion"), str):
            raise DataError(f"{where}: `completion` must be a text; found {record.get('completion')!r:.80}: add it")
        expected = record.get("expected")
        if expected is not None and not (isinstance(expected, (int, float)) and math.isfinite(expected)):
            raise DataError(f"{where}: `expected` must be a finite number; found {expected!r:.80}: mend it, or remove it")
        num_tokens, reason = record.get("num_tokens"), record.get("finish_reason")
        if num_tokens is not None and (not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 0):
            raise DataError(f"{where}: `num_tokens` must be a whole number, 0 or more; found {num_tokens!r:.80}: mend it")
        if reason not in (None, "stop", "length"):
            raise DataError(f"{where}: `finish_reason` must be 'stop' or 'length'; found {reason!r:.80}: mend it, or remove it")
        texts = {name: text_of(where, record, name, numbers=name == "answer") for name in FIELDS[:3]}
        found.append(record)
        columns = columns_of(where, record) if every_column else ""
        rows.append({"row": number, "expected": expected, "columns": columns, **texts})
    if not rows:
        raise DataError(f"{path}: a data file must hold at least one row; found none: check how it was written")
    return found, rows


def answers_of(config: RunConfig, records: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Answer]:
    """What is judged. Rows of one problem and answer are one group; `num_tokens` and `finish_reason` are the row's, where it
    has them, as the records of an evaluation do."""
    from engine.core.types import Prompt
    from engine.rewards.base import Answer

    first: dict[tuple[str, str], int] = {}
    answers = []
    for record, row in zip(records, rows, strict=True):
        group = first.setdefault((row["problem"], row["answer"]), row["row"])
        texts = row["problem"], row["answer"], "", ""
        prompt = Prompt(str(group), NO_TOKENS, *texts, config.data.judge, row=row["columns"])
        answers.append(Answer(prompt, row["completion"], record.get("num_tokens"), record.get("finish_reason"), group))
    return answers


def result_of(given: Score) -> dict[str, Any]:
    """What a row is given: score and status, and only where there are any the parts and the error."""
    result: dict[str, Any] = {"score": given.value, "status": given.status}
    if given.parts:
        result["parts"] = dict(given.parts)
    if given.problem:
        result["error"] = given.problem
    return result


def measure(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of scored rows: `mean` over those that could be judged, `agreement` over those of them that say what is expected;
    `unjudged` say so too, but have no verdict that could agree: their score of 0 stands for none."""
    judged = [row["score"] for row in rows if row["status"] == "ok"]
    expecting = [row for row in rows if row["expected"] is not None]
    compared = [row for row in expecting if row["status"] == "ok"]
    disagreeing = [row for row in compared if not math.isclose(row["score"], row["expected"])]
    return {
        "rows": len(rows),
        "mean": math.fsum(judged) / len(judged) if judged else None,
        "statuses": dict(Counter(row["status"] for row in rows).most_common()),
        "expecting": len(expecting),
        "unjudged": len(expecting) - len(compared),
        "agreement": 1 - len(disagreeing) / len(compared) if compared else None,
        "disagreeing": disagreeing,
    }


def table(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table that people see."""
    mean = "none judged" if figures["mean"] is None else f"{figures['mean']:.4f}"
    statuses = ", ".join(f"{count} {status}" for status, count in figures["statuses"].items())
    if figures["agreement"] is None:
        share = f"none of {figures['expecting']} judged" if figures["expecting"] else "no row says"
    else:
        unjudged = f", {figures['unjudged']} unjudged" if figures["unjudged"] else ""
        share = f"{figures['agreement']:.2%} of {figures['expecting'] - figures['unjudged']}{unjudged}"
    heading = ("reward", "rows", "mean", "statuses", "agreement with `expected`")
    return [heading, (figures["reward"], str(figures["rows"]), mean, statuses, share)]


def disagreements(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The first of the rows whose score is not what they expect."""
    shown = [
        (
            *(str(row["row"]), f"{row['expected']:g}", f"{row['score']:g}", row["status"]),
            *(row["answer"][:30], row["completion"][-60:]),
        )
        for row in rows[:MAX_SHOWN]
    ]
    more = [(f"and {len(rows) - MAX_SHOWN} more", *[""] * 5)] if len(rows) > MAX_SHOWN else []
    return [("row", "expected", "score", "status", "answer", "end of the completion"), *shown, *more]
