"""Where the public data of the tests lie: `shared/data` beside the checkout, as CI clones it too. It reads nothing. A test
that needs them asks for `needs_shared_data`, and is skipped by that reason where they are missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def needs_shared_data(*names: str) -> pytest.MarkDecorator:
    """Skips a test where one of these files is missing, or the folder where none is named."""
    missing = [name for name in names if not (SHARED_DATA / name).is_file()] if names else []
    there = SHARED_DATA.is_dir() and not missing
    return pytest.mark.skipif(
        not there, reason=f"public data are not beside the repository: {', '.join(missing) or SHARED_DATA.name}"
    )
