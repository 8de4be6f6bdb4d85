"""How many files and connections a process of a run may have open: as many as the system allows, and enough of them for rank 0,
which all other trainer ranks are connected to. It opens none.
"""

from __future__ import annotations

import resource
from contextlib import suppress

from engine.core.errors import ConfigError

PER_RANK = 3  # connections of each trainer rank to rank 0: the rendezvous, the ranks' words, and the weight sync's
PER_ENGINE = 4  # of an engine: its rank in the weight sync, and requests
SLACK = 256  # libraries, logs, data, Ray, and one open file of a checkpoint


def raise_limit() -> int | None:
    """Raises this process's soft limit of open files to the hard one; the limit it has then, None where there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # some systems refuse what they call the hard limit: what there is may be enough
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return None if soft == resource.RLIM_INFINITY else soft


def require_room(num_ranks: int, num_engines: int) -> None:
    """For rank 0's process, to which so many trainer ranks and ranks of engines connect: ConfigError where it may not have as
    many files open."""
    limit, needed = raise_limit(), PER_RANK * num_ranks + PER_ENGINE * num_engines + SLACK
    if limit is not None and limit < needed:
        raise ConfigError(
            f"rank 0's process must be allowed {needed:,} open files for {num_ranks:,} trainer ranks and {num_engines:,} ranks "
            f"of engines ({PER_RANK} a trainer rank, {PER_ENGINE} a rank of an engine and {SLACK} besides); found a limit of "
            f"{limit:,}: raise the hard limit where Ray's node is started (ulimit -n {needed}), or use fewer ranks"
        )
