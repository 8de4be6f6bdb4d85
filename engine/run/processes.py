"""Starts the processes of a run with Ray where placement.py puts them, and watches them: trainer ranks and inference engines,
each in its own process. The only room that imports ray. It computes nothing and knows no algorithm.

Ray's own control channel pickles what crosses it. On one node it listens on the loopback interface only, and a token made anew
for each run must come with every call. With cluster.nodes > 1 the run joins a Ray cluster that is there and demands a token.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from engine.config.options import SYNC_ATTEMPTS
from engine.config.placement import GpuAssignment, Placement, place
from engine.core.errors import (
    MISTAKES,
    ConfigError,
    EngineLostError,
    EngineStartError,
    MissingNodeError,
    PreemptedError,
    ProcessLostError,
    SemionError,
    StorageError,
    UnexpectedError,
    WatchdogError,
    telling,
)
from engine.core.files import UNWRITABLE, unwritable
from engine.observe.journal import LOGS, WARNINGS, Journal, Warnings, sentence, traced
from engine.observe.profiling import nsight
from engine.run.machine import await_head, descendants, devices, end, look
from engine.run.signals import Event, sign_of_life
from engine.run.spec import Spec

# What the processes run, imported there.
RANK = "engine.run.rank:TrainerRank"
ENGINE = "engine.inference.vllm_engine:VllmEngine"
REWARD_ENGINE = "engine.inference.reward_engine:RewardEngine"

HOST = "127.0.0.1"
HEAD = "node:__internal_head__"  # the resource by which Ray marks a cluster's first node
WARNINGS_SECONDS = 2.0  # how long a warning may wait to be shown
SETTLE_SECONDS = 2.0  # after a first error, how long to wait for one that says more
RAY_ENVIRONMENT = {  # of every process of Ray
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # which GPUs a process sees is ours to say
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray would run trainer and engines at a lower priority than everything else
    "RAY_prestart_worker_first_driver": "0",  # and start processes that no run uses
    "RAY_DEDUP_LOGS": "0",
}
_ENVIRONMENT = {  # of every rank and engine
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
_LOOPBACK = {
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


Needs = Literal["spec", "config"]


class RayFuture:
    """A method of an engine under way in its process."""

    def __init__(self, reference: Any, name: str, log: Path | None = None) -> None:
        self._reference, self._name, self._log = reference, name, log

    def result(self, timeout_seconds: float) -> Any:
        """The value, or the error that the engine raised; TimeoutError when late, EngineLostError when it died."""
        import ray

        try:
            return ray.get(self._reference, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(self._name) from error
        except ray.exceptions.RayTaskError as error:
            raise _plain(error, self._name, self._log) from error
        except ray.exceptions.RayActorError as error:
            kind = EngineStartError if error.actor_init_failed else EngineLostError
            raise kind(f"the process of {self._name} ended: {_last_line(error)}{_see(self._log)}") from error


class Hosted:
    """What a process of ours runs: an object of a class that is imported there and nowhere else, so that the command needs
    no vLLM and no megatron-core. `kind` is "module:Class"; a test's own class may come as it is. What the process logs, and
    every error that leaves it, goes to `journal`. `text` is the run's Spec as JSON; the object is made of the Spec, or of its
    configuration where that is all it `needs`, and of `arguments`."""

    def __init__(self, journal: Journal, kind: str | type, needs: Needs, text: str, *arguments: Any) -> None:
        journal.open()
        with traced(str(kind)):
            if isinstance(kind, str):
                module, _, name = kind.partition(":")
                kind = getattr(import_module(module), name)
            assert isinstance(kind, type)
            spec = Spec.from_json(text)
            self._object = kind(spec if needs == "spec" else spec.config, *arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """The value of one of its methods."""
        with traced(method):
            return getattr(self._object, method)(*arguments)

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """What one of its methods yields."""
        with traced(method):
            yield from getattr(self._object, method)(*arguments)


def hosting(kind: str | type) -> type:
    """`Hosted` under the name of what it hosts, which is how the process is then listed."""
    return type(kind.rpartition(":")[2] if isinstance(kind, str) else kind.__name__, (Hosted,), {})


class RayEngine:
    """An engine, of the policy or of the reward model, in a Ray actor; errors call it as its journal does, and name its log."""

    def __init__(self, journal: Journal, start: Callable[[], Any]) -> None:
        self._name, self._log, self._start = journal.process, journal.log, start
        self._actor = start()

    def restart(self) -> None:
        """Ends the actor, wherever it may hang, and starts another."""
        self.stop()
        self._actor = self._start()

    def stop(self) -> None:
        """Ends the actor."""
        import ray

        ray.kill(self._actor)

    def call(self, method: str, *arguments: Any) -> RayFuture:
        """Starts a method; calls of one caller run in order."""
        called = self._actor.call.options(name=f"{self._name}: {method}").remote(method, *arguments)
        return RayFuture(called, self._name, self._log)


class Cluster:
    """The processes of one run, on this machine or on cluster.nodes of them; leaving the context ends them all."""

    def __init__(self, spec: Spec, *, verbose: bool = False) -> None:
        """`spec.parts` is what is going to be started. ConfigError when it does not fit several nodes."""
        self._spec = spec
        self._config = spec.config
        self._verbose = verbose
        self._nodes: list[Node] = []
        # On one machine without GPUs there is nothing to place.
        self._placement: Placement | None = place(self._config, spec.parts) if self._config.cluster.nodes > 1 else None
        self._ranks: list[Any] = []
        self._engines: list[RayEngine] = []
        self._others = descendants()  # what this process had started before
        # A run's logs stay with its records. What a command only starts engines for may name a run's directory, but is no run.
        self._run_logs = (self._config.run_directory / LOGS).resolve() if "trainer" in spec.parts else None
        self._logs: Path | None = None
        self._warnings: Warnings | None = None

    def __enter__(self) -> Cluster:
        self._logs = self._run_logs or Path(mkdtemp(prefix="semion-logs-"))
        self._warnings = Warnings(self._logs, self._run_logs.parent / WARNINGS if self._run_logs is not None else None)
        try:
            (self._start_ray if self._config.cluster.nodes == 1 else self._join_ray)()
            if self._placement is not None:
                self._check_devices(self._placement)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _init_ray(self, **options: Any) -> None:
        """ray.init, which takes SIGTERM for itself: whoever had it gets it back, before anything is waited for. PreemptedError
        where it came meanwhile."""
        import ray

        handler = signal.getsignal(signal.SIGTERM)
        # All that Ray starts inherits this: Slurm sends a warning to every process of a step, which would end Ray.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            ray.init(logging_level="error", log_to_driver=self._verbose, **options)
        except SystemExit as asked:  # what Ray makes of the signal
            if handler is signal.SIG_DFL:
                raise
            raise PreemptedError("asked to stop while Ray started: --resume auto goes on from the newest checkpoint") from asked
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            if handler is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def _start_ray(self) -> None:
        """A Ray of the run's own, on this machine."""
        os.environ.update(RAY_ENVIRONMENT | _ENVIRONMENT | _LOOPBACK | nsight.ray_environment(self._config.profile))
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        try:
            self._init_ray(address="local", num_cpus=1, include_dashboard=False, object_store_memory=256 << 20)
        except SemionError:
            raise
        except Exception as error:  # Ray has no type for it
            raise WatchdogError(
                f"Ray did not start on this machine: {_last_line(error)} Its logs are in /tmp/ray/session_latest/logs"
            ) from error
        (found,) = ray.nodes()
        self._nodes = [Node(found["NodeID"], HOST, "lo", devices(found["Resources"].get("GPU", 0)))]
        if self._nodes[0].devices:
            self._placement = place(self._config, self._spec.parts, len(self._nodes[0].devices))

    def _join_ray(self) -> None:
        """The Ray cluster that RAY_ADDRESS names, or whose node this machine is, with all nodes that the run needs."""
        found = os.environ.get("RAY_AUTH_MODE"), bool(os.environ.get("RAY_AUTH_TOKEN"))
        if found != ("token", True):
            raise ConfigError(
                f"cluster.nodes > 1 needs a Ray cluster that demands a token, for Ray runs whatever it is sent; found "
                f"RAY_AUTH_MODE = {found[0]!r} and RAY_AUTH_TOKEN {'set' if found[1] else 'unset'}: start the run with "
                f"tools/slurm/train.sbatch, or set RAY_AUTH_MODE=token and one secret RAY_AUTH_TOKEN on every node"
            )
        os.environ.update(RAY_ENVIRONMENT)
        import ray

        address = os.environ.get("RAY_ADDRESS", "auto")
        await_head(address)
        try:
            self._init_ray(address=address)
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"cluster.nodes = {self._config.cluster.nodes} needs a Ray cluster that is already there and takes this token; "
                f"found none at {address!r}: start the run with tools/slurm/train.sbatch, or set RAY_ADDRESS"
            ) from error
        self._nodes = [self._look_at(node) for node in self._await_nodes()]

    def _await_nodes(self) -> list[dict[str, Any]]:
        """The cluster's first nodes, as many as the run needs: its head, then by address. MissingNodeError if not."""
        import ray

        wanted, patience = self._config.cluster.nodes, self._config.trainer.timeout_seconds
        deadline = time.monotonic() + patience
        while len(alive := [node for node in ray.nodes() if node["Alive"]]) < wanted:
            if time.monotonic() > deadline:
                left = " ".join(sorted({node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]}))
                raise MissingNodeError(
                    f"cluster.nodes = {wanted} nodes must join the Ray cluster; {len(alive)} came within "
                    f"trainer.timeout_seconds = {patience:.0f}, gone are: {left or 'none'}: look at what the others logged"
                )
            time.sleep(0.5)

        def order(node: dict[str, Any]) -> tuple[bool, int, str]:
            return HEAD not in node["Resources"], int(ipaddress.ip_address(node["NodeManagerAddress"])), node["NodeID"]

        return sorted(alive, key=order)[:wanted]

    def _look_at(self, node: dict[str, Any]) -> Node:
        """What only a process on that node can see."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        address, there = node["NodeManagerAddress"], NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        seen = ray.remote(num_cpus=0, scheduling_strategy=there)(look).remote(address, node["Resources"].get("GPU", 0))
        try:
            return Node(node["NodeID"], address, *ray.get(seen, timeout=self._config.trainer.timeout_seconds))
        except ray.exceptions.RayError as error:
            raise _plain(error, f"node {address}") from error

    def _check_devices(self, placement: Placement) -> None:
        """ConfigError when a node lacks a GPU that something is placed on; on nodes without any the run is on the CPU."""
        on_gpu = any(node.devices for node in self._nodes)
        for seat in placement.seats if on_gpu else ():
            node = self._nodes[seat.node]
            if max(seat.gpus) >= (found := len(node.devices)):
                raise ConfigError(
                    f"cluster.gpus_per_node must not exceed the GPUs of a node; found {self._config.cluster.gpus_per_node}, "
                    f"and {found} on {node.address}: {f'set it to {found}' if found else 'start Ray on nodes with GPUs only'}"
                )

    def _starter(
        self,
        seat: GpuAssignment | None,
        journal: Journal,
        kind: str | type,
        needs: Needs,
        *arguments: Any,
        profiled: dict[str, Any] | None = None,
    ) -> Callable[[], Any]:
        """Starts a process with an object of this class in its seat, each time it is called. `profiled`: what Ray must know to
        profile it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        arguments = (kind, needs, self._spec.to_json(), *arguments)
        if seat is None:
            return partial(ray.remote(num_cpus=0, runtime_env=profiled or {})(hosting(kind)).remote, journal, *arguments)
        node = self._nodes[seat.node]
        environment = _ENVIRONMENT | {"GLOO_SOCKET_IFNAME": node.interface, "NCCL_SOCKET_IFNAME": node.interface}
        if node.devices:
            environment["CUDA_VISIBLE_DEVICES"] = seat.visible(node.devices)
        actor = ray.remote(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_id, soft=False),
            runtime_env={"env_vars": environment} | (profiled or {}),
        )(hosting(kind))
        return partial(actor.remote, journal, *arguments)

    def _journal(self, process: str) -> Journal:
        assert self._logs is not None
        return Journal(self._logs, process, self._verbose)

    def __exit__(self, *raised: object) -> None:
        import ray

        started = descendants()  # asked before too: whoever loses its parent is no descendant any more
        for actor in self._ranks:
            ray.kill(actor)
        for engine in self._engines:
            engine.stop()
        nsight.await_reports(self._config.profile)
        started = (started | descendants()) - self._others
        ray.shutdown()
        end(started)
        for warning in self._warnings.close() if self._warnings is not None else ():
            sys.stderr.write(f"semion: {sentence(warning)}\n")
        if self._logs is not None and self._run_logs is None and not any(raised):
            shutil.rmtree(self._logs)  # else the error names a file in it

    def start_engines(self) -> list[RayEngine]:
        """Starts the inference engines; they load while the caller goes on."""
        placed = self._placement
        seats: Sequence[GpuAssignment | None] = placed.engines if placed else [None] * self._config.inference.engines
        engines = []
        for i, seat in enumerate(seats):
            journal = self._journal(f"engine {i}")
            start = self._starter(seat, journal, ENGINE, "config", i, profiled=self._profiled("engine", i))
            engines.append(RayEngine(journal, start))
        self._engines += engines
        return engines

    def start_reward_engine(self) -> RayEngine | None:
        """Starts the engine of the reward model, where the run has one; it loads while the caller goes on."""
        if not self._spec.starts_reward_engine:
            return None
        seat = self._placement.reward_engine if self._placement else None
        journal = self._journal("the reward engine")
        self._engines.append(RayEngine(journal, self._starter(seat, journal, REWARD_ENGINE, "config")))
        return self._engines[-1]

    def train(self, *, resume: bool) -> Iterator[Event]:
        """Runs the training loop on every trainer rank; yields rank 0's events as they come.

        Raises the error of whichever process failed, a typed one before any other.
        """
        engines = self.start_engines() if self._spec.starts_engines else []
        reward_engine = self.start_reward_engine()
        return self.run_ranks("train", lambda rank: (*((engines, reward_engine) if rank == 0 else (None, None)), resume))

    def fine_tune(self) -> Iterator[Event]:
        """Runs the supervised loop on every trainer rank."""
        return self.run_ranks("fine_tune", lambda rank: ())

    def run_ranks(
        self, method: str, arguments_of: Callable[[int], tuple[Any, ...]], kind: str | type = RANK
    ) -> Iterator[Event]:
        """Runs a method of every trainer rank with (rendezvous port, *arguments_of(rank)); yields their events, and what any
        process warned of, as {"kind": "warning", "where", "text", "count"}."""
        import ray

        assert self._warnings is not None

        placed = self._placement
        seats: Sequence[GpuAssignment | None] = placed.ranks if placed else [None] * self._config.trainer.world_size
        host = self._nodes[0].address  # where rank 0 is
        journals = [self._journal(f"trainer rank {rank}") for rank in range(len(seats))]
        ranks = [
            self._starter(seat, journal, kind, "spec", rank, host, profiled=self._profiled("rank", rank))()
            for rank, (seat, journal) in enumerate(zip(seats, journals, strict=True))
        ]
        self._ranks += ranks
        try:
            port = ray.get(ranks[0].call.remote("serve"), timeout=self._config.trainer.timeout_seconds)
        except ray.exceptions.RayError as error:
            raise _plain(error, journals[0].process, journals[0].log) from error
        streams = [
            actor.stream.options(num_returns="streaming", name=f"trainer rank {rank}: {method}").remote(
                method, port, *arguments_of(rank)
            )
            for rank, actor in enumerate(ranks)
        ]
        names = dict(zip(streams, journals, strict=True))
        patience = self._patience_seconds()
        heard = time.monotonic()
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, timeout=min(patience, WARNINGS_SECONDS))
            yield from self._warnings.fresh()
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > patience and not self._alive(patience):
                raise WatchdogError(f"no trainer rank gave a sign of life for {patience:.0f} s: look for a stopped process")
            for stream in ready:
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
                except ray.exceptions.RayError as error:
                    streams.remove(stream)
                    worst = self._worst(_plain(error, names[stream].process, names[stream].log), streams, names)
                    yield from self._warnings.fresh()
                    raise worst from error

    def _profiled(self, kind: Literal["rank", "engine"], index: int) -> dict[str, Any]:
        return nsight.runtime_env(self._config.profile, self._config.run_directory, kind, index)

    def _patience_seconds(self) -> float:
        """Longer than any step with its sync and checkpoint may wait for all it waits for."""
        c = self._config
        syncing = SYNC_ATTEMPTS * (c.sync.timeout_seconds + c.inference.timeout_seconds)  # each may replace an engine
        return 2 * (c.trainer.timeout_seconds + c.inference.timeout_seconds + c.reward_model.patience_seconds) + syncing

    def _alive(self, patience: float) -> bool:
        """Whether rank 0 has waited for a part of a long evaluation, or of an interval's rollouts, within that time."""
        file = sign_of_life(self._config)
        return file.exists() and time.time() - file.stat().st_mtime < patience

    def _worst(self, first: SemionError, streams: list[Any], names: dict[Any, Journal]) -> SemionError:
        """Of the errors that end a run within a moment, the one that says most: what broke first is often an echo."""
        import ray

        deadline = time.monotonic() + SETTLE_SECONDS
        while telling(first) < 3 and streams and time.monotonic() < deadline:
            ready, _ = ray.wait(streams, num_returns=1, timeout=SETTLE_SECONDS)
            for stream in ready:
                try:
                    ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
                except ray.exceptions.RayError as error:
                    streams.remove(stream)
                    first = max(first, _plain(error, names[stream].process, names[stream].log), key=telling)
        return first


def _plain(error: Any, name: str, log: Path | None = None) -> SemionError:
    """A Ray error as what happened in the process `name`: our typed error itself, or a WatchdogError that tells it and says
    where to look: in its `log`, or where it has none with --verbose."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, SemionError):
            return error.cause
        why = " ".join(str(error.cause).split()) or "no message"
        if (code := unwritable(error.cause)) is not None:
            return StorageError(f"{name} could not write: {UNWRITABLE[code][0]}: {why}; {log or '--verbose'} shows where")
        kind = UnexpectedError if isinstance(error.cause, MISTAKES) else WatchdogError
        return kind(f"{name} failed with {type(error.cause).__name__}: {why}; {log or '--verbose'} shows where")
    if isinstance(error, ray.exceptions.GetTimeoutError):
        shows = log or "what --verbose shows"
        return WatchdogError(f"{name} did not start within trainer.timeout_seconds: raise it, or look at {shows}")
    return ProcessLostError(f"the process of {name} ended: {_last_line(error)}{_see(log)}")


def _see(log: Path | None) -> str:
    return f"; its log is {log}" if log is not None else ""


def _last_line(error: Exception) -> str:
    """What Ray knows of a death: of an error in a constructor its message, else the signal or exit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("engine.core.errors.InferenceError: ") if lines else type(error).__name__
