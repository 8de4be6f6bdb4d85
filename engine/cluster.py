"""Places the processes of a run with Ray and watches them: trainer ranks and inference engines, each in its own process.
The only room that imports ray. It computes nothing and knows no algorithm.

Ray's own control channel pickles what crosses it. It listens on the loopback interface only, and a token made anew for
each run must come with every call.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from engine.config import RunConfig
from engine.errors import EngineLostError, SemionError, WatchdogError
from engine.observe import nsight
from engine.options import SYNC_ATTEMPTS
from engine.worker import Event, TrainerRank, sign_of_life

HOST = "127.0.0.1"
SETTLE_SECONDS = 2.0  # after a first error, how long to wait for one that says more
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for "this machine only": it binds to the loopback interface
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray would run trainer and engines at a lower priority than everything else
    "RAY_prestart_worker_first_driver": "0",  # and start processes that no run uses
    "RAY_DEDUP_LOGS": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


def start_actor(kind: type, *arguments: Any, gpus: int = 1, runtime_env: dict[str, Any] | None = None) -> Any:
    """An actor of this class, on as many GPUs as it is to have where there are any."""
    import ray

    on_gpu = bool(ray.cluster_resources().get("GPU"))
    options = {"runtime_env": runtime_env} if runtime_env else {}
    return ray.remote(num_cpus=0, num_gpus=gpus if on_gpu else 0, **options)(kind).remote(*arguments)


class RayFuture:
    """A method of an engine under way in its process."""

    def __init__(self, reference: Any, name: str) -> None:
        self._reference, self._name = reference, name

    def result(self, timeout_seconds: float) -> Any:
        """The value, or the error that the engine raised; TimeoutError when late, EngineLostError when it died."""
        import ray

        try:
            return ray.get(self._reference, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(self._name) from error
        except ray.exceptions.RayTaskError as error:
            raise _plain(error, self._name) from error
        except ray.exceptions.RayActorError as error:
            raise EngineLostError(f"the process of {self._name} ended: {_last_line(error)}") from error


class RayEngine:
    """An engine, of the policy or of the reward model, in a Ray actor; errors call it `name`."""

    def __init__(
        self, name: str, kind: type, *arguments: Any, gpus: int, runtime_env: dict[str, Any] | None = None
    ) -> None:
        self._name, self._start = name, partial(start_actor, kind, *arguments, gpus=gpus, runtime_env=runtime_env)
        self._actor = self._start()

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
        return RayFuture(getattr(self._actor, method).remote(*arguments), self._name)


class Cluster:
    """The processes of one run on this machine; leaving the context ends them all."""

    def __init__(self, config: RunConfig, *, verbose: bool = False) -> None:
        self._config, self._verbose = config, verbose
        self._ranks: list[Any] = []
        self._engines: list[RayEngine] = []

    def __enter__(self) -> Cluster:
        os.environ.update(_ENVIRONMENT | nsight.ray_environment(self._config.profile))
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=256 << 20,
            logging_level="error",
            log_to_driver=self._verbose,
        )
        return self

    def __exit__(self, *raised: object) -> None:
        import ray

        for actor in self._ranks:
            ray.kill(actor)
        for engine in self._engines:
            engine.stop()
        nsight.await_reports(self._config.profile)
        ray.shutdown()

    def start_engines(self) -> list[RayEngine]:
        """Starts the inference engines; they load while the caller goes on."""
        from engine.inference.vllm_engine import VllmEngine

        inference = self._config.inference
        engines = [
            RayEngine(
                *(f"engine {index}", VllmEngine, self._config, index),
                gpus=inference.tensor_parallel,
                runtime_env=self._profiled("engine", index),
            )
            for index in range(inference.engines)
        ]
        self._engines += engines
        return engines

    def start_reward_engine(self) -> RayEngine | None:
        """Starts the engine of the reward model, where the run has one; it loads while the caller goes on."""
        if self._config.reward_model.path is None:
            return None
        from engine.inference.reward_engine import RewardEngine

        self._engines.append(RayEngine("the reward engine", RewardEngine, self._config, gpus=1))
        return self._engines[-1]

    def train(self, *, resume: bool) -> Iterator[Event]:
        """Runs the training loop on every trainer rank; yields rank 0's events as they come.

        Raises the error of whichever process failed, a typed one before any other.
        """
        engines = self.start_engines() if self._config.uses_engines else []
        reward_engine = self.start_reward_engine() if self._config.uses_engines else None
        return self.run_ranks("train", lambda rank: (*((engines, reward_engine) if rank == 0 else (None, None)), resume))

    def fine_tune(self) -> Iterator[Event]:
        """Runs the supervised loop on every trainer rank."""
        return self.run_ranks("fine_tune", lambda rank: ())

    def run_ranks(
        self, method: str, arguments_of: Callable[[int], tuple[Any, ...]], kind: type[TrainerRank] = TrainerRank
    ) -> Iterator[Event]:
        """Runs a method of every trainer rank with (rendezvous port, *arguments_of(rank)); yields their events."""
        import ray

        world_size = self._config.trainer.world_size
        ranks = [
            start_actor(kind, self._config.model_dump_json(), rank, HOST, runtime_env=self._profiled("rank", rank))
            for rank in range(world_size)
        ]
        self._ranks += ranks
        try:
            port = ray.get(ranks[0].serve.remote(), timeout=self._config.trainer.timeout_seconds)
        except ray.exceptions.RayError as error:
            raise _plain(error, "trainer rank 0") from error
        streams = [
            getattr(actor, method).options(num_returns="streaming").remote(port, *arguments_of(rank))
            for rank, actor in enumerate(ranks)
        ]
        names = {stream: f"trainer rank {rank}" for rank, stream in enumerate(streams)}
        patience = self._patience_seconds()
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, timeout=patience)
            if not ready and self._alive(patience):
                continue
            if not ready:
                raise WatchdogError(f"no trainer rank gave a sign of life for {patience:.0f} s: look for a stopped process")
            for stream in ready:
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
                except ray.exceptions.RayError as error:
                    streams.remove(stream)
                    raise self._worst(_plain(error, names[stream]), streams, names) from error

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

    def _worst(self, first: Exception, streams: list[Any], names: dict[Any, str]) -> Exception:
        """Of the errors that end a run within a moment, the one that says most: what broke first is often an echo."""
        import ray

        deadline = time.monotonic() + SETTLE_SECONDS
        while not _telling(first) and streams and time.monotonic() < deadline:
            ready, _ = ray.wait(streams, num_returns=1, timeout=SETTLE_SECONDS)
            for stream in ready:
                try:
                    ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
                except ray.exceptions.RayError as error:
                    streams.remove(stream)
                    other = _plain(error, names[stream])
                    first = other if _telling(other) else first
        return first


def _telling(error: Exception) -> bool:
    return isinstance(error, SemionError) and not isinstance(error, WatchdogError)


def _plain(error: Any, name: str) -> Exception:
    """A Ray error as what happened in the process `name`: our typed error itself, or a WatchdogError that tells it."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, SemionError):
            return error.cause
        why = " ".join(str(error.cause).split()) or "no message"
        return WatchdogError(f"{name} failed with {type(error.cause).__name__}: {why}; --verbose shows where")
    return WatchdogError(f"the process of {name} ended: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    """What Ray knows of a death: of an error in a constructor its message, else the signal or exit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("engine.errors.InferenceError: ") if lines else type(error).__name__
