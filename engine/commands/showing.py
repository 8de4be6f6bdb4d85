"""`semion show`: rollouts of a run to read, each beside its problem and its right answer. It starts nothing, changes nothing,
and needs no run to have ended.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from engine.config.load import RunConfig, load_config
from engine.core.errors import DataError
from engine.data.rows import Row, identity, problem_id, read_rows
from engine.observe.answers import NOT_KEPT
from engine.observe.rollouts import rollouts_of
from engine.rollouts.ledger import RolloutLedger, RolloutRow


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which rollouts are shown."""
    parser.add_argument("run", metavar="RUN", help="a run's directory")
    parser.add_argument("--step", type=int, metavar="N", help="rollouts of this step (the last one on record)")
    parser.add_argument("--prompt", metavar="ID", help="of this prompt alone")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--worst", action="store_true", help="prompts with the lowest mean reward first")
    order.add_argument("--best", action="store_true", help="prompts with the highest mean reward first")
    parser.add_argument("--prompts", type=_count, default=3, metavar="N", help="how many prompts are shown (3)")
    parser.add_argument("--samples", type=_count, default=4, metavar="N", help="how many answers to each (4)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number, 1 or more; found {text!r}")
    return int(text)


def show(options: argparse.Namespace) -> None:
    """Prints the rollouts of a step by prompt."""
    directory = Path(options.run)
    place = rollouts_of(directory)
    if not (directory / "config.toml").is_file() or place is None:
        raise DataError(
            f"RUN must be the directory of a run that sampled, with config.toml and rollouts; found neither or one in "
            f"{directory}: name a run.directory"
        )
    config = load_config(directory / "config.toml")
    ledger = RolloutLedger(place)
    step = options.step if options.step is not None else max(ledger.steps, default=0)
    if step not in ledger:
        found = f"steps {ledger.steps.start}..{ledger.steps.stop - 1}" if ledger.steps else "no step"
        raise DataError(f"--step must be on record in {ledger.path}; found {found} and not {step}: name another")
    groups: dict[str, list[RolloutRow]] = {}
    for row in ledger.read(step):
        groups.setdefault(row.prompt_id, []).append(row)
    if options.prompt is not None and options.prompt not in groups:
        raise DataError(f"--prompt must be one of step {step}; found {options.prompt!r}: they are {', '.join(groups)}")
    chosen = [options.prompt] if options.prompt is not None else _ordered(groups, options)[: options.prompts]
    asked = _asked(config, set(chosen))
    console = Console()
    for prompt_id in chosen:
        console.print(_group(prompt_id, asked.get(prompt_id), groups[prompt_id], options.samples))
    left = len(groups) - len(chosen)
    console.print(Text(f"step {step}: {len(chosen)} of {len(groups)} prompts{'; --prompts N shows more' if left else ''}"))


def _ordered(groups: dict[str, list[RolloutRow]], options: argparse.Namespace) -> list[str]:
    if not options.worst and not options.best:
        return list(groups)
    judged = {name: [row.reward for row in rows if row.status == "ok"] for name, rows in groups.items()}
    means = {name: sum(rewards) / len(rewards) for name, rewards in judged.items() if rewards}
    return [*sorted(means, key=lambda name: means[name], reverse=options.best), *(name for name in groups if name not in means)]


def _asked(config: RunConfig, wanted: set[str]) -> dict[str, Row]:
    """The rows of the training files that these prompts were made of; a file that has gone or changed has fewer."""
    found: dict[str, Row] = {}
    for source in config.data.sources:
        if not Path(source.train).exists():
            continue
        for row in read_rows(source.train, needs_answer=False, columns=source.columns):
            if isinstance(row, Row):
                name = row.id or problem_id(identity(row.problem, row.messages))
                if name in wanted:
                    found.setdefault(name, row)
    return found


def _group(prompt_id: str, row: Row | None, rollouts: Iterable[RolloutRow], samples: int) -> Panel:
    """A prompt and some answers to it. Nothing of what a file or a model says is taken for markup."""
    parts: list[Text | Rule] = []
    if row is None:
        parts.append(Text("(its row is no longer in the training data)", style="dim"))
    else:
        parts += [Text(f"{role}: {text}", style="dim") for role, text in row.messages[:-1]]
        parts.append(Text(row.problem, style="bold"))
        parts.append(Text(f"right answer: {row.answer}" if row.answer else "no right answer on record", style="dim"))
    shown = list(rollouts)
    for rollout in shown[:samples]:
        verdict = f"reward {rollout.reward:g}" if rollout.status == "ok" else f"not judged: {rollout.status}"
        cut = ", cut off at sampling.max_tokens" if rollout.finish_reason == "length" else ""
        parts.append(Rule(Text(f"answer {rollout.sample_index}: {verdict}, {rollout.num_tokens} tokens{cut}"), align="left"))
        parts.append(Text(rollout.text if rollout.text is not None else NOT_KEPT))
    if len(shown) > samples:
        parts.append(Rule(Text(f"{len(shown) - samples} more; --samples N shows them"), align="left"))
    return Panel(Group(*parts), title=Text(f"prompt {prompt_id}"), title_align="left")
