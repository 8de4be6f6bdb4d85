"""Takes secrets out of what is written down of errors: values of environment variables that are named like secrets, and what
stands before the @ of an address. It knows no program's own format of keys.
"""

from __future__ import annotations

import os
import re

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
LEAST_LENGTH = 6  # a shorter value would take ordinary words out
ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def redacted(text: str) -> str:
    """The text with *** for every secret."""
    secrets = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= LEAST_LENGTH}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    return ADDRESS.sub("***", text)
