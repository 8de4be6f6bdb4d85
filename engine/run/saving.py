"""Checkpoints written while the run goes on: every trainer rank copies its part into host memory, and a thread of its own
writes and hashes it while the next steps are trained. Rank 0 names the checkpoint by LATEST once every rank has told that its
part is on disk. At most one is under way. Reading a checkpoint is checkpoint.py's business.

Each element is written once: weights by the ranks of their stage in turn (models/sharding.py, `export_files`), optimizer state
by the rank that holds it, a reference that equals the policy, another checkpoint or the seed model not at all. Killed at any
moment, the folder still holds the last whole checkpoint.

    .staging-step_00000040/                 what becomes step_00000040
    .staging-step_00000040/parts/rank_0001.json   rank 1's part is on disk: its files' sizes and digests; or why it is not
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.errors import CheckpointError, ConfigError, SemionError, StorageError, WatchdogError, combined
from engine.core.files import atomic_write, staged_folder, storing, sync
from engine.core.provenance import provenance
from engine.core.tensor_files import FileRecord, file_record, write_tensors
from engine.data.templates import read_chat_template
from engine.models.hf import HfCheckpoint, check_destination, shard_names, write_companions
from engine.observe.origin import read_origin
from engine.observe.telling import activity
from engine.rollouts.ahead import AHEAD, Ahead
from engine.rollouts.paused import PAUSED
from engine.run.checkpoint import (
    BEST,
    LATEST,
    MANIFEST,
    POLICY,
    REFERENCE,
    SLOTS,
    STEPS,
    ahead_of,
    best,
    data_digests,
    latest,
    older,
    other_data,
    other_options,
    rank_file,
    read_manifest,
    recall_schedule,
    reference_folder,
    same_layout,
    sealed,
    state_rank,
    trainer_of,
    verify_file,
    weight_files,
)
from engine.run.machine import gpu_name

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PARTS = "parts"  # folder of the ranks' words in a staging folder
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5  # seconds between two looks at the other ranks' words
PAUSE_PER_RANK = 0.001  # seconds; where the longest pause is more than LONGEST_PAUSE, for a look takes longer with more ranks


class Words(Protocol):
    """The trainer ranks' words, which hold no GPU: bridge.host_group's HostGroup."""

    rank: int

    def broadcast(self, word: bytes) -> bytes:
        """Rank 0's word, on every rank."""
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def agreed(self, word: bytes, judge: Callable[[list[bytes]], bytes]) -> bytes:
        """What rank 0's `judge` makes of every rank's word, on every rank."""
        ...


@dataclass(frozen=True)
class Weights:
    """A Hugging Face folder of which a rank writes some files."""

    names: tuple[tuple[str, ...], ...]  # of the tensors in each file of the folder, on every rank
    own: Mapping[int, dict[str, torch.Tensor]]  # by the file's place in `names`, those that this rank writes; on the host
    num_bytes: int  # of all files' tensors


@dataclass(frozen=True)
class Snapshot:
    """What a rank writes of a checkpoint, in host memory, which nobody changes any more."""

    state: Mapping[str, torch.Tensor]  # of this rank alone
    dtype: torch.dtype  # of the weights
    policy: Weights
    reference: Weights | None = None  # where the checkpoint must hold one of its own
    reference_step: int | None = None  # the checkpoint whose policy the reference is; None: `reference`, the seed's, or no need
    needs_seed: bool = False  # whether a resumed run needs the very seed model: as its reference, or for its engines
    slots: Sequence[str] = ()  # the parts of parameters that `state` is of, where data-parallel ranks have different ones

    @property
    def num_bytes(self) -> int:
        """That this rank writes."""
        folders = [self.policy, *([self.reference] if self.reference is not None else [])]
        tensors = [tensor for folder in folders for file in folder.own.values() for tensor in file.values()]
        return sum(tensor.nbytes for tensor in [*self.state.values(), *tensors])


@dataclass(frozen=True)
class Saved:
    """What one rank goes on with."""

    step: int
    state: dict[str, torch.Tensor] | None  # this rank's; None where another layout wrote the checkpoint
    policy: HfCheckpoint
    reference: HfCheckpoint | None  # None: the seed model's weights, or not needed
    folder: Path
    trainer: Trainer  # the options it was written with
    ahead: range  # the steps that it keeps rollouts of
    slots: Mapping[int, Sequence[str]] | None = None  # by rank, as its snapshot had them; None where nothing tells

    def open_rank(self, rank: int) -> Any:
        """The state that a rank of the layout which wrote it holds, as safetensors opens a file."""
        from safetensors import safe_open

        return safe_open(self.folder / rank_file(rank), framework="pt")


@dataclass
class _Save:
    """A checkpoint under way."""

    step: int
    written: Future[None] | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)  # this rank's, by their place in the checkpoint


class Checkpoints:
    """The checkpoints of one run, as one trainer rank sees them."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        host: Words,
        digests: Mapping[str, str | None] | None = None,
        patience_seconds: float = 1200.0,
    ) -> None:
        """`host`: the trainer ranks' words. `digests`: of data and of what judges, as they were when the run began
        (`Spec.digests`); a file that changes while the run goes on does not change what the run is made of. Taken at each
        commit where not given. `patience_seconds`: how long rank 0 waits for other ranks' parts while nothing is added to
        them."""
        self._folder = folder
        self._rank, self._world_size = rank, world_size
        self._host = host
        self._digests = digests
        self._patience = patience_seconds
        self.origin = read_origin(folder.parent)  # of a run that was forked off another
        self._save: _Save | None = None
        self._seed: dict[str, FileRecord] = {}  # this rank's share of the seed model's files
        self._pointers = threading.Lock()  # LATEST, BEST and what is removed
        self._scores: dict[int, float] | None = None  # what BEST is chosen by; None where nobody has said yet
        self._keep = 1

    def commit(
        self,
        step: int,
        snapshot: Snapshot,
        config: RunConfig,
        records: Mapping[str, Any] | None = None,
        end_ids: Iterable[int] = (),
        ahead: Ahead | None = None,
    ) -> None:
        """Begins to write the checkpoint of `step`; collective, after `wait`. `records`, rank 0's, is what a resumed run needs
        of the run's records (`Records.kept`); `end_ids`: what ends a response of the policy, which its generation config is to
        name; `ahead`, rank 0's: rollouts of later steps, which are kept with it. StorageError, on every rank, where the disk is
        full or not to be written; what fails later is raised by the next `check`, `wait` or `commit`. Then nothing of the
        checkpoint stays, and the one before does."""
        self.wait()
        staging, failure = self._folder / f".staging-step_{step:08d}", ""
        if self._rank == 0:
            try:
                self._make_staging(staging)
            except StorageError as error:
                failure = str(error)
                shutil.rmtree(staging, ignore_errors=True)
        if failure := self._host.broadcast(failure.encode()).decode():
            raise StorageError(failure)
        save = self._save = _Save(step)
        with_thread = ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint of step {step}")
        save.written = with_thread.submit(self._write, save, staging, snapshot, config, records, tuple(end_ids), ahead)
        with_thread.shutdown(wait=False)

    def check(self) -> None:
        """Raises what the checkpoint under way has failed with."""
        if self.finished(0.0):
            self.wait()

    def finished(self, seconds: float) -> bool:
        """Whether nothing is under way, or is done or failed within so many seconds; on rank 0 that all ranks' parts are."""
        return self._save is None or self._save.written is None or bool(wait([self._save.written], seconds).done)

    def wait(self) -> None:
        """Returns when this rank's part of the checkpoint under way is on disk; on rank 0, when LATEST names it. Raises what it
        has failed with."""
        save, self._save = self._save, None
        if save is not None and save.written is not None:
            save.written.result()

    def _make_staging(self, staging: Path) -> None:
        with storing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for stale in self._folder.glob(".staging-*"):
                shutil.rmtree(stale)
            for folder in (staging, staging / POLICY, staging / REFERENCE, staging / PARTS):
                folder.mkdir()

    def _write(
        self,
        save: _Save,
        staging: Path,
        snapshot: Snapshot,
        config: RunConfig,
        records: Mapping[str, Any] | None,
        end_ids: tuple[int, ...],
        ahead: Ahead | None,
    ) -> None:
        """What the thread does."""
        try:
            with activity("checkpoint", f"of {save.step} steps"), storing(self._folder, lambda: snapshot.num_bytes):
                self._write_part(save, staging, snapshot, config)
                if self._rank == 0:
                    self._finish(save, staging, snapshot, config, records, end_ids, ahead)
        except BaseException as error:
            self._tell_failure(staging, error)
            raise

    def _write_part(self, save: _Save, staging: Path, snapshot: Snapshot, config: RunConfig) -> None:
        """This rank's files, and then its word that they are on disk."""
        name = rank_file(self._rank)
        save.files[name] = write_tensors(staging / name, snapshot.state)
        for folder, weights in ((POLICY, snapshot.policy), (REFERENCE, snapshot.reference)):
            if weights is None:
                continue
            save.files |= {f"{folder}/{name}": record for name, record in _write_files(staging / folder, weights).items()}
        if snapshot.needs_seed and not self._seed:
            mine = weight_files(Path(config.model.path))[self._rank :: self._world_size]
            self._seed = {file.name: file_record(file) for file in mine}
        word = {"files": _as_json(save.files), "seed": _as_json(self._seed), "slots": list(snapshot.slots)}
        with atomic_write(staging / PARTS / f"rank_{self._rank:04d}.json", durable=True) as part:
            part.write_text(json.dumps(word), encoding="utf-8")

    def _tell_failure(self, staging: Path, error: BaseException) -> None:
        """The other ranks' rank 0 need not wait; rank 0 removes what it can."""
        if self._rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            return
        word = {"error": str(error), "storage": isinstance(error, StorageError)}
        part = staging / PARTS / f"rank_{self._rank:04d}.json"
        try:
            (staging / rank_file(self._rank)).unlink(missing_ok=True)  # so that there is room for a word
            with atomic_write(part) as whole:
                whole.write_text(json.dumps(word), encoding="utf-8")
        except (OSError, SemionError):
            with suppress(OSError):  # nothing can be written: this rank's own error is told
                part.touch()

    def _finish(
        self,
        save: _Save,
        staging: Path,
        snapshot: Snapshot,
        config: RunConfig,
        records: Mapping[str, Any] | None,
        end_ids: tuple[int, ...],
        ahead: Ahead | None,
    ) -> None:
        """Rank 0: what stands beside the weights, the manifest, and the names by which the checkpoint is found."""
        for folder, weights in ((POLICY, snapshot.policy), (REFERENCE, snapshot.reference)):
            if weights is not None:
                _write_beside(staging / folder, weights, snapshot.dtype, config, end_ids)
        if ahead is not None:
            ahead.write(staging)
        words = self._await_parts(staging)
        shutil.rmtree(staging / PARTS)
        if snapshot.reference is None:
            (staging / REFERENCE).rmdir()
        if any(word["slots"] for word in words):
            slots = {rank: word["slots"] for rank, word in enumerate(words)}
            (staging / SLOTS).write_text(json.dumps(slots), encoding="utf-8")
        known = {name: found for word in words for name, found in word["files"].items()}
        rest = [path for path in sorted(staging.rglob("*")) if path.is_file() and str(path.relative_to(staging)) not in known]
        for path in rest:
            sync(path)
        known |= _as_json({str(path.relative_to(staging)): file_record(path) for path in rest})
        manifest = {
            "step": save.step,
            "ranks": self._world_size,
            "config": json.loads(config.model_dump_json()),
            "data": data_digests(config) if self._digests is None else dict(self._digests),
            "files": dict(sorted(known.items())),
            "reference": _reference(snapshot),
            "seed": {name: found for word in words for name, found in word["seed"].items()},
            "records": json.loads(json.dumps(records)),
            "ahead": [ahead.kept.start, ahead.kept.stop] if ahead is not None else None,
            **({"paused_from": ahead.first_paused} if ahead is not None and ahead.paused else {}),
            "made_with": provenance() | {"gpu": gpu_name()},
            **({"fork": self.origin.as_json()} if self.origin is not None else {}),
        }
        (staging / MANIFEST).write_text(json.dumps(sealed(manifest), indent=1), encoding="utf-8")
        for path in (staging / MANIFEST, *sorted(path for path in staging.iterdir() if path.is_dir()), staging):
            sync(path)
        self._name(staging, self._folder / f"step_{save.step:08d}", config.checkpoint.keep)

    def _await_parts(self, staging: Path) -> list[dict[str, Any]]:
        """Every rank's word, once all have said it. WatchdogError where nothing is added to the parts for too long; a rank's
        failure is raised as that rank's own would be.

        It waits beside rank 0's training, so a look is one listing of the words' folder: a word is read once, and again only
        where another file has taken its place. The sizes of all files, which need a look at each, are asked for seldom, and
        once more before the wait is given up."""
        ranks = {f"rank_{rank:04d}.json": rank for rank in range(self._world_size)}
        longest = max(LONGEST_PAUSE, PAUSE_PER_RANK * self._world_size)
        between_sizes = min(10 * longest, self._patience / 4)
        words: dict[int, dict[str, Any]] = {}
        files: dict[int, int] = {}  # by rank, the inode of the word that was read
        pause, seen, sizes_due, patient_until = FIRST_PAUSE, -1, 0.0, 0.0
        while True:
            with os.scandir(staging / PARTS) as entries:
                found = {ranks[entry.name]: entry.inode() for entry in entries if entry.name in ranks}
            for rank in sorted(rank for rank, inode in found.items() if files.get(rank) != inode):
                word = _word(staging / PARTS / f"rank_{rank:04d}.json")
                if "error" in word:
                    raise StorageError(word["error"]) if word["storage"] else CheckpointError(word["error"])
                words[rank], files[rank] = word, found[rank]
            if len(words) == self._world_size:
                return [words[rank] for rank in range(self._world_size)]
            now = time.monotonic()
            if now >= min(sizes_due, patient_until):
                size, sizes_due = _size(staging), now + between_sizes
                if size != seen:
                    seen, patient_until = size, now + self._patience
                elif now > patient_until:
                    late = min(set(range(self._world_size)) - set(words))
                    raise WatchdogError(
                        f"trainer rank {late} must write its part of a checkpoint into {staging}; found nothing new for "
                        f"{self._patience:g} s: is that folder the same on every node?"
                    )
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _name(self, staging: Path, final: Path, keep: int) -> None:
        """Gives the whole checkpoint its name, and LATEST and BEST theirs."""
        with self._pointers:
            if final.exists():
                former = final.with_name(f".staging-former-{final.name}")
                final.rename(former)
                shutil.rmtree(former)
            staging.rename(final)
            sync(self._folder)
            self._point(LATEST, final.name)
            self._keep = keep
            self._select(final)

    def select(self, scores: Mapping[int, float], config: RunConfig) -> None:
        """Names by BEST the checkpoint of the highest score, the earliest of equals, among those up to the newest, now and
        whenever one is added; removes BEST where none has a score. `scores` by step. For rank 0, at any time."""
        with self._pointers:
            self._scores, self._keep = dict(scores), config.checkpoint.keep
            newest = latest(self._folder)
            if newest is not None:
                self._select(newest)

    def _select(self, newest: Path) -> None:
        if self._scores is None:
            self._prune(newest, best(self._folder))
            return
        scores = self._scores
        there = {int(path.name.removeprefix("step_")): path for path in self._folder.glob(STEPS) if path <= newest}
        known = sorted(step for step in there.keys() & scores.keys() if (there[step] / MANIFEST).exists())
        chosen = there[max(known, key=lambda step: scores[step])] if known else None
        if chosen is not None:
            self._point(BEST, chosen.name)
        else:
            (self._folder / BEST).unlink(missing_ok=True)
        self._prune(newest, chosen)

    def _point(self, pointer: str, name: str) -> None:
        with atomic_write(self._folder / pointer, durable=True) as part:
            part.write_text(name, encoding="utf-8")

    def _prune(self, newest: Path, chosen: Path | None) -> None:
        """Removes all but the best, the `keep` newest, and those that hold their reference. Later steps than the newest are of
        a run that was killed before it named them; they do not count as kept."""
        there = sorted(path for path in self._folder.glob(STEPS) if path.is_dir() and path.name <= newest.name)
        kept = {*there[-self._keep :], *([chosen] if chosen is not None else [])}
        kept |= {path.parent for checkpoint in sorted(kept) if (path := _held(checkpoint)) is not None}
        for old in there:
            if old not in kept:
                shutil.rmtree(old)

    def load(self, config: RunConfig) -> Saved:
        """The newest checkpoint. This rank checks its own file and its share of the others against their digests, so that all
        ranks together check all. Raises CheckpointError when there is none, it is torn or altered, or it belongs to another
        run. Collective.
        """
        from safetensors.torch import load_file

        newest = latest(self._folder)
        if newest is None:
            raise CheckpointError(f"{self._folder} must hold a checkpoint to resume from; found none: start without --resume")
        manifest = read_manifest(newest)
        if found := [*other_options(newest, manifest, config), *other_data(newest, manifest, config)]:
            raise combined(found)
        if "seed" not in manifest:
            raise older(newest, "weights in the ranks' own files")
        recall_schedule(config, manifest)
        trainer, state, slots = trainer_of(manifest), None, None
        if same_layout(trainer, config.trainer):
            own = rank_file(state_rank(trainer, self._rank))
            verify_file(newest, own, manifest)
            state = load_file(newest / own)
        elif SLOTS in manifest["files"]:
            verify_file(newest, SLOTS, manifest)
            slots = {int(rank): own for rank, own in json.loads((newest / SLOTS).read_text(encoding="utf-8")).items()}
        self._verify_share(newest, manifest)
        reference = reference_folder(newest, manifest)
        if reference is not None and reference.parent != newest:
            self._verify_share(reference.parent, read_manifest(reference.parent))
        seed = manifest.get("seed", {})
        for name in sorted(seed)[self._rank :: self._world_size]:
            verify_seed(Path(config.model.path) / name, seed[name], newest)
        self._host.barrier()
        policy, other = HfCheckpoint(newest / POLICY), HfCheckpoint(reference) if reference is not None else None
        return Saved(int(manifest["step"]), state, policy, other, newest, trainer, ahead_of(manifest), slots)

    def _verify_share(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        """This rank's share of all files: every one is some rank's."""
        shared = sorted(manifest["files"])
        for name in shared[self._rank :: self._world_size]:
            verify_file(checkpoint, name, manifest)

    def steps(self) -> set[int]:
        """The steps of all checkpoints that stand, up to the newest."""
        newest = latest(self._folder)
        if newest is None:
            return set()
        return {int(path.name.removeprefix("step_")) for path in self._folder.glob(STEPS) if path.name <= newest.name}

    def ahead(self) -> tuple[Path | None, Path | None]:
        """Where the newest checkpoint keeps rollouts for steps after it: complete ones, and paused ones, each a folder, or the
        file that older versions wrote; None for each that it does not have."""
        newest = latest(self._folder)
        if newest is None:
            return None, None
        names = {Path(name).parts[0] for name in read_manifest(newest)["files"]}
        complete, paused = (
            next((newest / name for name in (one, f"{one}.jsonl") if name in names), None) for one in (AHEAD, PAUSED)
        )
        return complete, paused

    def records(self) -> dict[str, Any] | None:
        """What the newest checkpoint keeps of the run's records; None without one, or where an older version wrote it."""
        newest = latest(self._folder)
        found: dict[str, Any] | None = read_manifest(newest).get("records") if newest is not None else None
        return found


def check_shared(folder: Path, host: Words) -> None:
    """ConfigError, on every rank, where a node of the run does not see what rank 0 writes beside `folder`, which is
    sft.checkpoint_out; StorageError, on rank 0, where it cannot write there. Nothing stays but the folder above. Collective."""
    probe = folder.absolute().with_name(f".{folder.name}.{secrets.token_hex(8)}.probe")  # no node has looked for it before
    try:
        if host.rank == 0:
            with storing(probe.parent):
                probe.parent.mkdir(parents=True, exist_ok=True)
                probe.touch()
        probe = Path(host.broadcast(str(probe).encode()).decode())
        own = "" if probe.exists() else socket.gethostname()
        blind = host.agreed(own.encode(), lambda words: b", ".join(sorted(set(filter(None, words))))).decode()
    finally:
        if host.rank == 0:
            with suppress(OSError):
                probe.unlink()
    if blind:
        raise ConfigError(
            f"sft.checkpoint_out must be on a file system that all nodes share, for every trainer rank writes its own files of "
            f"the model there; found that {blind} does not see what trainer rank 0 writes in {probe.parent}: name a folder "
            f"on a shared file system, or train on one node (cluster.nodes = 1)"
        )


def write_model(
    folder: Path, turns: Iterable[Weights], dtype: torch.dtype, config: RunConfig, host: Words, end_ids: Iterable[int] = ()
) -> None:
    """Writes a folder that `transformers` and vLLM load: in every turn each rank its files, into a folder that rank 0 stages
    beside and names when all are there; a former checkpoint is replaced. `turns`: the weights with those files that the rank
    writes next, which is all of them that it need hold; as many turns on every rank, asked for when all have written the one
    before. `end_ids`, rank 0's: what ends a response. Collective. StorageError on every rank where one cannot write,
    CheckpointError where `folder` holds other files; then nothing of it stays."""
    with ExitStack() as stack:
        told = b""
        if host.rank == 0:
            told = str(stack.enter_context(staged_folder(check_destination(folder).absolute()))).encode()
        staging, whole = Path(host.broadcast(told).decode()), Weights((), {}, 0)
        for turn in turns:
            whole, failure = replace(turn, own={}), _failure(staging, turn, host.rank)
            del turn  # before the next one is gathered
            if failure := host.agreed(failure.encode(), lambda words: next(filter(None, words), b"")).decode():
                raise StorageError(failure)
        if host.rank == 0:
            _write_beside(staging, whole, dtype, config, end_ids)
    host.barrier()  # it has its name


def _failure(staging: Path, turn: Weights, rank: int) -> str:
    """Writes this rank's files of a turn; why it cannot, and nothing where it has."""
    try:
        with storing(staging.parent, lambda: turn.num_bytes):
            _write_files(staging, turn)
    except StorageError as error:
        return str(error)
    except OSError as error:  # not what a full disk or a lack of permission says; the other ranks must hear of it all the same
        return (
            f"{staging} cannot be written by trainer rank {rank} on {socket.gethostname()}: {error}: look at the file system "
            f"there, or name another folder"
        )
    return ""


def _write_files(folder: Path, weights: Weights) -> dict[str, FileRecord]:
    """Writes this rank's files of weights into a folder; what each is, by its name."""
    files, written = shard_names(len(weights.names)), dict[str, FileRecord]()
    for index, tensors in weights.own.items():
        ordered = {name: tensors[name] for name in weights.names[index]}
        written[files[index]] = write_tensors(folder / files[index], ordered, {"format": "pt"})
    return written


def _write_beside(folder: Path, weights: Weights, dtype: torch.dtype, config: RunConfig, end_ids: Iterable[int]) -> None:
    """Writes what stands beside the files of weights."""
    files = dict(zip(shard_names(len(weights.names)), weights.names, strict=True))
    template = read_chat_template(config.data.chat_template) or None
    write_companions(folder, files, dtype, weights.num_bytes, config.model.path, end_ids, template)


def verify_seed(file: Path, known: Mapping[str, Any], checkpoint: Path) -> None:
    """CheckpointError where a file of the seed model, which the reference is, is not the one the run began with."""
    found = file_record(file).as_json() if file.exists() else None
    if found != known:
        raise CheckpointError(
            f"model.path must hold the weights that {checkpoint} was written with, for the run goes on needing them (its "
            f"reference, or what its engines sample from); found {'none' if found is None else 'others'} at {file}: put back "
            f"what it was, or start a new run"
        )


def _held(checkpoint: Path) -> Path | None:
    """The folder that a kept checkpoint has its reference in; None where it has none, or cannot be read: it is kept as it is,
    and no reason to end a run that goes on from another one."""
    if not (checkpoint / MANIFEST).exists():
        return None
    try:
        return reference_folder(checkpoint)
    except CheckpointError as error:
        log.warning(str(error))
        return None


def _reference(snapshot: Snapshot) -> dict[str, Any] | None:
    """Where the reference is, as the manifest has it; None: the seed model's, or not needed."""
    if snapshot.reference is not None:
        return {"folder": REFERENCE}
    return {"step": snapshot.reference_step} if snapshot.reference_step is not None else None


def _word(path: Path) -> dict[str, Any]:
    """What a rank said of its part; an empty file is all that a full disk takes."""
    text = path.read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text) if text else {"error": f"{path.stem} cannot be written", "storage": True}
    return found


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; a file that takes its final name meanwhile may be missed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _as_json(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: record.as_json() for name, record in files.items()}
