"""The worker pool and the small checkpoints of tests/parallel, for the tests that need a GPU."""

from tests.parallel.conftest import checkpoint, pool

__all__ = ["checkpoint", "pool"]
