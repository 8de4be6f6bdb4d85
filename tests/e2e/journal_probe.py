"""A script, not a test: starts two trainer ranks, one of which warns and dies at once, and prints what the command gets to know
of it. `python journal_probe.py CONFIG`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator

from engine.config.load import load_config
from engine.core.errors import SemionError
from engine.run.processes import Cluster
from engine.run.signals import Event
from engine.run.spec import Spec, resolve


class Probe:
    """In a trainer rank's place, without its libraries: it trains nothing."""

    def __init__(self, spec: Spec, rank: int, host: str) -> None:
        self._rank = rank

    def serve(self) -> int:
        """There is nobody to meet."""
        return 0

    def probe(self, port: int) -> Iterator[Event]:
        yield {"kind": "note", "text": str(self._rank)}
        if self._rank == 1:
            os.write(2, b"its last words\n")
            logging.getLogger("engine.probe").warning("rank %d is about to go", self._rank)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)


def main() -> None:
    events: list[Event] = []
    error = None
    with Cluster(resolve(load_config(sys.argv[1]), digests=False)) as cluster:
        try:
            events.extend(cluster.run_ranks("probe", lambda rank: (), Probe))
        except SemionError as lost:
            error = str(lost)
    print("RESULT " + json.dumps({"events": events, "error": error}))


if __name__ == "__main__":
    main()
