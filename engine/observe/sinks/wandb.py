"""Weights & Biases: one W&B run for each run of ours, gone on with under the same id. Project, entity, key and mode are what
W&B's own environment variables say (WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY, WANDB_MODE); it captures no output and sends no
code.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from engine.observe.sinks.base import End, Followed, Sink, figures

PROJECT = "semion"  # where WANDB_PROJECT is not set


class WeightsAndBiases(Sink):
    """Logs each step of ours as one of W&B's; an evaluation after k steps is part of step k."""

    packages: ClassVar[tuple[str, ...]] = ("wandb",)

    @classmethod
    def missing(cls) -> str | None:
        """The package, or a key where W&B is to be asked online."""
        return super().missing() or (None if _works_offline() or _has_key() else NO_KEY)

    def open(self, run: Followed) -> str:
        """Starts a W&B run or goes on with it; raises W&B's errors, which are `failures`, where it cannot be reached."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.failures = (wandb.Error,)  # an OSError: its own process has died, and only a new process of ours gets another
        self._table, self._texts = wandb.Table, list[str]()
        name = run.known or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=run.name,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.options),
            allow_val_change=True,  # of the options that a resumed run may have otherwise
            settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
        )
        units = {name: told["unit"] for name, told in run.metrics.items() if told["unit"]}
        self._run.config.update({"units": units}, allow_val_change=True)
        return name

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every finite value, under the names of metrics.jsonl."""
        for row in rows:
            self._run.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Values evaluation/SET/..., and the newest in the summary."""
        self._run.log(figures(row), step=row["step"])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of the answers."""
        shown = ("set", "problem", "answer", "text")
        data = [[step, *(str(row.get(name, "")) for name in shown)] for row in rows]
        self._run.log({"samples": self._table(columns=["step", *shown], data=data)}, step=step)

    def finding(self, row: Mapping[str, Any]) -> None:
        """An alert, which W&B can mail, and a line of the summary."""
        self._texts.append(f"step {row['step']}, {row['kind']}: {row['text']}")
        self._run.summary["findings"] = self._texts
        self._run.alert(title=f"{row['kind']}, step {row['step']}", text=row["text"])

    def close(self, end: End) -> None:
        """Finished, or failed with what ended it in the summary; a stopped run is marked as one that will go on."""
        self._run.summary["end"] = end.state
        if end.text:
            self._run.summary["ended_by"] = end.text
        if end.state == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if end.state == "finished" else 1)


NO_KEY = "there is no API key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline and `wandb sync` later"


def _works_offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")


def _has_key() -> bool:
    """Whether there is a key where W&B looks for one; the key itself is not kept."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return file.is_file() and netrc.netrc(file).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False
