"""One node's part of a Ray cluster inside a Slurm job, run there by train.sbatch: `address` prints the node's private address,
`start` keeps a Ray node on it, the cluster's head where RAY_ADDRESS is that address, until its step ends. Ray's own patience
with its start is 30 seconds, too little for a busy machine, so a start that fails is tried again. It trains nothing.

Environment: SEMION_INTERFACE names the private interface, else the address is the one that the node's name stands for;
RAY_ADDRESS is where the head answers, and 5000 ports further it opens a port when it does; RAY_AUTH_TOKEN is the job's
secret; SEMION_START_SECONDS is how long all attempts may take.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil

from engine.run.nodes import RAY_ENVIRONMENT

STARTED = "Ray runtime started."  # what `ray start` prints when the node is there
READY_PORT_OFFSET = 5000
FLUSH_SECONDS = 2.0  # srun was seen to lose the last line of a task whose end ends the step
LOST = 8  # exit code of a node without Ray, as of the command's watchdog


def own_address() -> str:
    """This node's IPv4 address on the private network."""
    interface = os.environ.get("SEMION_INTERFACE")
    if interface is None:
        return str(socket.getaddrinfo(node(), None, socket.AF_INET)[0][4][0])
    found = [own.address for own in psutil.net_if_addrs().get(interface, []) if own.family == socket.AF_INET]
    if not found:
        sys.exit(f"node.py: SEMION_INTERFACE must be an interface with an IPv4 address; found {interface!r}: see `ip address`")
    return str(found[0])


def node() -> str:
    return os.environ["SLURMD_NODENAME"]


def command(address: str, port: int, is_head: bool) -> list[str]:
    """What starts Ray here; its processes end with this one."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
    # Semion asks Ray for no processor and keeps nothing large in its store; Ray would start a process for each core.
    start += ["--num-cpus=1", f"--object-store-memory={256 << 20}", "--disable-usage-stats", "--include-log-monitor=true"]
    start += [f"--temp-dir=/tmp/ray-{os.getuid()}-{os.environ['SLURM_JOB_ID']}"]  # /tmp/ray may be another user's
    if not is_head:
        return [*start, f"--address={os.environ['RAY_ADDRESS']}"]
    return [*start, "--head", "--include-dashboard=false", f"--port={port}"]


def answers(host: str, port: int) -> bool:
    """Whether anything listens there."""
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError:
        return False
    return True


def attempt(arguments: list[str], ready: socket.socket | None) -> tuple[bool, int]:
    """Runs Ray until it ends, and opens `ready` once it is there; whether it ever was, and its exit code."""
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    started = False
    for line in child.stdout:
        print(line, end="", flush=True)
        if STARTED in line and not started:
            started = True
            if ready is not None:
                ready.listen()
    return started, child.wait()


def start(seconds: float) -> str:
    """Keeps a Ray node here until it ends, or none has started within `seconds`; says what happened."""
    deadline = time.monotonic() + seconds
    address = own_address()
    head, _, text = os.environ["RAY_ADDRESS"].rpartition(":")
    port, is_head, attempts = int(text), head == address, 0
    with socket.socket() as ready:
        ready.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ready.bind((address, port + READY_PORT_OFFSET if is_head else 0))
        while time.monotonic() < deadline:
            if not is_head and not answers(head, port):
                time.sleep(0.5)
                continue
            attempts += 1
            started, code = attempt(command(address, port, is_head), ready if is_head else None)
            if started:
                return f"Ray ended on {node()} ({address}) with code {code}"
            say(f"Ray did not start on {node()} ({address}), attempt {attempts}: it ended with code {code}")
            time.sleep(1.0)
    found = f"none did in {attempts} attempts" if attempts else f"its head at {head}:{port} gave no answer"
    return f"Ray must start on {node()} ({address}) within SEMION_START_SECONDS = {seconds:.0f}; {found}"


def say(text: str) -> None:
    print(f"node.py: {text}", file=sys.stderr, flush=True)


def main(role: str) -> None:
    if role == "address":
        print(own_address())
        return
    if not os.environ.get("RAY_AUTH_TOKEN"):
        sys.exit("node.py: RAY_AUTH_TOKEN must hold the job's secret, and is unset: start the job with train.sbatch")
    # All that Ray starts inherits this: a signal that Slurm sends to every process of a step would end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.environ.update(RAY_ENVIRONMENT)
    say(start(float(os.environ["SEMION_START_SECONDS"])))
    time.sleep(FLUSH_SECONDS)
    sys.exit(LOST)


if __name__ == "__main__":
    main(sys.argv[1])
