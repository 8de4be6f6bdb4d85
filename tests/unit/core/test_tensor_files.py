"""Tensors in a file that is hashed while it is written: what another program reads of it, its digest, and that it goes to the
disk in parts.
"""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from engine.core import tensor_files
from engine.core.tensor_files import file_record, write_tensors


@pytest.mark.parametrize(("at_once", "syncs"), [(1 << 30, 0), (1000, 4)])
def test_what_is_written_is_on_disk_before_much_more_is(tmp_path, monkeypatch, at_once, syncs):
    """4,800 bytes in pieces of 256: after every 1,000 and more the disk is waited for. The file is the same."""
    tensors = {"b": torch.arange(1000, dtype=torch.float32), "a": torch.arange(400, dtype=torch.int16)}
    waited: list[int] = []
    known = os.fdatasync

    def wait(number: int) -> None:
        waited.append(os.fstat(number).st_size)
        known(number)

    monkeypatch.setattr(os, "fdatasync", wait)
    monkeypatch.setattr(tensor_files, "WRITE_BYTES", 256)
    monkeypatch.setattr(tensor_files, "SYNC_BYTES", at_once)
    found = write_tensors(tmp_path / "file", tensors)
    assert found == file_record(tmp_path / "file")
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert len(waited) == syncs
    assert waited == sorted(set(waited)), "a growing file says that its disk gets on"
