"""One safetensors file written and hashed in a single pass, so that nobody has to read it again to know its digest. Reading is
the safetensors library's; folders, manifests and who writes what are others' business.

The format (safetensors README, "Format"): 8 bytes little-endian length of a JSON header, the header padded with spaces to a
multiple of 8, then the tensors' bytes one after another, the widest types first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DIGEST = hashlib.sha256  # of the files of a checkpoint
WRITE_BYTES = 64 << 20  # written and hashed at a time
SYNC_BYTES = 256 << 20  # after so many they are on disk, so that a growing file says that its disk gets on


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a written file: its size in bytes and the SHA-256 of its contents as hexadecimal text."""

    num_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """As a checkpoint's manifest has it."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}


def file_record(path: Path) -> FileRecord:
    """What is known of a file, by reading it."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, DIGEST).hexdigest())


def dtype_names() -> dict[torch.dtype, str]:
    """What safetensors calls the types that a trainer state may have."""
    import torch

    return {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
    }


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Writes `tensors` (any shapes, on the host) to `path` and waits until they are on disk; the file has the mode that the
    umask gives. OSError where it cannot be written."""
    import torch

    names = dtype_names()
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        value = tensors[name]
        end = start + value.nbytes
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes, waiting = DIGEST(), 0, 0
    with path.open("wb") as file:
        head = len(text).to_bytes(8, "little") + text
        contents = (tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().data for name in order)
        for block in (memoryview(head), *contents):
            for place in range(0, len(block), WRITE_BYTES):
                part = block[place : place + WRITE_BYTES]
                file.write(part)
                digest.update(part)
                waiting += len(part)
                if waiting >= SYNC_BYTES:
                    file.flush()
                    os.fdatasync(file.fileno())
                    waiting = 0
            num_bytes += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(num_bytes, digest.hexdigest())
