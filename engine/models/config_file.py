"""What the files beside a model's weights say, in a Hugging Face folder: config.json as a `ModelShape` by its family, the
tokens that end a completion, the weights' dtype. It reads no weights, writes nothing and loads no Python from a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.errors import CheckpointError, ConfigError
from engine.core.places import meant
from engine.core.registry import portable
from engine.models.base import INERT_FIELDS, PLAIN_FIELDS, ROPE_FIELDS, Family, Llama3Scaling, ModelShape
from engine.models.registry import AUTO, FAMILIES, family_named

if TYPE_CHECKING:
    import torch

POLICY = "model.path"  # the option whose folder must hold a language model; a reward model's head is told by its tensors
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ADAPTER = "adapter_config.json"  # what PEFT leaves beside weights that are none of a whole model
POINTER = b"version https://git-lfs"  # how a file begins that git has not fetched
DOWNLOAD = "fetch it with `hf download {} --local-dir FOLDER` and name FOLDER, for runs have no network"
MOST = 2**31 - 1  # of any size


def read_shape(path: str | Path, option: str = POLICY, family: str = AUTO) -> ModelShape:
    """The sizes in `path`/config.json; `family` as model.family names it. ConfigError when the file is not of that family, or
    says what it does not know; CheckpointError when it is unreadable or incomplete; both blame `option`."""
    require_folder(path, option)
    file = Path(path) / CONFIG
    config = read_json(file, option)
    name, kind = _family(config, family, file, option)
    _check_fields(config, kind, file, option)
    if option == POLICY:
        _check_head(config, file, option)
    given = {key: value for key, value in config.items() if value is not None}
    said = {**kind.defaults, **given}
    try:
        _check_rope(config, kind, file, option)
        heads = int(said["num_attention_heads"])
        shape = ModelShape(
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
        _check_sizes(shape)
        return shape
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error.args[0]}, which {kind.title} needs: fetch it again") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{file} must hold the sizes of {kind.title} as numbers; found {error}: fetch it again"
        ) from error


def require_folder(path: str | Path, option: str = POLICY) -> None:
    """CheckpointError where there is no folder with a config.json: what is there instead, and what to do about it."""
    folder = Path(path)
    if not str(path).strip() or not folder.is_dir():
        found = (
            "an empty name" if not str(path).strip() else f"a file at {path}" if folder.is_file() else f"no folder at {path}"
        )
        if folder.suffix == ".gguf":
            fix = "fetch the checkpoint in safetensors, GGUF cannot be trained on"
        elif folder.is_file():
            fix = "name the folder that it is in"
        else:
            fix = meant(str(path), option, DOWNLOAD)
        raise CheckpointError(f"{option} must be the folder of a Hugging Face model; found {found}: {fix}")
    if (folder / CONFIG).exists():
        return
    snapshots = sorted(folder.glob(f"snapshots/*/{CONFIG}"))
    if (folder / ADAPTER).exists():
        found, fix = f"an adapter ({ADAPTER})", "merge it into its base model (PEFT's merge_and_unload) and save that"
    elif any(folder.glob("*.gguf")):
        found, fix = "GGUF alone", "fetch the checkpoint in safetensors, GGUF cannot be trained on"
    elif snapshots:
        found, fix = "a folder of the hub's cache", f"name its {snapshots[-1].parent}"
    elif (folder / "checkpoints").is_dir():
        found, fix = "a run's directory", f"make a model of it with `semion export {path} FOLDER`"
    elif any(folder.glob("consolidated.*.pth")):
        found, fix = "the weights as Meta publishes them (consolidated.00.pth)", "fetch the model in Hugging Face's form"
    elif not any(folder.iterdir()):
        found, fix = "an empty folder", "check the path, or fetch the model again"
    else:
        found, fix = "none", "check the path, or fetch the model again"
    raise CheckpointError(f"{option} must be the folder of a Hugging Face model, with {CONFIG}; found {found} in {path}: {fix}")


def _check_sizes(shape: ModelShape) -> None:
    """ValueError for sizes that no model has."""
    sizes = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_hidden,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
    }
    if wrong := [f"{name} = {size}" for name, size in sizes.items() if not 0 < size <= MOST]:
        raise ValueError(", ".join(wrong))
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(f"num_attention_heads = {shape.num_heads}, no multiple of num_key_value_heads = {shape.num_kv_heads}")


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


def read_json(file: Path, option: str = "model.path") -> dict[str, Any]:
    """A JSON object of a model's folder; CheckpointError where the file cannot be read or holds something else."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; check {option}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}; {mending(file)}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} must hold a JSON object; found a {type(tree).__name__}: fetch it again")
    return tree


def mending(file: Path) -> str:
    """What to do about a file that cannot be read."""
    with file.open("rb") as opened:
        is_pointer = opened.read(len(POINTER)) == POINTER
    return "git has not fetched it: run `git lfs pull` there" if is_pointer else "fetch it again"


def read_end_ids(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The token ids that end a completion, as generation_config.json and config.json say, by file; without a file that does
    not say. data/ends.py makes one rule of them. CheckpointError for a file that says something else than ids."""
    named = {}
    for name in (GENERATION_CONFIG, CONFIG):
        file = Path(path) / name
        found = read_json(file).get("eos_token_id") if file.exists() else None
        if found is None:
            continue
        ids = [found] if isinstance(found, int) else found
        if not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
            raise CheckpointError(f"{file} must have eos_token_id as a number or a list of numbers; found {found!r}: mend it")
        named[name] = tuple(ids)
    return named


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of a model's weights by its config.json; CheckpointError where that does not say it."""
    file = Path(path) / "config.json"
    config = read_json(file)
    import torch

    said = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, str(said).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{file} must say the dtype of the weights as `dtype`; found {said!r}: name a dtype instead")
    return dtype
