"""A hard bound on memory for tests that claim one: the address space may grow by so many bytes and no further."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from pathlib import Path


def fits(work: Callable[[], object], num_bytes: float) -> bool:
    """Whether work() gets by with num_bytes more than the process has; blocks over 32 MB never come from a free list."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmSize:\s+(\d+)", status)
    assert found is not None, status
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(found[1]) + int(num_bytes), hard))
    try:
        work()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return True
