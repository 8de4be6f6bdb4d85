"""Everything about a run that can be seen wrong before a process starts: files, rows, tokenizer, headers of weights, rewards,
checkpoints to resume from, disk and memory. All faults are told at once. It opens no device, starts no Ray and no engine, and
writes nothing; of large files it reads a sample, so that it takes seconds.

`semion check` is this and a table; train, sft, eval, rollout and generate run it first, each with what it needs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jinja2 import TemplateError

from engine.bridge.setup import shared_bytes
from engine.bridge.transports.base import room_for
from engine.bridge.transports.registry import choose
from engine.capacity.memory import GIB, MIB, TrainerState, kv_bytes_per_token
from engine.config.load import RunConfig, dump_config
from engine.config.options import Source, source_key
from engine.config.placement import Part, place, training_parts
from engine.config.transport import setting
from engine.core.errors import CheckpointError, ConfigError, DataError, SemionError, combined
from engine.data.conversations import Conversations
from engine.data.mixture import naming, prompt_form
from engine.data.preferences import FIELDS as PAIR_FIELDS
from engine.data.preferences import pair_texts
from engine.data.records import HUB, check_source, sampled
from engine.data.rows import Row, identity, load_rows, sample_rows, wanted_fields
from engine.data.supervised import completion_tokens
from engine.data.templates import LeftOut, PromptForm, encode_prompt, fit_prompt, load_tokenizer
from engine.data.tokens import stays_text
from engine.megatron.libraries import check_installed
from engine.models.base import ModelShape
from engine.models.checks import check_engine_layout, check_layout
from engine.models.headers import num_elements, weight_faults
from engine.models.hf import check_destination, read_end_ids, read_shape
from engine.models.sharding import engine_layout, shard_shapes, trainer_layout
from engine.observe.profiling import nsight
from engine.rewards.registry import check_pairing, checks, judging_of, uses_engine
from engine.rollouts.ledger import RolloutLedger
from engine.rollouts.replay import replay_kind
from engine.run.checkpoint import check_prolonged, latest, other_data, other_options, read_manifest
from engine.run.machine import visible_gpus
from engine.run.metrics import catalogue
from engine.run.spec import Spec, assemble, resolve

Purpose = Literal["train", "sft", "rollout", "eval", "generate"]
Faults = Iterable[SemionError]
Check = Callable[..., Faults | None]
Made = TypeVar("Made")

KV_BLOCK = 16  # tokens that vLLM keeps together at least
LARGE_LEDGER_BYTES = 256 << 20  # a longer one is looked at when the run reads it


def check(config: RunConfig, purpose: Purpose | None = None, *, resume: bool = False) -> Spec:
    """The run as resolved, when nothing can be seen wrong with it. `purpose`: what is to be done with the configuration, to
    train where not said (supervised, where sft.checkpoint_out makes it that); `resume`: with --resume auto.

    Raises the SemionError whose `faults` are all that was found, of the first one's class.
    """
    purpose = purpose or purpose_of(config)
    if faults := examine(config, purpose, resume=resume):
        raise combined(faults)
    return resolve(config, parts_of(config, purpose), digests=purpose in ("train", "sft"))


def purpose_of(config: RunConfig) -> Purpose:
    """What a configuration is for where a command does not say."""
    return "train" if config.sft.checkpoint_out is None else "sft"


def parts_of(config: RunConfig, purpose: Purpose, sets: Mapping[str, Source] | None = None) -> tuple[Part, ...]:
    """What is started. `sets`: what is evaluated, the held-out sets of the configuration where not said."""
    if purpose in ("train", "sft"):
        return training_parts(config)
    judged = {"rollout": config.data.sources, "eval": _evaluated(config, sets)}.get(purpose, ())
    return ("engines", "reward_engine") if uses_engine(judged) else ("engines",)


def examine(
    config: RunConfig, purpose: Purpose, *, resume: bool = False, sets: Mapping[str, Source] | None = None
) -> list[SemionError]:
    """Every fault that can be seen before a process starts, in the order to mend them. `sets`: other problems to evaluate than
    the configuration's."""
    faults = _Look(config, purpose, resume, sets).faults()
    return list({str(fault): fault for fault in faults}.values())


def check_fresh(config: RunConfig, *, may_start_over: bool) -> None:
    """ConfigError when run.directory holds records that starting anew would take away.

    A run that was stopped before its first checkpoint may start over under --resume auto: equal configurations write equal
    records again.
    """
    directory = config.run_directory
    if not (directory / "metrics.jsonl").exists():
        return
    if not may_start_over:
        raise ConfigError(f"run.directory must be new; found a run in {directory}: add --resume auto, or name another one")
    before = directory / "config.toml"
    if not before.exists() or before.read_text(encoding="utf-8") != dump_config(config):
        raise ConfigError(
            f"run.directory must be new or hold this run; found one with other options and no checkpoint in {directory}: use "
            f"the options it had, or name another directory"
        )


def _caught(check: Check, *arguments: Any) -> list[SemionError]:
    """What a check raises, and what it yields before."""
    found: list[SemionError] = []
    try:
        for fault in check(*arguments) or ():
            found += fault.faults
    except SemionError as error:
        found += error.faults
    return found


def _tried(make: Callable[..., Made], *arguments: Any) -> tuple[Made | None, list[SemionError]]:
    """What is made, or what it was refused for."""
    try:
        return make(*arguments), []
    except SemionError as error:
        return None, list(error.faults)


@dataclass
class _Look:
    """One look at a configuration. What cannot be read is told once, and what follows from it is left out."""

    config: RunConfig
    purpose: Purpose
    resume: bool
    sets: Mapping[str, Source] | None
    shape: ModelShape | None = field(default=None, init=False)
    tokenizer: Any = field(default=None, init=False)

    def faults(self) -> list[SemionError]:
        """All of them."""
        if found := _caught(self._purpose):
            return found
        found = self._model()
        data = _caught(self._data)
        rewards = _caught(self._rewards)
        found += data + rewards
        if self.purpose in ("train", "sft"):
            found += _caught(self._directory) or _caught(self._resumed, not (data or rewards))
        layouts = _caught(self._layouts)
        found += layouts + _caught(self._machine)
        if self.shape is not None:
            found += _caught(self._caches)
            if not layouts:
                found += _caught(self._storage)
        return found

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What would be started."""
        return parts_of(self.config, self.purpose, self.sets)

    @property
    def samples(self) -> bool:
        """Whether inference engines answer prompts."""
        return "engines" in self.parts

    def _purpose(self) -> Faults:
        out, replay = self.config.sft.checkpoint_out, self.config.data.replay
        if self.purpose == "train" and out is not None:
            yield ConfigError(f"sft.checkpoint_out is for `semion sft`; found {out!r}: remove it")
        if self.purpose == "sft" and out is None:
            yield ConfigError("sft.checkpoint_out is required by `semion sft` and missing: name the folder to make")
        if self.purpose == "rollout" and replay is not None:
            yield ConfigError(f"data.replay is for `semion train`; found {replay!r}: remove it to sample rollouts")
        if self.purpose == "eval" and not _evaluated(self.config, self.sets):
            yield ConfigError("data.held_out is required by `semion eval` and missing: name a file of problems, or --suite")

    # -- the model's folder

    def _model(self) -> list[SemionError]:
        path = self.config.model.path
        self.shape, found = _tried(partial(read_shape, path, family=self.config.model.family))
        if self.shape is not None:
            found += weight_faults(path, self.shape)
        if Path(path).is_dir():  # else its config.json has been missed already
            self.tokenizer, faults = _tried(load_tokenizer, path)
            found += faults
        if self.tokenizer is not None:
            found += _caught(self._tokenizer)
        return found

    def _tokenizer(self) -> Faults:
        """The vocabulary, the chat template, and what ends a response."""
        path, tokenizer = self.config.model.path, self.tokenizer
        if self.shape is not None and len(tokenizer) > self.shape.vocab_size:
            yield ConfigError(
                f"model.path must hold a tokenizer that fits the model; found {len(tokenizer)} tokens for a vocabulary of "
                f"{self.shape.vocab_size} in {path}: use the tokenizer that the model was trained with"
            )
        ends = read_end_ids(path) or ((tokenizer.eos_token_id,) if isinstance(tokenizer.eos_token_id, int) else ())
        if self.samples and not ends:
            yield ConfigError(
                f"model.path must say which token ends a response; found no eos_token_id in generation_config.json or "
                f"config.json and no eos_token in tokenizer_config.json of {path}: add one"
            )
        if self.shape is not None and any(token >= self.shape.vocab_size for token in ends):
            yield ConfigError(
                f"model.path must name end tokens of the model's vocabulary of {self.shape.vocab_size}; found eos_token_id = "
                f"{list(ends)} in {path}: mend generation_config.json"
            )
        try:
            encode_prompt(tokenizer, "1 + 1", prompt_form(self.config, Source(train="", template="{problem}")))
        except TemplateError as error:
            own = self.config.data.chat_template == "tokenizer"
            option, place = ("model.path", path) if own else ("data.chat_template", self.config.data.chat_template)
            yield ConfigError(
                f"{option} must hold a chat template for a user's message; found that it fails with {str(error)!r} in "
                f"{place}: mend the template"
            )

    @cached_property
    def _renders(self) -> bool:
        """Whether prompts can be tokenized."""
        return self.tokenizer is not None and not any("chat template" in str(fault) for fault in _caught(self._tokenizer))

    def _layouts(self) -> Faults:
        """Whether trainer ranks and engines can share the model, and its positions hold what is asked of it."""
        if self.shape is None:
            return
        if "trainer" in self.parts:
            yield from _caught(check_layout, self.shape, trainer_layout(self.config.trainer))
        if self.samples:
            yield from _caught(check_engine_layout, self.shape, engine_layout(self.config.inference))
            longest, positions = self.config.inference.max_model_tokens, self.shape.max_positions
            if longest > positions:
                yield ConfigError(
                    f"inference.max_model_tokens must not exceed the model's {positions} positions; found {longest}: lower it"
                )

    # -- data

    def _data(self) -> Faults:
        """The files that this purpose reads."""
        data = self.config.data
        kind = None
        if data.replay is not None and self.purpose == "train":
            faults = _caught(_check_file, "data.replay", data.replay)
            if not faults:
                kind, faults = _tried(replay_kind, self.config)
            yield from faults
            if kind == "preferences":
                yield from _caught(_check_pairs, data.replay, data.columns)
            if kind == "rollouts":
                yield from _caught(self._ledger, data.replay)
        files = [
            (f"{source_key(place)}.{name}", getattr(source, name), source)
            for place, source in enumerate(data.sources)
            for name in {"eval": ("held_out",), "rollout": ("train",), "sft": ("train", "held_out")}.get(
                self.purpose, ("train", "held_out")
            )
            if self.purpose != "generate" and not (self.purpose == "eval" and self.sets is not None)
        ]
        files += [("--suite", source.held_out, source) for source in (self.sets or {}).values()]
        ids: dict[str, str] = {}
        for key, path, source in files:
            if path is not None and not (key == "data.train" and kind == "preferences"):
                yield from _caught(self._file, key, path, source, ids)

    def _file(self, key: str, path: str, source: Source, ids: dict[str, str]) -> Faults:
        """A file of problems: some of its rows, whether one fits, and whether ids of rows to train on are unique."""
        _check_file(key, path)
        judging = _tried(judging_of, self.config, source)[0] if self._judges else None  # `_rewards` tells what is wrong
        needs_answer, wants_row = (judging.needs_answer, judging.wants_row) if judging is not None else (False, False)
        try:
            rows, is_whole = sample_rows(path, needs_answer, keep_columns=wants_row, columns=source.columns)
        except DataError as error:
            yield from (naming(key, path, fault) for fault in error.faults)
            return
        trains = key.endswith(".train")
        for row in rows if trains else ():
            problem = identity(row.problem, row.messages)
            if row.id and ids.setdefault(row.id, problem) != problem:
                yield DataError(
                    f"{key} ({path}): `id` must name one problem; found {row.id!r} for {ids[row.id][:60]!r} and "
                    f"{problem[:60]!r}: change one, or remove the `id` fields"
                )
                break
        if not self._renders:
            return
        longest, form = self.config.data.max_prompt_tokens, prompt_form(self.config, source)

        def fits(row: Row) -> bool:
            try:
                return not isinstance(fit_prompt(self.tokenizer, row.problem, row.messages, form, longest), LeftOut)
            except DataError as error:
                raise DataError(f"{key} ({path}): {row.where.removeprefix(path).lstrip(', ')}: {error}") from error

        def others() -> list[Row]:
            return load_rows(path, needs_answer=needs_answer, columns=source.columns)

        if not any(map(fits, rows)) and (is_whole or not any(map(fits, others()))):
            yield DataError(
                f"{key} ({path}): at least one prompt must fit data.max_prompt_tokens; found none of {longest} or fewer "
                f"tokens: raise data.max_prompt_tokens, or name other data"
            )
        if self.purpose == "sft" and trains:
            told = [row for row in rows if fits(row) and stays_text(self.tokenizer, row.solution)]
            yield from self._solutions(key, path, told, form)

    def _solutions(self, key: str, path: str, rows: list[Row], form: PromptForm) -> Faults:
        """The first row without a solution, and the first that is too long with it."""
        if lacking := next((row for row in rows if not row.solution), None):
            yield DataError(
                f"{key} ({path}): `solution` must not be empty for supervised training; found none for "
                f"{lacking.problem[:60]!r}: add it"
            )
        limit = min(self.config.trainer.microbatch_tokens, self.shape.max_positions if self.shape else 1 << 62)
        for row in rows:
            prompt = fit_prompt(self.tokenizer, row.problem, row.messages, form, self.config.data.max_prompt_tokens)
            assert not isinstance(prompt, LeftOut), prompt
            num_tokens = len(prompt) + len(completion_tokens(self.tokenizer, row.solution))
            if num_tokens > limit:
                yield ConfigError(
                    f"trainer.microbatch_tokens and the model's positions must hold every prompt with its solution; found "
                    f"{num_tokens} tokens for {row.problem[:60]!r} of {path} and a limit of {limit}: raise "
                    f"trainer.microbatch_tokens, or shorten or remove the row"
                )
                return

    def _ledger(self, path: str) -> None:
        """The steps of a ledger, and its first rows."""
        if Path(path).stat().st_size > LARGE_LEDGER_BYTES:
            return
        ledger = RolloutLedger(path)
        ledger.check_steps(self.config.run.steps)
        ledger.rows(0)

    # -- what judges

    def _rewards(self) -> Faults:
        """Whether each reward could judge, and the loss and the rewards go together."""
        config, options = self.config, self.config.reward_model
        if self.purpose == "train":
            yield from _tried(catalogue, config.algorithm)[1]  # a user's loss must not take the name of a metric of ours
        if self.purpose in ("generate", "sft"):
            return
        sources = _evaluated(config, self.sets) if self.purpose == "eval" else config.data.sources
        faults = [fault for check in checks(config, sources) for fault in _caught(check)] if self.samples else []
        yield from faults
        if not faults and self.purpose != "eval" and self._judges:
            yield from _caught(check_pairing, config)
        if self.samples and uses_engine(sources) and options.path is not None:
            shape, _ = _tried(lambda: Conversations(options).head.shape)
            if shape is not None:
                length, size = options.max_tokens, options.kv_cache_mebibytes
                yield from _cache_faults("reward_model", shape, 1, options.dtype, length, size)

    @cached_property
    def _judges(self) -> bool:
        """Whether rewards matter: completions are sampled and judged, or a ledger's are compared."""
        return self.purpose not in ("generate", "sft") and (self.samples or _tried(replay_kind, self.config)[0] == "rollouts")

    # -- the run's directory

    def _directory(self) -> Faults:
        """Whether another run is at work there, and whether a run that starts anew would take records away."""
        config, lock = self.config, self.config.run_directory / ".lock"
        whole = config.run_directory.absolute()
        there = next(place for place in (whole, *whole.parents) if place.exists())
        if not config.run.directory.strip() or not there.is_dir() or not os.access(there, os.W_OK):
            what = "an empty name" if not config.run.directory.strip() else "a file" if not there.is_dir() else "no permission"
            yield ConfigError(
                f"run.directory must be a folder that can be made and written; found {what} at {there}: name another"
            )
            return
        if lock.exists():
            with lock.open("r") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield ConfigError(
                        f"run.directory must belong to one run at a time; found another at work in {config.run_directory}: "
                        f"wait for it, or name another directory"
                    )
                    return
        if config.sft.checkpoint_out is not None:
            check_destination(config.sft.checkpoint_out)
        if not self.resume or latest(config.run_directory / "checkpoints") is None:
            check_fresh(config, may_start_over=self.resume)

    def _resumed(self, reads_data: bool) -> Faults:
        """Whether the newest checkpoint is whole in size and of this run."""
        newest = latest(self.config.run_directory / "checkpoints") if self.resume else None
        if newest is None:
            return
        manifest = read_manifest(newest)
        yield from other_options(newest, manifest, self.config)
        if reads_data:
            yield from other_data(newest, manifest, self.config)
        yield from _caught(check_prolonged, self.config, int(manifest["step"]))
        for name, known in manifest["files"].items():
            found = (newest / name).stat().st_size if (newest / name).exists() else "none"
            if found != known["bytes"]:
                yield CheckpointError(
                    f"{newest / name} must have {known['bytes']} bytes; found {found}: use another checkpoint"
                )

    # -- the machine

    def _machine(self) -> Faults:
        """Libraries, tools and GPUs that a run on this machine alone needs; those of other nodes are not seen."""
        config = self.config
        if config.profile.tool == "nsys" and self.purpose in ("train", "sft"):
            yield from _caught(nsight.check_installed)
        if config.cluster.nodes > 1:
            yield from _tried(place, config, self.parts)[1]
            return
        if "trainer" in self.parts:
            yield from _tried(check_installed, config.trainer, config.optimizer)[1]
        if gpus := visible_gpus():
            yield from _tried(place, config, self.parts, gpus)[1]
        layouts_fit = self.shape is not None and not _caught(self._layouts)
        if "trainer" in self.parts and self.samples and self.shape is not None and layouts_fit:
            yield from _caught(self._transport, "cuda" if gpus else "cpu", self.shape)

    def _transport(self, device: Literal["cuda", "cpu"], shape: ModelShape) -> None:
        """Whether what was asked for can carry the weights here, and /dev/shm has room for them."""
        t = self.config.trainer
        stages = [shared_bytes(self.config, _Held(shape, self.config, stage)) for stage in range(t.pipeline_parallel)]
        num_bytes = sum(stages) * t.tensor_parallel * t.data_parallel
        choose(self.config.sync.transport, setting(self.config, device, has_room=room_for(num_bytes), needed_bytes=num_bytes))

    def _caches(self) -> Faults:
        """Whether an engine's KV cache holds one request at full length."""
        assert self.shape is not None
        dtype, i = self.config.model.dtype, self.config.inference
        if self.samples:
            length, size = i.max_model_tokens, i.kv_cache_mebibytes
            yield from _cache_faults("inference", self.shape, i.tensor_parallel, dtype, length, size)

    def _storage(self) -> Faults:
        """Whether the disk has room for what will be written."""
        assert self.shape is not None
        config, itemsize = self.config, getattr(torch, self.config.model.dtype).itemsize
        policy = num_elements(self.shape) * itemsize
        if self.purpose == "sft":
            yield from _room(Path(str(config.sft.checkpoint_out)), policy, "sft.checkpoint_out", "a checkpoint")
        if self.purpose == "train":
            spec = assemble(config, self.shape)
            kept = config.checkpoint.keep + 1 + (config.checkpoint.best_by is not None)  # the one being written comes on top
            count = min(len(spec.checkpoint_steps), kept)
            ranks = spec.config.trainer.tensor_parallel * spec.config.trainer.data_parallel
            states = sum(TrainerState(spec, stage).saved_bytes * ranks for stage in range(spec.trainer.pp_size))
            folder = config.run_directory / "checkpoints"
            there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
            yield from _room(folder, count * (policy + states) - there, "run.directory", f"{count} checkpoints")


class _Held:
    """The weights of a trainer rank of a stage, without their bytes, as the bridge asks for them."""

    def __init__(self, shape: ModelShape, config: RunConfig, stage: int) -> None:
        dtype = getattr(torch, config.model.dtype)
        shards = shard_shapes(shape, trainer_layout(config.trainer), 0, stage)
        self.parameters = {name: torch.empty(sizes, dtype=dtype, device="meta") for name, sizes in shards.items()}


def _evaluated(config: RunConfig, sets: Mapping[str, Source] | None) -> tuple[Source, ...]:
    if sets is not None:
        return tuple(sets.values())
    return tuple(source for source in config.data.sources if source.held_out is not None)


def _check_file(key: str, path: str) -> None:
    """DataError for a file or folder that is not there, or that no data can be in."""
    if not path.startswith(HUB) and not Path(path).exists():
        raise DataError(f"{key} must be a file or a dataset's folder; found none at {path}: check the path")
    check_source(path)


def _check_pairs(path: str, columns: Mapping[str, str] | None) -> None:
    """DataError for a pair without its texts, among some."""
    for where, record in sampled(path, wanted_fields(PAIR_FIELDS, columns or {}))[0]:
        pair_texts(where, record, columns)


def _cache_faults(
    section: str, shape: ModelShape, tp_size: int, dtype: str, max_tokens: int, kv_cache_mebibytes: int
) -> Iterator[ConfigError]:
    option = "max_model_tokens" if section == "inference" else "max_tokens"
    needed = -(-max_tokens // KV_BLOCK) * KV_BLOCK * kv_bytes_per_token(shape, tp_size, dtype)
    if needed > kv_cache_mebibytes * MIB:
        yield ConfigError(
            f"{section}.kv_cache_mebibytes must hold one request of {section}.{option} = {max_tokens} tokens; found "
            f"{kv_cache_mebibytes} MiB for {needed / MIB:.1f}: raise it to {-(-needed // MIB)}, or lower {section}.{option}"
        )


def _room(folder: Path, num_bytes: int, option: str, what: str) -> Iterator[ConfigError]:
    """A fault where the disk of `folder` has less room."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        yield ConfigError(
            f"{option} must be on a disk with room for {what}; found {free / GIB:.1f} GiB free for {num_bytes / GIB:.1f} GiB "
            f"at {there}: free some, name another folder, or keep fewer checkpoints"
        )
