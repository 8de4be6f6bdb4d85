"""A script, not a test: starts the trainer ranks of a configuration, which do nothing but say who they are, and ends them.
`python nsys_probe.py CONFIG`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

from engine.config.load import load_config
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
        yield {"rank": self._rank, "pid": os.getpid()}


def main() -> None:
    with Cluster(resolve(load_config(sys.argv[1]))) as cluster:
        print("RESULT " + json.dumps(list(cluster.run_ranks("probe", lambda rank: (), Probe))))


if __name__ == "__main__":
    main()
