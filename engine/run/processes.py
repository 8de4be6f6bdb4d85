"""Starts the processes of a run where it is placed, and ends them: trainer ranks and inference engines, each a Ray actor. What
an actor runs is in hosted.py, what is held of it in handles.py, the machines and their Ray in nodes.py, and who watches the
ranks in watch.py. It computes nothing and knows no algorithm.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from engine.config.options import Source
from engine.config.placement import GpuAssignment, Placement
from engine.core.errors import WatchdogError
from engine.observe.journal import LOGS, WARNINGS, Journal, Warnings, sentence
from engine.observe.profiling import nsight
from engine.observe.telling import Doing, Told
from engine.rewards.registry import Judges, pools
from engine.run.handles import RayEngine, typed_error
from engine.run.hosted import ENGINE, JUDGES, RANK, REWARD_ENGINE, Needs, hosting
from engine.run.machine import descendants, end, families
from engine.run.nodes import (
    PROCESS_ENVIRONMENT,
    Node,
    check_devices,
    check_hosts,
    environment,
    open_ray,
    remove_leftovers,
    variables_of,
)
from engine.run.signals import Event, undisturbed
from engine.run.spec import Spec
from engine.run.watch import TOLD_SECONDS, watch

CALLS_PER_POOL = 4  # of a node's judges at once: one gives and one takes, of this judging and of one that was given up


class Cluster:
    """The processes of one run, on this machine or on cluster.nodes of them; leaving the context ends them all."""

    def __init__(self, spec: Spec, *, verbose: bool = False, folder: Path | None = None) -> None:
        """`spec.parts` is what is going to be started. `folder`: where what is made by a command without training goes; its
        processes log there where there are several nodes, in run.directory where not said. ConfigError when the run does not
        fit several nodes."""
        self._spec = spec
        self._config = spec.config
        self._verbose = verbose
        self._folder = folder
        self._nodes: list[Node] = []
        # On one machine without GPUs there is nothing to place.
        self._placement: Placement | None = spec.placed() if self._config.cluster.nodes > 1 else None
        self._ranks: list[Any] = []
        self._engines: list[RayEngine] = []
        self._others = descendants()  # what this process had started before
        # A run's logs stay with its records. What a command only starts engines for may name a run's directory, but is no run.
        self._run_logs = (self._config.run_directory / LOGS).resolve() if "trainer" in spec.parts else None
        self._logs: Path | None = None
        self._warnings: Warnings | None = None
        self._told: Told | None = None
        self._entered_unix = time.time()
        self._keeps_ray_logs = False
        self._environment = ExitStack()  # this process's, while the run lives

    def __enter__(self) -> Cluster:
        self._environment.enter_context(environment(variables_of(self._config)))
        try:
            self._logs = self._run_logs or self._own_logs()
            self._warnings = Warnings(self._logs, self._run_logs.parent / WARNINGS if self._run_logs is not None else None)
            self._told = Told(self._logs)
            self._nodes = open_ray(self._config, verbose=self._verbose)
            if self._config.cluster.nodes == 1 and self._nodes[0].devices:
                self._placement = self._spec.placed(len(self._nodes[0].devices))
            if self._placement is not None:
                check_devices(self._placement, self._nodes, self._config.cluster.gpus_per_node)
                check_hosts(self._spec, self._nodes)
        except BaseException as error:
            self._keeps_ray_logs = isinstance(error, WatchdogError)  # Ray did not start, and its logs say why
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        ray = sys.modules.get("ray")  # not there where a Ctrl-C came while it was imported, which cannot be done again
        with self._environment, undisturbed():
            started = descendants()  # asked before too: whoever loses its parent is no descendant any more
            spared = families(self._others)  # a sink may have started processes meanwhile, which are not the run's
            if ray is not None:
                for actor in self._ranks:
                    ray.kill(actor)
            for engine in self._engines:
                engine.stop()
            nsight.await_reports(self._config.profile)
            started = (started | descendants()) - self._others - spared - families(self._others)
            if ray is not None:
                ray.shutdown()
            end(started)
            if self._config.cluster.nodes == 1 and not self._keeps_ray_logs:
                remove_leftovers(self._entered_unix)
        if self._told is not None:
            self._told.close()
        for warning in self._warnings.close() if self._warnings is not None else ():
            sys.stderr.write(f"semion: {sentence(warning)}\n")
        if self._logs is not None and self._run_logs is None and not any(raised):
            shutil.rmtree(self._logs)  # else the error names a file in it

    @property
    def logs(self) -> Path:
        """The folder of the logs of all processes. Where no training runs it goes when the context is left without an error."""
        assert self._logs is not None, "entered"
        return self._logs

    def _own_logs(self) -> Path:
        """A new folder for the logs of what is no training: a temporary one, but on several nodes one that all of them have."""
        if self._config.cluster.nodes == 1:
            return Path(mkdtemp(prefix="semion-logs-"))
        shared = self._folder or self._config.run_directory
        shared.mkdir(parents=True, exist_ok=True)
        logs = Path(mkdtemp(prefix="semion-logs-", dir=shared)).resolve()
        sys.stderr.write(f"semion: the processes log in {logs}, which goes when nothing fails\n")
        return logs

    def start_engines(self) -> list[RayEngine]:
        """Starts the inference engines; they load while the caller goes on."""
        placed = self._placement
        assignments: Sequence[GpuAssignment | None] = placed.engines if placed else [None] * self._config.inference.engines
        engines = []
        for i, assignment in enumerate(assignments):
            journal = self._journal(f"engine {i}")
            profiled, cache = self._profiled("engine", i), self._spec.kv_cache
            start = self._starter(assignment, journal, ENGINE, "config", i, cache, profiled=profiled)
            engines.append(RayEngine(journal, start))
        self._engines += engines
        return engines

    def start_judges(self, sources: Sequence[Source] | None = None) -> Judges:
        """Starts what judges the run's sources, or `sources`, in processes of its own: the engines of the reward model, where
        the run has one, and on every other node with a process of the run one that holds what judges there, where a reward
        judges on every node. They load while the caller goes on."""
        spreads = self._spec.starts_engines and len(self._spec.nodes) > 1
        everywhere = pools(self._config, sources) if spreads else {}
        nodes = []
        for number in self._spec.nodes[1:] if everywhere else ():
            journal, threads = self._journal(f"judges of node {number}"), self._spec.threads_on(number)
            at_once = CALLS_PER_POOL * len(everywhere)
            start = self._starter(GpuAssignment(number, ()), journal, JUDGES, "config", threads, at_once=at_once)
            nodes.append(RayEngine(journal, start))
        self._engines += nodes
        return Judges(self._start_reward_engines(), nodes, self._spec.threads_on(0))

    def _start_reward_engines(self) -> list[RayEngine]:
        placed, count = self._placement, self._spec.num_reward_engines
        assignments: Sequence[GpuAssignment | None] = placed.reward_engines if placed else [None] * count
        engines = []
        for i, assignment in enumerate(assignments):
            journal = self._journal("the reward engine" if count == 1 else f"reward engine {i}")
            start = self._starter(assignment, journal, REWARD_ENGINE, "config")
            node = assignment.node if assignment is not None and self._config.cluster.nodes > 1 else None
            engines.append(RayEngine(journal, start, node))
        self._engines += engines
        return engines

    def train(self, *, resume: bool) -> Iterator[Event]:
        """Runs the training loop on every trainer rank; yields rank 0's events as they come.

        Raises the error of whichever process failed, a typed one before any other.
        """
        engines = self.start_engines() if self._spec.starts_engines else []
        judges = self.start_judges()
        return self.run_ranks("train", lambda rank: (*((engines, judges) if rank == 0 else (None, Judges())), resume))

    def fine_tune(self) -> Iterator[Event]:
        """Runs the supervised loop on every trainer rank."""
        return self.run_ranks("fine_tune", lambda rank: ())

    def run_ranks(
        self, method: str, arguments_of: Callable[[int], tuple[Any, ...]], kind: str | type = RANK
    ) -> Iterator[Event]:
        """Runs a method of every trainer rank with (rendezvous port, *arguments_of(rank)); the events of `watch`."""
        import ray

        starting = Doing("processes")
        yield starting.event("begins")
        placed = self._placement
        assignments: Sequence[GpuAssignment | None] = placed.ranks if placed else [None] * self._config.trainer.world_size
        host = self._nodes[0].address  # where rank 0 is
        journals = [self._journal(f"trainer rank {rank}") for rank in range(len(assignments))]
        ranks = [
            self._starter(assignment, journal, kind, "spec", rank, host, profiled=self._profiled("rank", rank))()
            for rank, (assignment, journal) in enumerate(zip(assignments, journals, strict=True))
        ]
        self._ranks += ranks
        serving, deadline = ranks[0].call.remote("serve"), time.monotonic() + self._config.trainer.timeout_seconds
        while time.monotonic() < deadline and not ray.wait([serving], timeout=TOLD_SECONDS)[0]:
            yield from self._fresh()  # engines are loading meanwhile
        try:
            port = ray.get(serving, timeout=0.0)
        except ray.exceptions.RayError as error:
            raise typed_error(error, journals[0].process, journals[0].log) from error
        streams = [
            actor.stream.options(num_returns="streaming", name=f"trainer rank {rank}: {method}").remote(
                method, port, *arguments_of(rank)
            )
            for rank, actor in enumerate(ranks)
        ]
        yield starting.event("done")
        yield from watch(self._config, dict(zip(streams, journals, strict=True)), self._fresh)

    def _fresh(self) -> list[Event]:
        """What any process told or warned of since this was last called."""
        assert self._told is not None and self._warnings is not None, "entered"
        return [*self._told.fresh(), *self._warnings.fresh()]

    def _starter(
        self,
        assignment: GpuAssignment | None,
        journal: Journal,
        kind: str | type,
        needs: Needs,
        *arguments: Any,
        profiled: dict[str, Any] | None = None,
        at_once: int = 1,
    ) -> Callable[[], Any]:
        """Starts a process with an object of this class on its node and GPUs, each time it is called. `profiled`: what Ray must
        know to profile it. `at_once`: calls that it runs at a time, each in a thread, where there are several."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        arguments = (kind, needs, self._spec.to_json(), *arguments)
        if assignment is None:
            return partial(ray.remote(num_cpus=0, runtime_env=profiled or {})(hosting(kind)).remote, journal, *arguments)
        node = self._nodes[assignment.node]
        variables = PROCESS_ENVIRONMENT | {"GLOO_SOCKET_IFNAME": node.interface, "NCCL_SOCKET_IFNAME": node.interface}
        if node.devices:
            variables["CUDA_VISIBLE_DEVICES"] = assignment.visible(node.devices)
        actor = ray.remote(
            num_cpus=0,
            max_concurrency=at_once,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_id, soft=False),
            runtime_env={"env_vars": variables} | (profiled or {}),
        )(hosting(kind))
        return partial(actor.remote, journal, *arguments)

    def _journal(self, process: str) -> Journal:
        assert self._logs is not None
        return Journal(self._logs, process, self._verbose)

    def _profiled(self, kind: Literal["rank", "engine"], index: int) -> dict[str, Any]:
        return nsight.runtime_env(self._config.profile, self._config.run_directory, kind, index)
