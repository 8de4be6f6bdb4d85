"""The headers of a model's safetensors files against the family's table: which tensors are there, of which sizes, and whether
the files are as long as their headers say. It reads no weights, so that a model of any size is looked at in a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.errors import CheckpointError
from engine.models.hf import HfCheckpoint
from engine.models.sharding import tensors

if TYPE_CHECKING:
    from engine.models.hf import LlamaShape

MAX_HEADER_BYTES = 100 << 20  # what the format allows
MAX_SHOWN = 3


def weight_faults(path: str | Path, shape: LlamaShape, option: str = "model.path") -> Iterator[CheckpointError]:
    """What would stop the weights of a folder from being loaded into a model of `shape`: a sentence for each file that is
    missing or broken, one for all missing tensors, and one for each tensor of the first few with other sizes."""
    try:
        names = HfCheckpoint(path, option).files
    except CheckpointError as error:
        yield error
        return
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    broken = set()
    for file in sorted(set(names.values())):
        try:
            found |= {name: (file, sizes) for name, sizes in read_header(Path(path) / file, option).items()}
        except CheckpointError as error:
            broken.add(file)
            yield error
    wanted = tensors(shape)
    missing = [name for name in wanted if name not in found and names.get(name) not in broken]
    if missing:
        more = f" and {len(missing) - MAX_SHOWN} more" if len(missing) > MAX_SHOWN else ""
        yield CheckpointError(
            f"{path} must hold every tensor of the model in its config.json; found no {', '.join(missing[:MAX_SHOWN])}{more}: "
            f"the checkpoint is incomplete, fetch it again"
        )
    others = [name for name, sizes in wanted.items() if name in found and found[name][1] != sizes]
    for name in others[:MAX_SHOWN]:
        file, sizes = found[name]
        yield CheckpointError(
            f"{Path(path) / file}: tensor {name} must be {list(wanted[name])} by config.json; found {list(sizes)}: the two "
            f"files belong to different models"
        )


def read_header(file: Path, option: str = "model.path") -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file. CheckpointError when it is missing, no such file, or cut short."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length)) if length <= MAX_HEADER_BYTES else {}
        num_bytes = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; check {option}, or fetch it again") from error
    except ValueError as error:
        raise CheckpointError(f"{file} must be a safetensors file; found no header: fetch it again") from error
    header.pop("__metadata__", None)
    if not header:
        raise CheckpointError(f"{file} must be a safetensors file with tensors; found none: fetch it again")
    end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if num_bytes != end:
        raise CheckpointError(f"{file} must have {end} bytes by its header; found {num_bytes}: fetch it again")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def num_elements(shape: LlamaShape) -> int:
    """Elements of all tensors of the model."""
    return sum(math.prod(sizes) for sizes in tensors(shape).values())
