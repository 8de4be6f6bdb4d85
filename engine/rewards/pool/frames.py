"""Messages over pipes between us and our own worker processes: four bytes of length, little-endian, then JSON in UTF-8.
No pickle, and no waiting policy: deadlines belong to the callers. Imports only the standard library, because a worker's
start pays for every import.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

LENGTH = struct.Struct("<I")  # of what follows it


def frame(message: Any) -> bytes:
    """One message as it is written. Lone surrogates, which JSON text can hold, survive."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(body)) + body


def write_frame(descriptor: int, message: Any) -> None:
    """Writes one message whole. Raises BrokenPipeError."""
    view = memoryview(frame(message))
    while view:
        view = view[os.write(descriptor, view) :]


def read_frame(descriptor: int) -> Any | None:
    """Reads one message; None when the other side is gone, also in the middle of a message."""
    header = _read_exactly(descriptor, LENGTH.size)
    body = header and _read_exactly(descriptor, LENGTH.unpack(header)[0])
    return decoded(body) if body else None


def decoded(body: bytes) -> Any:
    """The message that follows a length."""
    return json.loads(body.decode("utf-8", "surrogatepass"))


def _read_exactly(descriptor: int, num_bytes: int) -> bytes | None:
    data = b""
    while len(data) < num_bytes:
        piece = os.read(descriptor, num_bytes - len(data))
        if not piece:
            return None
        data += piece
    return data
