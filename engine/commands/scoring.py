"""`semion score`: judges the rows of a file with any reward, for people who want to check a verifier on their own data. It
needs no configuration file, and no engine but the reward model's; options of the reward are flags.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from engine.commands.common import write_figures
from engine.config.load import RunConfig, validated
from engine.config.options import RewardModel, RewardName, Rewards
from engine.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from engine.rewards.base import Reward

FIELDS = ("problem", "answer", "completion", "expected")
MAX_SHOWN = 20  # disagreeing rows in the table; the files have all
WORKERS = ("workers", "deadline_seconds", "memory_mebibytes")
FLAGS = ("unevaluated", "function", *WORKERS)  # options of [rewards]
TAKES = {"math": ("unevaluated", *WORKERS), "function": ("function", *WORKERS), "model": ("reward_model", "max_tokens")}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("file", help="JSONL or parquet; a row has answer and completion, and may have problem and expected")
    parser.add_argument("--reward", required=True, choices=["math", "function", "model"], help="what judges")
    parser.add_argument("--unevaluated", choices=["accept", "refuse"], help="expressions left to compute (accept)")
    parser.add_argument("--function", metavar="PLACE:NAME", help="path/to/file.py:name or package.module:name")
    parser.add_argument("--reward-model", metavar="FOLDER", help="the reward model, as reward_model.path")
    parser.add_argument("--max-tokens", type=int, help="of a conversation for the reward model (4096)")
    parser.add_argument("--workers", type=int, help="processes that judge (1)")
    parser.add_argument("--deadline-seconds", type=float, help="longest judging of one answer (2)")
    parser.add_argument("--memory-mebibytes", type=int, help="address space of one worker (3072)")
    parser.add_argument("--output", metavar="FILE", help="JSONL file to make: each row with its score and status")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")


def score(options: argparse.Namespace) -> None:
    """Scores the file, prints a table, and writes what was asked for."""
    from engine.observe.progress import print_table

    if options.output and Path(options.output).exists():
        raise ConfigError(f"--output must be a new file; found {options.output}: name another")
    flags = {name: getattr(options, name) for name in (*FLAGS, *TAKES["model"])}
    given = {name: value for name, value in flags.items() if value is not None}
    figures, scored = score_file(options.file, options.reward, **given)
    if options.output:
        with Path(options.output).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in scored)
    print_table(f"semion score {options.file}", table(figures))
    if figures["disagreeing"]:
        print_table("rows that disagree", disagreements(figures["disagreeing"]))
    write_figures(figures, None, options.json)


def score_file(file: str, reward: str, **flags: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the figures of a file's rows under a reward, its rows with their score and status). `flags`: the reward's options, named
    as the flags of `semion score`.

    ConfigError for a flag of another reward, DataError for a row that cannot be judged.
    """
    from engine.core.types import Prompt
    from engine.rewards.registry import open_reward

    check_flags(reward, flags)
    rewards = validated(Rewards, "rewards", {name: value for name, value in flags.items() if name in FLAGS})
    records, rows = load(file)
    items = [(Prompt(str(row["row"]), (), row["problem"], row["answer"], "", "", reward), row["completion"]) for row in rows]
    name = next(name for name in get_args(RewardName) if name == reward)
    with closing(open_reward(name, rewards)) if reward != "model" else reward_model(file, flags) as judge:
        results = [{"score": given.value, "status": given.status} for given in judge.score(items)]
    figures = {"file": file, "reward": reward, "versions": versions()}
    figures |= measure([row | result for row, result in zip(rows, results, strict=True)])
    return figures, [record | result for record, result in zip(records, results, strict=True)]


def check_flags(reward: str, flags: Mapping[str, Any]) -> None:
    """ConfigError for a flag of another reward, which would change nothing."""
    if reward not in TAKES:
        raise ConfigError(f"--reward must be one of {', '.join(TAKES)}; found {reward!r}: choose one")
    for name in flags:
        if name not in TAKES[reward]:
            takers = " or ".join(other for other, names in TAKES.items() if name in names)
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is of --reward {takers or 'none'}; found it beside --reward {reward}: leave it out")


@contextmanager
def reward_model(file: str, flags: Mapping[str, Any]) -> Iterator[Reward]:
    """The reward model of the flags on an engine of its own. ConfigError when the flags name none, or one that cannot judge."""
    if "reward_model" not in flags:
        raise ConfigError("--reward model needs --reward-model; found none: name the reward model's folder")
    from engine.data.conversations import Conversations
    from engine.rewards.model import ModelReward
    from engine.run.processes import Cluster
    from engine.run.spec import resolve

    table = {"path": flags["reward_model"]} | {name: value for name, value in flags.items() if name == "max_tokens"}
    validated(RewardModel, "reward_model", table)
    unused = {"run": {"directory": "unused", "steps": 1}, "model": {"path": flags["reward_model"]}}
    source = {"train": file, "reward": "model"}
    config = RunConfig.model_validate(unused | {"data": source, "reward_model": table})
    Conversations(config.reward_model)
    with Cluster(resolve(config, ("reward_engine",), digests=False)) as cluster:
        engine = cluster.start_reward_engine()
        assert engine is not None
        with closing(ModelReward(engine, config.reward_model.timeout_seconds)) as reward:
            yield reward


def load(path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(The rows of the file as they are, what is scored of them: `row` counts from 1.) DataError names file and row."""
    from engine.data.records import records
    from engine.data.rows import text_of

    found, rows = [], []
    for number, (where, record) in enumerate(records(path, FIELDS), start=1):
        if not isinstance(record, dict):
            raise DataError(f"{where}: a row must be a JSON object with named fields; found {record!r:.80}: mend it")
        if not isinstance(record.get("completion"), str):
            raise DataError(f"{where}: `completion` must be a text; found {record.get('completion')!r:.80}: add it")
        expected = record.get("expected")
        if expected is not None and not (isinstance(expected, (int, float)) and math.isfinite(expected)):
            raise DataError(f"{where}: `expected` must be a finite number; found {expected!r:.80}: mend it, or remove it")
        texts = {name: text_of(where, record, name, numbers=name == "answer") for name in FIELDS[:3]}
        found.append(record)
        rows.append({"row": number, "expected": expected} | texts)
    if not rows:
        raise DataError(f"{path}: a data file must hold at least one row; found none: check how it was written")
    return found, rows


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


def versions() -> dict[str, str]:
    """What the verdicts of Math-Verify depend on."""
    from engine.rewards.math.reward import VERIFIER_VERSION

    return {"verifier": VERIFIER_VERSION} | {name: version(name) for name in ("math-verify", "sympy")}


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
