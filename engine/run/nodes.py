"""The machines of a run and the Ray on them: one of the run's own on this machine, or the cluster that RAY_ADDRESS names. It
places nothing and starts no process of ours.

Ray's own control channel pickles what crosses it. On one node it listens on the loopback interface only, and a token made
anew for each cluster must come with every call. With cluster.nodes > 1 the run joins a Ray cluster that demands a token.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from engine.config.load import RunConfig
from engine.config.placement import Placement
from engine.core.errors import ConfigError, MissingNodeError, PreemptedError, SemionError, WatchdogError
from engine.inference.process import ENGINES_FOLDER
from engine.observe.profiling import nsight
from engine.run.handles import last_line, typed_error
from engine.run.host_memory import check_holds, held_by_node
from engine.run.machine import await_head, devices, host_bytes, look
from engine.run.shrinking import Room, shrunk
from engine.run.spec import Spec

HOST = "127.0.0.1"
SILENT_SECONDS = 30.0  # a node that works starts a process in a few, and on a busy machine in less than these
HEAD = "node:__internal_head__"  # the resource by which Ray marks a cluster's first node
RAY_ENVIRONMENT = {  # of every process of Ray
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # which GPUs a process sees is ours to say
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray would run trainer and engines at a lower priority than everything else
    "RAY_prestart_worker_first_driver": "0",  # and start processes that no run uses
    "RAY_DEDUP_LOGS": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of a process that was ended: who waited for it has the error, typed
}
SET_BY_RAY = ("RAY_CLIENT_MODE", "PYTHONBREAKPOINT")  # in the process that calls ray.init
# Of glibc's malloc: freed memory stays with the process, whose next tensor of that size then meets no page faults, and comes
# in huge pages. (A tensor beyond 32 MiB, the most that glibc allows, is the kernel's as before.)
KEPT_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"
PROCESS_ENVIRONMENT = {  # of every rank and engine
    "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", KEPT_PAGES),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for "this machine only": it binds to the loopback interface
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the run, as its processes are told of it."""

    ray_id: str
    address: str  # private: where its ranks and engines meet the others'
    interface: str  # that carries the address
    devices: tuple[str, ...]  # its GPUs by CUDA's names; none on a machine without
    host_bytes: int  # its memory, or what a container or a job may have of it


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """While entered, these variables are set in this process, from which Ray takes them for all that it starts; then these,
    and what Ray sets of its own, are again what they were."""
    before = {name: os.environ.get(name) for name in (*variables, *SET_BY_RAY)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def variables_of(config: RunConfig) -> dict[str, str]:
    """The environment in which `open_ray` is called and the run lives. ConfigError where several nodes have no token."""
    if config.cluster.nodes > 1:
        _check_token()
        return dict(RAY_ENVIRONMENT)
    own = {"RAY_AUTH_TOKEN": secrets.token_hex(32), ENGINES_FOLDER: str(engines_folder())}
    return RAY_ENVIRONMENT | PROCESS_ENVIRONMENT | LOOPBACK | nsight.ray_environment(config.profile) | own


def _check_token() -> None:
    found = os.environ.get("RAY_AUTH_MODE"), bool(os.environ.get("RAY_AUTH_TOKEN"))
    if found != ("token", True):
        raise ConfigError(
            f"cluster.nodes > 1 needs a Ray cluster that demands a token, for Ray runs whatever it is sent; found "
            f"RAY_AUTH_MODE = {found[0]!r} and RAY_AUTH_TOKEN {'set' if found[1] else 'unset'}: start the run with "
            f"tools/slurm/train.sbatch, or set RAY_AUTH_MODE=token and one secret RAY_AUTH_TOKEN on every node"
        )


def open_ray(config: RunConfig, *, verbose: bool) -> list[Node]:
    """The nodes of a run, in the order in which placement counts them: this machine, with a Ray of the run's own, or the first
    of the cluster that is there. The environment must have `variables_of(config)`. `verbose`: what processes print is shown.

    WatchdogError where Ray does not start, ConfigError where there is none to join, MissingNodeError where nodes are missing.
    """
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()  # this process may have spoken to another Ray before
    return _start_ray(verbose) if config.cluster.nodes == 1 else _join_ray(config, verbose)


def _start_ray(verbose: bool) -> list[Node]:
    """A Ray of the run's own, on this machine."""
    import ray

    try:
        _init_ray(verbose, address="local", num_cpus=1, include_dashboard=False, object_store_memory=256 << 20)
    except SemionError:
        raise
    except Exception as error:  # Ray has no type for it
        raise WatchdogError(
            f"Ray did not start on this machine: {last_line(error)} Its logs are in /tmp/ray/session_latest/logs"
        ) from error
    (found,) = ray.nodes()
    return [Node(found["NodeID"], HOST, "lo", devices(found["Resources"].get("GPU", 0)), host_bytes())]


def ray_folder() -> Path:
    """Where a Ray of one's own writes, as it chooses it."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def engines_folder() -> Path:
    """Where the engines of a command on one machine have their temporary files; vLLM leaves some of an engine that is ended."""
    return Path(gettempdir()) / f"semion-{os.getpid()}"


def remove_leftovers(since_unix: float) -> None:
    """Removes the temporary folders that engines had, and that a Ray of this process's own made since then, once its processes
    are gone: Ray never does. `session_latest` is a link that the newest Ray of a machine makes; it goes where it leads
    nowhere."""
    shutil.rmtree(engines_folder(), ignore_errors=True)
    folder = ray_folder()
    for session in folder.glob(f"session_*_{os.getpid()}"):
        if session.stat().st_mtime >= since_unix - 1.0:
            shutil.rmtree(session, ignore_errors=True)
    latest = folder / "session_latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)


def _join_ray(config: RunConfig, verbose: bool) -> list[Node]:
    """The Ray cluster that RAY_ADDRESS names, or whose node this machine is, with all nodes that the run needs."""
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    await_head(address)
    try:
        _init_ray(verbose, address=address)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"cluster.nodes = {config.cluster.nodes} needs a Ray cluster that is already there and takes this token; "
            f"found none at {address!r}: start the run with tools/slurm/train.sbatch, or set RAY_ADDRESS"
        ) from error
    return await_nodes(config)


def _init_ray(verbose: bool, **options: Any) -> None:
    """ray.init, which takes SIGTERM for itself: whoever had it gets it back, before anything is waited for. PreemptedError
    where it came meanwhile."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    # All that Ray starts inherits this: Slurm sends a warning to every process of a step, which would end Ray.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        ray.init(logging_level="error", log_to_driver=verbose, **options)
    except SystemExit as asked:  # what Ray makes of the signal
        if handler is signal.SIG_DFL:
            raise
        raise PreemptedError("asked to stop while Ray started: --resume auto goes on from the newest checkpoint") from asked
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        if handler is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def await_nodes(config: RunConfig) -> list[Node]:
    """The cluster's first nodes that answer, as many as the run needs: its head, then by address. A node beyond them is a
    spare, asked where one of them is gone or silent: Ray counts a node as alive as long as its own daemon answers, and a
    quarter of a minute longer, though no process may start there any more. Who is silent for SILENT_SECONDS (or half of
    trainer.timeout_seconds, where that is less) is left out and named, unless it answers before enough others have.

    MissingNodeError where too few answer within trainer.timeout_seconds, or with run.on_lost_node = "shrink", where the run can
    go on without them, as soon as all others are gone; where some are silent, after half of that time, for a file system that
    is cold or busy can keep many a node silent for a while. The head, where the command runs, is waited for in any case.
    """
    import ray

    wanted, patience = config.cluster.nodes, config.trainer.timeout_seconds
    silent_after, begun = min(SILENT_SECONDS, patience / 2), time.monotonic()
    asked: dict[str, _Asked] = {}  # by Ray's name of the node
    can_shrink = cache(partial(_can_shrink, config))  # nothing that it looks at changes meanwhile
    while True:
        late = time.monotonic() - begun >= patience
        known = ray.nodes()
        gone = sorted({node["NodeManagerAddress"] for node in known if not node["Alive"]})
        found, silent, num_waited_for = _called([node for node in known if node["Alive"]], asked, wanted, silent_after)
        if len(found) == wanted:
            if silent:
                who = " ".join(silent)
                sys.stderr.write(f"semion: left out, for no process started there within {silent_after:.0f} s: {who}\n")
            return found
        lost = set(gone) - {node["NodeManagerAddress"] for node in known if node["Alive"]}
        all_known = not num_waited_for and len(found) + len(silent) + len(lost) >= wanted
        is_time = not silent or time.monotonic() - begun >= patience / 2
        if late or (config.run.on_lost_node == "shrink" and all_known and is_time and can_shrink(len(found))):
            break
        time.sleep(0.5)
    within = f"within trainer.timeout_seconds = {patience:.0f}" if late else "at once"
    missing = MissingNodeError(
        f"cluster.nodes = {wanted} nodes must join the Ray cluster; {len(found)} answered {within}, gone are: "
        f"{' '.join(gone) or 'none'}; there, but silent for {silent_after:.0f} s: {' '.join(silent) or 'none'}: look at what "
        f"the others logged"
    )
    missing.nodes_left = len(found)
    raise missing


def _called(
    alive: Sequence[Mapping[str, Any]], asked: dict[str, _Asked], wanted: int, silent_after: float
) -> tuple[list[Node], list[str], int]:
    """(The first nodes that have answered, the addresses of those before them that are silent, how many of the first may still
    answer in time.) Asks as many as may yet become `wanted`."""
    found, silent, num_waited_for = list[Node](), list[str](), 0
    for node in sorted(alive, key=_order):
        if len(found) + num_waited_for == wanted:
            break
        one = asked.setdefault(node["NodeID"], _Asked(node))
        if (answer := one.answer()) is not None:
            found.append(answer)
        elif one.silent_seconds > silent_after and HEAD not in node["Resources"]:
            silent.append(one.address)
        else:
            num_waited_for += 1
    return found, silent, num_waited_for


class _Asked:
    """A node that was asked, and since when it owes an answer."""

    def __init__(self, node: Mapping[str, Any]) -> None:
        self.address: str = node["NodeManagerAddress"]
        self._node, self._since = node, time.monotonic()
        self._look: Any = None
        self._answer: Node | None = None

    @property
    def silent_seconds(self) -> float:
        """For how long it has been asked, without an answer."""
        return time.monotonic() - self._since

    def answer(self) -> Node | None:
        """What was seen on the node; None before it has answered. One that is lost meanwhile is asked again where Ray counts it
        still, and owes its answer since it was first asked."""
        import ray

        if self._answer is None:
            if self._look is None:
                self._look = look_at(self._node)
            try:
                self._answer = Node(self._node["NodeID"], self.address, *ray.get(self._look, timeout=0.0))
            except ray.exceptions.GetTimeoutError:
                return None
            except ray.exceptions.RayTaskError as error:
                raise typed_error(error, f"node {self.address}") from error
            except ray.exceptions.RayError:
                self._look = None
        return self._answer


def _can_shrink(config: RunConfig, nodes: int) -> bool:
    """Whether there is a checkpoint to go on from, and a layout for so many nodes that fits their memory."""
    from engine.run.checkpoint import latest

    if not nodes or latest(config.run_directory / "checkpoints") is None:
        return False
    return shrunk(config, nodes, Room.here(config)) is not None


def _order(node: Mapping[str, Any]) -> tuple[bool, int, str]:
    """By which nodes of a cluster are counted, whenever they came."""
    return HEAD not in node["Resources"], int(ipaddress.ip_address(node["NodeManagerAddress"])), node["NodeID"]


def look_at(node: Mapping[str, Any]) -> Any:
    """Asks what only a process on that node can see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    asked = ray.remote(num_cpus=0, scheduling_strategy=there)(look)
    return asked.remote(node["NodeManagerAddress"], node["Resources"].get("GPU", 0))


def check_devices(placement: Placement, nodes: Sequence[Node], gpus_per_node: int) -> None:
    """ConfigError when a node lacks a GPU that something is placed on; on nodes without any the run is on the CPU."""
    on_gpu = any(node.devices for node in nodes)
    for assignment in placement.assignments if on_gpu else ():
        node = nodes[assignment.node]
        if max(assignment.gpus) >= (found := len(node.devices)):
            raise ConfigError(
                f"cluster.gpus_per_node must not exceed the GPUs of a node; found {gpus_per_node}, "
                f"and {found} on {node.address}: {f'set it to {found}' if found else 'start Ray on nodes with GPUs only'}"
            )


def check_hosts(spec: Spec, nodes: Sequence[Node]) -> None:
    """ConfigError when a node has less memory than what the processes placed on it keep there. On nodes without
    GPUs the weights are in the same memory and not counted: what is counted must fit all the same."""
    for number, held in held_by_node(spec).items():
        check_holds(spec, held, nodes[number].host_bytes, f"on {nodes[number].address}")
