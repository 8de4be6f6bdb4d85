"""One node's part of a Ray cluster inside a Slurm job, started there by train.sbatch: `address` prints the node's private
address, `head` and `worker` become a Ray node on it that lives until its step ends. It trains nothing.

Environment: SEMION_INTERFACE names the private interface, else the address is the one that the node's name stands for;
RAY_ADDRESS is where the head answers; RAY_AUTH_TOKEN is the job's secret.
"""

from __future__ import annotations

import os
import socket
import sys

import psutil

from engine.cluster import RAY_ENVIRONMENT


def own_address() -> str:
    """This node's IPv4 address on the private network."""
    interface = os.environ.get("SEMION_INTERFACE")
    if interface is None:
        name = os.environ["SLURMD_NODENAME"]
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    found = [own.address for own in psutil.net_if_addrs().get(interface, []) if own.family == socket.AF_INET]
    if not found:
        sys.exit(f"node.py: SEMION_INTERFACE must be an interface with an IPv4 address; found {interface!r}: see `ip address`")
    return str(found[0])


def command(role: str) -> list[str]:
    """What starts Ray here; its processes end with this one."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={own_address()}"]
    # Semion asks Ray for no processor and keeps nothing large in its store; Ray would start a process for each core.
    start += ["--num-cpus=1", f"--object-store-memory={256 << 20}", "--disable-usage-stats", "--include-log-monitor=true"]
    start += [f"--temp-dir=/tmp/ray-{os.getuid()}-{os.environ['SLURM_JOB_ID']}"]  # /tmp/ray may be another user's
    if role == "worker":
        return [*start, f"--address={os.environ['RAY_ADDRESS']}"]
    return [*start, "--head", "--include-dashboard=false", f"--port={os.environ['RAY_ADDRESS'].rpartition(':')[2]}"]


def main(role: str) -> None:
    if role == "address":
        print(own_address())
        return
    if not os.environ.get("RAY_AUTH_TOKEN"):
        sys.exit("node.py: RAY_AUTH_TOKEN must hold the job's secret, and is unset: start the job with train.sbatch")
    os.environ.update(RAY_ENVIRONMENT)
    arguments = command(role)
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    main(sys.argv[1])
