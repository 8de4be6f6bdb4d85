"""What an engine's worker does with its memory and its life: pages given back to the machine, and an end with its parent."""

from __future__ import annotations

import ctypes
import mmap

import torch

from engine.core.lifetimes import die_with_parent


def release_pages(tensor: torch.Tensor) -> None:
    """Gives back the whole pages of a CPU tensor's storage; what shares a page with others is kept."""
    storage, page, dont_need = tensor.untyped_storage(), mmap.PAGESIZE, mmap.MADV_DONTNEED
    start = -(-storage.data_ptr() // page) * page
    size = (storage.data_ptr() + storage.nbytes()) // page * page - start
    if size > 0:
        failed = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), dont_need)
        assert not failed, (start, size)


class MortalWorker:
    """What a reward engine adds to its vLLM workers (its worker_extension_cls)."""

    def semion_die_with_parent(self) -> None:
        """Ends with the engine's process, whatever ends that: not even a stopped one keeps its memory from the next engine."""
        die_with_parent()
