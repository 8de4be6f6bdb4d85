"""The headers of a model's safetensors files against the family's table: which tensors are there, of which sizes, and whether
the files are as long as their headers say. It reads no weights, so that a model of any size is looked at in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from engine.core.errors import CheckpointError
from engine.models.base import ModelShape
from engine.models.hf import INDEX_FILE, HfCheckpoint
from engine.models.sharding import tensors

MAX_SHOWN = 3
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights may be stored in, as safetensors calls it


def weight_faults(path: str | Path, shape: ModelShape, option: str = "model.path") -> Iterator[CheckpointError]:
    """What would stop the weights of a folder from being loaded into a model of `shape`: a sentence for each file that is
    missing or broken, one for all missing tensors, and one for each tensor of the first few with other sizes or of a dtype
    that is no model's."""
    try:
        checkpoint = HfCheckpoint(path, option)
    except CheckpointError as error:
        yield error
        return
    names = checkpoint.files
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    broken = set()
    for file in sorted(set(names.values())):
        try:
            found |= {name: (file, *held) for name, held in checkpoint.header(file).items()}
        except CheckpointError as error:
            broken.add(file)
            yield error
    wanted = tensors(shape)
    missing = [name for name in wanted if name not in found and names.get(name) not in broken]
    if moved := [name for name in wanted if name in found and found[name][0] != names.get(name)]:
        yield CheckpointError(
            f"{Path(path) / INDEX_FILE} must name the file that each tensor is in; found {names.get(moved[0])} for {moved[0]}, "
            f"which is in {found[moved[0]][0]}: fetch it again"
        )
    if missing:
        more = f" and {len(missing) - MAX_SHOWN} more" if len(missing) > MAX_SHOWN else ""
        yield CheckpointError(
            f"{path} must hold every tensor of the model in its config.json; found no {', '.join(missing[:MAX_SHOWN])}{more}: "
            f"the checkpoint is incomplete, fetch it again"
        )
    others = [name for name, sizes in wanted.items() if name in found and found[name][1] != sizes]
    for name in others[:MAX_SHOWN]:
        file, sizes, _ = found[name]
        yield CheckpointError(
            f"{Path(path) / file}: tensor {name} must be {list(wanted[name])} by config.json; found {list(sizes)}: the two "
            f"files belong to different models"
        )
    narrow = [name for name in wanted if name in found and found[name][2] not in FLOATS]
    for name in narrow[:MAX_SHOWN]:
        file, _, dtype = found[name]
        more = f", as of {len(narrow) - 1} others" if len(narrow) > 1 and name == narrow[0] else ""
        yield CheckpointError(
            f"{Path(path) / file}: tensor {name} must be of {', '.join(FLOATS)}; found {dtype}{more}: quantized weights "
            f"cannot be trained on, fetch the model in bfloat16"
        )


def num_elements(shape: ModelShape) -> int:
    """Elements of all tensors of the model."""
    return sum(math.prod(sizes) for sizes in tensors(shape).values())
