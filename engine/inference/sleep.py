"""What an engine that sleeps on a CPU does with its memory: pages given back to the machine."""

from __future__ import annotations

import ctypes
import mmap

import torch


def release_pages(tensor: torch.Tensor) -> None:
    """Gives back the whole pages of a CPU tensor's storage; what shares a page with others is kept."""
    storage, page, dont_need = tensor.untyped_storage(), mmap.PAGESIZE, mmap.MADV_DONTNEED
    start = -(-storage.data_ptr() // page) * page
    size = (storage.data_ptr() + storage.nbytes()) // page * page - start
    if size > 0:
        failed = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), dont_need)
        assert not failed, (start, size)
