"""What a checkpoint and the records of its run say of how a model was made: configuration, data, judgements, and an example of
how it was asked. It is read for the model card, card.py, which puts it into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError, DataError
from engine.core.jsonl import read_rows
from engine.data.templates import NAMED, PromptForm, encode_prompt, load_tokenizer, read_chat_template
from engine.observe.origin import Origin
from engine.observe.summary import EVALUATION
from engine.run.checkpoint import BEST, best, read_manifest


@dataclass(frozen=True)
class Made:
    """What a checkpoint and the records beside it say."""

    name: str  # of the run
    step: int
    config: Mapping[str, Any]  # the configuration, as JSON has it
    digests: Mapping[str, str | None]  # of data files and of what judges
    made_with: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]  # up to `step`, in their order
    samples: Sequence[Mapping[str, Any]]  # greedy answers of `step`
    findings: Sequence[Mapping[str, Any]]  # of the guard, before `step`
    times: tuple[float, float] | None  # Unix seconds of the first and the last step
    chosen: bool  # as the best of several
    fork: Origin | None = None  # where its run comes from, if from another

    @classmethod
    def read(cls, checkpoint: Path) -> Made:
        """Of a checkpoint's folder: its manifest, and the records of its run where it lies in one."""
        manifest, run = read_manifest(checkpoint), checkpoint.parent.parent
        step, named = int(manifest["step"]), str(manifest["config"]["run"]["directory"])

        def rows(name: str) -> Iterator[dict[str, Any]]:
            inside = checkpoint.parent.name == "checkpoints" and (run / name).exists()
            form: dict[str, Any] = EVALUATION if name == "evaluations.jsonl" else {"numbers": name == "metrics.jsonl"}
            return read_rows(run / name, **form) if inside else iter(())

        own, before = list(rows("evaluations.jsonl")), (manifest.get("records") or {}).get("judged", [])
        fork = Origin.from_json(manifest["fork"]) if "fork" in manifest else None
        # A fork's own records begin where it does; what its checkpoint knows of before is its origin's.
        judged = [row for row in before if not own or (fork is not None and row["step"] < fork.step)] + own
        seconds = list[float]()  # when the first and the last step ended
        for row in rows("metrics.jsonl"):
            if row["step"] < step and "unix_seconds" in row:
                seconds[1:] = [row["unix_seconds"]]
        pointer = checkpoint.parent / BEST
        return cls(
            name=Path(named).name,
            step=step,
            config=manifest["config"],
            digests=manifest["data"],
            made_with=manifest.get("made_with") or {},
            evaluations=[row for row in judged if row["step"] <= step],
            samples=[row for row in rows("samples.jsonl") if row["step"] == step],
            findings=[row for row in rows("guard.jsonl") if row["step"] < step],
            times=(seconds[0], seconds[-1]) if seconds else None,
            chosen=pointer.exists() and best(checkpoint.parent) == checkpoint,
            fork=fork,
        )

    @property
    def base(self) -> str:
        """What the model that training started from is called: its folder, or its name on the hub where that is the hub's own
        cache (`models--OWNER--NAME/snapshots/REVISION`)."""
        path = Path(self.config["model"]["path"])
        cached = next((part for part in path.parts if part.startswith("models--")), None)
        return cached.removeprefix("models--").replace("--", "/") if cached else path.name

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """The tables of the run's sources of prompts."""
        data = self.config["data"]
        return [data, *data.get("mix", ())]

    @property
    def forms(self) -> list[PromptForm]:
        """How the problems of each source are put; `chat_template` is what data.chat_template says."""
        data = self.config["data"]
        chat = data.get("chat_template", "tokenizer")
        named = [(NAMED.get(source["template"], source["template"]), source.get("system", "")) for source in self.sources]
        return [PromptForm(template, system, chat) for template, system in named]

    @cached_property
    def example(self) -> tuple[PromptForm, str, str | None]:
        """(form, problem, greedy answer) of one that was recorded and that `form` makes the recorded tokens of, else the first
        source's form, no problem and None."""
        forms = self.forms
        folder = Path(self.config["model"]["path"])
        if self.samples and folder.is_dir():
            tokenizer = load_tokenizer(folder)
            for sample in self.samples:
                for form in forms:
                    try:
                        chat = read_chat_template(form.chat_template or "tokenizer")
                        asked = PromptForm(form.template, form.system, chat)
                        found = encode_prompt(tokenizer, sample["problem"], asked)
                    except (ConfigError, DataError):
                        continue
                    if list(found) == sample["prompt_ids"]:
                        return form, sample["problem"], sample["text"]
        return forms[0], "", None
