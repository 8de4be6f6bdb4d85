"""Lets a test start a Ray of the engine's in its own process, which need not import the libraries again, and leaves the
environment as it was. tests/conftest.py has set what Ray reads once in a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from ray._private import ray_constants


@contextmanager
def environment(**more: str) -> Iterator[None]:
    """While entered, os.environ has `more`; afterwards it is what it was. Ray is on the loopback interface only, which it reads
    from the environment when it is imported: the engine sets that before it imports Ray, here another test may have."""
    with patch.dict(os.environ, more), patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield
