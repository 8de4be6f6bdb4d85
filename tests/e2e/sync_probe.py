"""A script, not a test: trains real ranks for a few steps, publishes after each into live engines, and prints how far the
engines' log-probs of a fixed batch are from the trainer's. `python sync_probe.py CONFIG SYNCS [KILL [WHAT]]`: before sync
number KILL, engine 0 is killed, or a worker of it where WHAT is "worker"."""

from __future__ import annotations

import json
import os
import sys

import torch

from engine.config.load import load_config
from engine.run.processes import Cluster
from engine.run.spec import resolve

PROBE = "tests.e2e.sync_probe_rank:Probe"


def main() -> None:
    config, num_syncs = load_config(sys.argv[1]), int(sys.argv[2])
    kill, what = [*sys.argv[3:], *("0", "engine")[len(sys.argv) - 3 :]]
    if config.trainer.layers == "transformer_engine" and not torch.cuda.is_available():
        os.environ["SEMION_TE_ON_CPU"] = "1"
    with Cluster(resolve(config)) as cluster:
        engines = cluster.start_engines()
        events = cluster.run_ranks("probe", lambda rank: (engines if rank == 0 else None, num_syncs, int(kill), what), PROBE)
        print("RESULT " + json.dumps([event for event in events if "version" in event]))  # and not what they warn of


if __name__ == "__main__":
    main()
