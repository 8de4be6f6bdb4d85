"""Hugging Face folders in and out: config.json into a `ModelShape` by its family, safetensors read one tensor at a time, and a
folder written so that it appears whole or not at all. It knows no parallel layout and loads no Python from a folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from engine.core.errors import CheckpointError, ConfigError, looked_in
from engine.core.files import give_umask_mode, staged_folder
from engine.core.registry import portable
from engine.models.base import INERT_FIELDS, PLAIN_FIELDS, ROPE_FIELDS, Family, Llama3Scaling, ModelShape
from engine.models.registry import AUTO, FAMILIES, family_named

if TYPE_CHECKING:
    import torch

HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")  # of a model: owner/name
POLICY = "model.path"  # the option whose folder must hold a language model; a reward model's head is told by its tensors
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
COMPANIONS = (
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def read_shape(path: str | Path, option: str = POLICY, family: str = AUTO) -> ModelShape:
    """The sizes in `path`/config.json; `family` as model.family names it. ConfigError when the file is not of that family, or
    says what it does not know; CheckpointError when it is unreadable or incomplete; both blame `option`."""
    file = Path(path) / "config.json"
    config = _read_json(file, option)
    name, kind = _family(config, family, file, option)
    _check_fields(config, kind, file, option)
    if option == POLICY:
        _check_head(config, file, option)
    given = {key: value for key, value in config.items() if value is not None}
    said = {**kind.defaults, **given}
    try:
        _check_rope(config, kind, file, option)
        heads = int(said["num_attention_heads"])
        return ModelShape(
            num_layers=int(said["num_hidden_layers"]),
            hidden=int(said["hidden_size"]),
            num_heads=heads,
            num_kv_heads=int(said.get("num_key_value_heads", heads)),
            head_dim=int(said.get("head_dim") or said["hidden_size"] // heads),
            ffn_hidden=int(said["intermediate_size"]),
            vocab_size=int(said["vocab_size"]),
            rope_theta=float(_rope(config).get("rope_theta") or said["rope_theta"]),
            rope_scaling=_read_scaling(_rope(config), kind, file, option),
            norm_eps=float(said["rms_norm_eps"]),
            tied=bool(said["tie_word_embeddings"]),
            max_positions=int(said["max_position_embeddings"]),
            family=portable(name),
        )
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error.args[0]}, which {kind.title} needs: fetch it again") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{file} must hold the sizes of {kind.title} as numbers; found {error}: fetch it again"
        ) from error


SIZES = frozenset(  # fields of config.json that `read_shape` reads
    [
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    ]
)


def _family(config: dict[str, Any], asked: str, file: Path, option: str) -> tuple[str, type[Family]]:
    """(name, class) of the family that is asked for, or that the file's model_type names."""
    found = config.get("model_type")
    known = {family_named(name).model_type: name for name in FAMILIES.names}
    name = asked if asked != AUTO else known.get(str(found))
    if name is None or family_named(name).model_type != found:
        title = "of a model family that is known" if asked == AUTO else family_named(asked).title
        wanted = list(known) if asked == AUTO else [family_named(asked).model_type]
        raise ConfigError(
            f"{option} must be {title}: {file} must have model_type = {' or '.join(map(repr, wanted))}; found {found!r}: use "
            f"another checkpoint, or describe the family and name it by model.family"
        )
    return name, family_named(name)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary table of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`)."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _check_fields(config: dict[str, Any], family: type[Family], file: Path, option: str) -> None:
    """ConfigError for a field whose value the family does not allow, or that nobody knows; null is as good as missing."""
    plain = {**PLAIN_FIELDS, **family.plain_fields}
    for key, found in config.items():
        inert = key in INERT_FIELDS or key in family.inert_fields or key.endswith("_token_id")
        if found is None or key in SIZES or inert or (key == "layer_types" and {*found} <= {"full_attention"}):
            continue
        if key not in plain:
            raise ConfigError(
                f"{option} must be {family.title}: {file} has {key} = {found!r}, which no model of type {family.model_type!r} "
                f"is known to have, and which would not be followed: remove it where it changes nothing, or describe a family "
                f"that has it and name it by model.family"
            )
        if found not in plain[key]:
            raise ConfigError(
                f"{option} must be {family.title}: {file} must have {key} = {' or '.join(map(repr, plain[key])) or 'null'}; "
                f"found {found!r}: use a checkpoint without it"
            )


def _check_head(config: dict[str, Any], file: Path, option: str) -> None:
    """ConfigError for a class whose head gives no next-token logits; an engine takes the class by its name. A file that names
    none is one that somebody made by hand."""
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if not str(name).endswith("ForCausalLM"):
            raise ConfigError(
                f"{option} must hold a language model, a class that ends in ForCausalLM: {file} has architectures = {names!r}: "
                f"use the checkpoint of a language model, or correct the name where its head is one"
            )


def _check_rope(config: dict[str, Any], family: type[Family], file: Path, option: str) -> None:
    """ConfigError where transformers 4's names and those of 5 say two things of the rotary frequencies."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    tables = [_rope_table(table) for table in (new, old) if table]
    thetas = {float(found) for found in (new.get("rope_theta"), old.get("rope_theta"), config.get("rope_theta")) if found}
    if (len(tables) == 2 and tables[0] != tables[1]) or len(thetas) > 1:
        found = {name: config[name] for name in ("rope_parameters", "rope_scaling", "rope_theta") if config.get(name)}
        raise ConfigError(
            f"{option} must be {family.title}: {file} must say its rotary frequencies once, or the same twice; found "
            f"{found!r}: remove what it was not trained with"
        )


def _rope_table(table: dict[str, Any]) -> dict[str, Any]:
    """A rotary table without theta and under one name for its type, which may be missing."""
    kind = table.get("rope_type") or table.get("type") or "default"
    return {key: value for key, value in table.items() if key not in ("type", "rope_theta") and value is not None} | {
        "rope_type": kind
    }


def _read_scaling(rope: dict[str, Any], family: type[Family], file: Path, option: str) -> Llama3Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in family.rope_types:
        raise ConfigError(
            f"{option} must be {family.title}: {file} must have rope type {' or '.join(map(repr, family.rope_types))}; found "
            f"{kind!r}: use another checkpoint"
        )
    known = {"rope_type", "type", "rope_theta", *ROPE_FIELDS[kind]}
    for key, found in rope.items():
        if found is not None and key not in known and found not in PLAIN_FIELDS.get(key, ()):
            raise ConfigError(
                f"{option} must be {family.title}: {file} has {key} = {found!r} in its rotary table of type {kind!r}, which "
                f"would not be followed: use another checkpoint"
            )
    if kind == "default":
        return None
    return Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def _read_json(file: Path, option: str = "model.path") -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        if HUB_NAME.fullmatch(str(file.parent)) and not file.parent.exists():
            name = str(file.parent)
            folder = f"models/{file.parent.name}"
            raise CheckpointError(
                f"{option} must be a folder of this machine, looked for from {Path.cwd()}; found none at {name}: if that is a "
                f"model of the Hugging Face hub, fetch it once, `hf download {name} --local-dir {folder}`, and name {folder}"
            ) from error
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; check {option}{looked_in(file)}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}; fetch it again") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} must hold a JSON object; found a {type(tree).__name__}: fetch it again")
    return tree


def read_end_ids(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The token ids that end a completion, as generation_config.json and config.json say, by file; without a file that does
    not say. data/ends.py makes one rule of them. CheckpointError for a file that says something else than ids."""
    named = {}
    for name in (GENERATION_CONFIG, CONFIG):
        file = Path(path) / name
        found = _read_json(file).get("eos_token_id") if file.exists() else None
        if found is None:
            continue
        ids = [found] if isinstance(found, int) else found
        if not (isinstance(ids, list) and all(isinstance(token, int) for token in ids)):
            raise CheckpointError(f"{file} must have eos_token_id as a number or a list of numbers; found {found!r}: mend it")
        named[name] = tuple(ids)
    return named


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of a model's weights by its config.json; CheckpointError where that does not say it."""
    file = Path(path) / "config.json"
    config = _read_json(file)
    import torch

    said = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, str(said).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{file} must say the dtype of the weights as `dtype`; found {said!r}: name a dtype instead")
    return dtype


class HfCheckpoint:
    """The tensors of a folder with model.safetensors or an index of shards, read from disk when asked for."""

    def __init__(self, path: str | Path, option: str = "model.path") -> None:
        self.path = Path(path)
        self._files: dict[str, str] = {}  # the file of each tensor
        if (self.path / SINGLE_FILE).exists():
            with self._open(SINGLE_FILE, framework="numpy") as opened:
                self._files = dict.fromkeys(opened.keys(), SINGLE_FILE)
        elif (self.path / INDEX_FILE).exists():
            self._files = dict(_read_json(self.path / INDEX_FILE).get("weight_map", {}))
        else:
            raise CheckpointError(
                f"{self.path} must hold {SINGLE_FILE} or {INDEX_FILE}; found neither: check {option}, or convert the "
                f"checkpoint to safetensors"
            )

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
        if name not in self._files:
            raise CheckpointError(f"{self.path} has no tensor {name}: the checkpoint is incomplete, fetch it again")
        file = self._files[name]
        try:
            with self._open(file) as opened:
                value: torch.Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / file}: {name} cannot be read: {error}; fetch it again") from error
        if shape is not None and tuple(value.shape) != shape:
            raise CheckpointError(
                f"{self.path / file}: tensor {name} must be {list(shape)} by config.json; found {list(value.shape)}: "
                f"the two files belong to different models"
            )
        return value

    def _open(self, file: str, framework: str = "pt") -> Any:
        try:
            return safe_open(self.path / file, framework=framework)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}; fetch it again") from error


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file of contiguous tensors, readable to whom the umask lets read."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    give_umask_mode(path)


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
) -> None:
    """Writes a folder that `transformers` and vLLM load, staged beside `directory` and renamed when complete.

    `template` is the folder whose config.json (dtype updated), generation config and tokenizer files come along; where the
    generation config does not name all of `end_ids`, what ends a response, it is made to.
    A former checkpoint at `directory` is replaced; a folder that is none raises CheckpointError and is left alone.
    """
    directory = check_destination(directory)
    with staged_folder(directory) as staging:
        dtype = _write_shards(staging, tensors, max_shard_bytes)
        config = _read_json(Path(template) / "config.json")
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        _write_json(staging / "config.json", config)
        for name in COMPANIONS:
            if (Path(template) / name).exists():
                shutil.copyfile(Path(template) / name, staging / name)
        _name_ends(staging, list(end_ids))


def _name_ends(folder: Path, end_ids: list[int]) -> None:
    """Has generation_config.json, which transformers and vLLM stop by, or without it config.json name all of `end_ids`."""
    file, named = folder / GENERATION_CONFIG, read_end_ids(folder)
    if set(end_ids) <= set(named.get(GENERATION_CONFIG if file.exists() else CONFIG, ())):
        return
    said = _read_json(file) if file.exists() else {}
    _write_json(file, said | {"eos_token_id": end_ids})


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Streams tensors into shard files in their order, holding one shard at a time; returns their dtype."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        save_tensors(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, value in tensors:
        if pending and sum(held.nbytes for held in pending.values()) + value.nbytes > max_shard_bytes:
            flush()
        pending[name] = value.detach().cpu().contiguous()
        total += value.nbytes
        dtype = value.dtype
    assert dtype is not None, "a checkpoint without tensors"
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE_FILE)
        return dtype
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / f"{i}.part").rename(folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dtype


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
