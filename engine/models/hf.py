"""Weights in Hugging Face's form, in and out: safetensors read one tensor at a time, and a folder written so that it appears
whole or not at all. It knows no parallel layout; config_file.py beside it reads the other files of a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from engine.core.errors import CheckpointError, brief
from engine.core.files import staged_folder
from engine.core.tensor_files import write_tensors
from engine.models.config_file import ADAPTER, CONFIG, GENERATION_CONFIG, mending, read_end_ids, read_json

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHAT_TEMPLATE = "chat_template.jinja"
COMPANIONS = (
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
)


class HfCheckpoint:
    """The tensors of a folder with model.safetensors or an index of shards, read from disk when asked for."""

    def __init__(self, path: str | Path, option: str = "model.path") -> None:
        self.path = Path(path)
        self._files: dict[str, str] = {}  # the file of each tensor
        if (self.path / SINGLE_FILE).exists():
            with self._open(SINGLE_FILE, framework="numpy") as opened:
                self._files = dict.fromkeys(opened.keys(), SINGLE_FILE)
        elif (self.path / INDEX_FILE).exists():
            self._files = _weight_map(self.path / INDEX_FILE, option)
        else:
            raise _without_weights(self.path, option)

    def header(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype as safetensors calls it) of every tensor in one of the folder's files. CheckpointError when it cannot
        be read, or is not as long as its header says."""
        with self._open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            return {name: (tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}

    @property
    def files(self) -> dict[str, str]:
        """The file that holds each tensor, by the tensor's name."""
        return dict(self._files)

    def names(self) -> frozenset[str]:
        """Names of all tensors in the files."""
        return frozenset(self._files)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor in its stored dtype. CheckpointError when it is missing, unreadable or not of `shape`."""
        value: torch.Tensor = self._read(name, shape, lambda found: found[:])
        return value

    def part(self, name: str, shape: tuple[int, ...], rows: slice, cols: slice) -> torch.Tensor:
        """The rectangle of a matrix [M, N] (`cols` of a vector is all of it) in its stored dtype, of which alone the bytes are
        read. CheckpointError as of `tensor`."""
        part: torch.Tensor = self._read(name, shape, lambda found: found[rows, cols] if len(shape) == 2 else found[rows])
        return part

    def _read(self, name: str, shape: tuple[int, ...] | None, take: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """What `take` gives of safetensors' slice of a tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.path} has no tensor {name}: the checkpoint is incomplete, fetch it again")
        file = self._files[name]
        try:
            with self._open(file) as opened:
                found = opened.get_slice(name)
                there = tuple(found.get_shape())
                if shape is not None and there != shape:
                    raise CheckpointError(
                        f"{self.path / file}: tensor {name} must be {list(shape)} by config.json; found {list(there)}: "
                        f"the two files belong to different models"
                    )
                return take(found)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / file}: {name} cannot be read: {error}; fetch it again") from error

    def _open(self, file: str, framework: str = "pt") -> Any:
        try:
            return safe_open(self.path / file, framework=framework)
        except (OSError, SafetensorError) as error:
            fix = mending(self.path / file) if (self.path / file).is_file() else "fetch it again"
            raise CheckpointError(f"{self.path / file} cannot be read: {error}; {fix}") from error


def _weight_map(file: Path, option: str) -> dict[str, str]:
    """The file of each tensor, by an index of shards. CheckpointError for an index of another form."""
    found = read_json(file, option).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"{file} must have a table weight_map of tensors and their files; found {brief(found)}: fetch it again"
        )
    for name, shard in found.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{file} must name files of its own folder in weight_map; found {brief(shard)} for {name}: fetch it again"
            )
    return dict(found)


def _without_weights(folder: Path, option: str) -> CheckpointError:
    """The error of a folder without weights that can be read; it says which others are there."""
    others = [file.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf", ADAPTER) for file in sorted(folder.glob(pattern))]
    if ADAPTER in others:
        found, fix = f"an adapter ({ADAPTER})", "merge it into its base model (PEFT's merge_and_unload) and save that"
    elif others:
        found, fix = f"neither but {', '.join(others[:3])}", "convert the checkpoint to safetensors"
    else:
        found, fix = "neither", "convert the checkpoint to safetensors"
    return CheckpointError(f"{folder} must hold {SINGLE_FILE} or {INDEX_FILE}; found {found}: check {option}, or {fix}")


def check_destination(directory: str | Path) -> Path:
    """The folder a checkpoint may be written to: new, empty, or a former checkpoint; CheckpointError otherwise."""
    directory = Path(directory)
    taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if taken and not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} must be new or a checkpoint; found other files: choose another folder")
    return directory


def write_hf_checkpoint(
    directory: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    template: str | Path,
    max_shard_bytes: int = 5 << 30,
    *,
    end_ids: Iterable[int] = (),
    chat_template: str | None = None,
) -> None:
    """Writes a folder that `transformers` and vLLM load, staged beside `directory` and renamed when complete; its files beside
    the weights are those of `write_companions`. A former checkpoint at `directory` is replaced; a folder that is none raises
    CheckpointError and is left alone.
    """
    directory = check_destination(directory)
    with staged_folder(directory) as staging:
        shards, dtype, num_bytes = _write_shards(staging, tensors, max_shard_bytes)
        files = shard_names(len(shards))
        for index, file in enumerate(files):
            (staging / f"{index}.part").rename(staging / file)
        write_companions(staging, dict(zip(files, shards, strict=True)), dtype, num_bytes, template, end_ids, chat_template)


def shard_names(count: int) -> list[str]:
    """The names of a folder's `count` files of weights, as transformers has them."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def write_companions(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    dtype: torch.dtype,
    num_bytes: int,
    template: str | Path,
    end_ids: Iterable[int] = (),
    chat_template: str | None = None,
) -> None:
    """Writes what stands beside the weights: the index of several files, config.json with the weights' dtype, generation
    config and tokenizer files of the folder `template`; where the generation config does not name all of `end_ids`, what ends
    a response, it is made to. `chat_template`: a text in place of the tokenizer's own, as CHAT_TEMPLATE, which transformers and
    vLLM read first. `files`: the names of the tensors in each; `num_bytes`: of all of them."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    config = read_json(Path(template) / "config.json")
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    for name in COMPANIONS:
        if (Path(template) / name).exists():
            shutil.copyfile(Path(template) / name, folder / name)
    if chat_template:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    _name_ends(folder, list(end_ids))


def _name_ends(folder: Path, end_ids: list[int]) -> None:
    """Has generation_config.json, which transformers and vLLM stop by, or without it config.json name all of `end_ids`."""
    file, named = folder / GENERATION_CONFIG, read_end_ids(folder)
    if set(end_ids) <= set(named.get(GENERATION_CONFIG if file.exists() else CONFIG, ())):
        return
    said = read_json(file) if file.exists() else {}
    _write_json(file, said | {"eos_token_id": end_ids})


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> tuple[list[list[str]], torch.dtype, int]:
    """Streams tensors into files 0.part, 1.part ... in their order, holding one file's at a time; the names in each, the
    dtype and the bytes of all."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        write_tensors(folder / f"{len(shards)}.part", pending, {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, value in tensors:
        if pending and sum(held.nbytes for held in pending.values()) + value.nbytes > max_shard_bytes:
            flush()
        pending[name] = value.detach().cpu()
        total += value.nbytes
        dtype = value.dtype
    assert dtype is not None, "a checkpoint without tensors"
    flush()
    return shards, dtype, total


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
