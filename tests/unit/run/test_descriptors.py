"""The limit of open files, in processes of their own, for a hard limit that has been lowered stays."""

import subprocess
import sys

import pytest

CODE = """
import resource
import sys
from engine.core.errors import ConfigError
from engine.run.descriptors import require_room
soft, hard, ranks, engines = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    require_room(ranks, engines)
except ConfigError as error:
    print(error)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "ranks", "engines", "said"),
    [
        (128, 512, 80, 4, ""),  # 512 needed
        (128, 512, 81, 4, "must be allowed 515 open files for 81 trainer ranks and 4 ranks of engines"),
        (512, 512, 335, 0, "found a limit of 512: raise the hard limit where Ray's node is started (ulimit -n 1261"),
    ],
)
def test_the_soft_limit_is_raised_and_a_hard_one_that_is_too_low_is_refused(soft, hard, ranks, engines, said):
    command = [sys.executable, "-c", CODE, *map(str, (soft, hard, ranks, engines))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.endswith(f"({hard}, {hard})\n"), "all that the system allows"
    assert said in out and bool(said) == (out.count("\n") == 2)
