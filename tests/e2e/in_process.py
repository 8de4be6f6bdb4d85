"""Lets a test start a Ray of the engine's in its own process, which need not import the libraries again, and leaves the
environment as it was."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from ray._private import ray_constants


@contextmanager
def environment(**more: str) -> Iterator[None]:
    """While entered, os.environ has `more`; afterwards it is what it was. But for one variable: Ray reads its token once in a
    process, so all that are started in this one have the same. What Ray reads when it is imported is as the engine sets it
    before it imports Ray: loopback only."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with patch.dict(os.environ, more), patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield
