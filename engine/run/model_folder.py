"""A folder that `transformers` and vLLM load, written by all trainer ranks, each its own files. As a model of its own rank 0
stages it beside and names it when all are there; in a checkpoint saving.py does so. Which tensors a rank writes is decided by
who asks (milestones.py).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.config.load import RunConfig
from engine.core.errors import ConfigError, StorageError
from engine.core.files import staged_folder, storing
from engine.core.tensor_files import FileRecord, write_tensors
from engine.data.templates import read_chat_template
from engine.models.hf import check_destination, shard_names, write_companions

if TYPE_CHECKING:
    import torch


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
            write_beside(staging, whole, dtype, config, end_ids)
    host.barrier()  # it has its name


def _failure(staging: Path, turn: Weights, rank: int) -> str:
    """Writes this rank's files of a turn; why it cannot, and nothing where it has."""
    try:
        with storing(staging.parent, lambda: turn.num_bytes):
            write_files(staging, turn)
    except StorageError as error:
        return str(error)
    except OSError as error:  # not what a full disk or a lack of permission says; the other ranks must hear of it all the same
        return (
            f"{staging} cannot be written by trainer rank {rank} on {socket.gethostname()}: {error}: look at the file system "
            f"there, or name another folder"
        )
    return ""


def write_files(folder: Path, weights: Weights) -> dict[str, FileRecord]:
    """Writes this rank's files of weights into a folder; what each is, by its name."""
    files, written = shard_names(len(weights.names)), dict[str, FileRecord]()
    for index, tensors in weights.own.items():
        ordered = {name: tensors[name] for name in weights.names[index]}
        written[files[index]] = write_tensors(folder / files[index], ordered, {"format": "pt"})
    return written


def write_beside(folder: Path, weights: Weights, dtype: torch.dtype, config: RunConfig, end_ids: Iterable[int]) -> None:
    """Writes what stands beside the files of weights."""
    files = dict(zip(shard_names(len(weights.names)), weights.names, strict=True))
    template = read_chat_template(config.data.chat_template) or None
    write_companions(folder, files, dtype, weights.num_bytes, config.model.path, end_ids, template)
