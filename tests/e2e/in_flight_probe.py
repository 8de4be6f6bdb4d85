"""A script, not a test: the run's own loop, source and pool over one real vLLM engine in this process, whose weights change at
every sync, under seeded schedules of random delays. Only the trainer is none. `python in_flight_probe.py CONFIG SCHEDULES`
prints how many of the schedules gave, to the last bit, what the one without delays gave; and how many decoding steps that took
with updates in flight, and with engines that are drained before every sync.

A schedule draws how long each call waits in the engine, each step in the trainer and each judgement; which steps are evaluated;
and after which steps all but the files of a checkpoint is forgotten.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from engine.config.load import RunConfig, load_config, override
from engine.core.types import Completion, Score
from engine.data.mixture import load_mixture
from engine.data.templates import model_tokenizer
from engine.inference.pool import Pool
from engine.inference.sampling import sample_requests
from engine.inference.vllm_engine import VllmEngine
from engine.observe.profiling.window import Window
from engine.rewards.base import Reward
from engine.rewards.registry import judging_of
from engine.rollouts.ahead import AHEAD, read_ahead
from engine.rollouts.ledger import rollout_rows
from engine.rollouts.paused import PAUSED, read_paused
from engine.rollouts.source import RolloutSource
from engine.run.loop import train
from engine.run.spec import resolve

MOST_SECONDS = 0.004  # of one delay


class Engine(VllmEngine):
    """The real one, which counts its decoding steps. A sync makes its weights up: the seed model's, and for every version a
    seeded change."""

    def serve(self, config: RunConfig) -> None:
        """Another run's options from here on."""
        self._config, self.decoding_steps = config, 0
        step = type(self._llm).step

        def counted() -> Any:
            self.decoding_steps += 1
            return step(self._llm)

        self._llm.step = counted

    def receive(self, version: int, call: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        assert not self._open, "a sync finds the engine empty"

        def change(worker: Any) -> None:
            model = worker.model_runner.model
            for name, parameter in model.named_parameters():
                kept = self.__dict__.setdefault("_seed_model", {})
                base = kept.setdefault(name, parameter.detach().clone())
                draw = torch.Generator().manual_seed(version)
                parameter.data.copy_(base + 0.1 * bool(version) * base.std() * torch.randn(base.shape, generator=draw))

        self._llm.collective_rpc(change)
        self._llm.reset_prefix_cache()
        self._version = version
        return version, ("",)


class Handle:
    """Its calls one after another in a thread, each delayed, as Ray has them in a process."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._thread = engine, ThreadPoolExecutor(1)
        self.delay: Callable[[], object] = lambda: None

    def call(self, method: str, *arguments: Any) -> Any:
        def run() -> Any:
            self.delay()
            return getattr(self._engine, method)(*arguments)

        class Waiting:
            def __init__(self, future: Any) -> None:
                self.result = future.result

        return Waiting(self._thread.submit(run))


class Judge(Reward):
    """An answer's length is its reward."""

    def __init__(self, delay: Callable[[], object]) -> None:
        self._delay = delay

    def score(self, answers: Any) -> list[Score]:
        self._delay()
        return [Score(float(len(answer.completion) % 2), "ok") for answer in answers]

    def close(self) -> None:
        """Nothing to close."""


class Run:
    """Everything of a run but the engine and the trainer."""

    def __init__(self, config: RunConfig, prompts: Any, handle: Handle, seed: int | None) -> None:
        self.config, self.prompts, self.handle, self._draw = config, prompts, handle, random.Random(seed)
        self.delay: Callable[[], object] = (lambda: None) if seed is None else self._wait
        handle.delay = self.delay
        self.serves: int | None = 0
        self.rows: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        steps = range(config.run.steps)
        self.evaluated = {step for step in steps if seed is not None and self._draw.random() < 0.3}
        self.forgotten = {step for step in steps if seed is not None and self._draw.random() < 0.3}
        self.num_resumed = 0

    def _wait(self) -> None:
        time.sleep(MOST_SECONDS * self._draw.random())

    def _open(self, folder: Path | None, start: int) -> None:
        """A pool that serves nothing yet, and a source that knows what the files hold."""
        handle: Any = self.handle
        self.pool = Pool([handle], 60.0)
        wanted, ahead = self.config.schedule.in_flight(start), None
        if folder is not None and wanted:
            ahead = read_ahead(folder / AHEAD, self.prompts, self.config)
            if (folder / PAUSED).exists():
                ahead = type(ahead)(ahead.steps, read_paused(folder / PAUSED, self.prompts, self.config))
            assert ahead.kept == wanted, (ahead.kept, wanted)
        me: Any = self
        self.source = RolloutSource(self.config, self.prompts, self.pool, Judge(self.delay), me, ahead=ahead)

    def run(self) -> None:
        """All steps, forgetting on the way."""
        schedule, start, folder = self.config.schedule, 0, None
        with tempfile.TemporaryDirectory() as scratch:
            while start < schedule.num_steps:
                self._open(folder, start)
                for record in self._steps(start):
                    self.delay()
                    told = {key: value for key, value in record.items() if "second" not in key and "idle" not in key}
                    self.metrics.append(told)
                    start = int(record["step"]) + 1
                    if start in self.forgotten and schedule.resumable(start) and start < schedule.num_steps:
                        self.num_resumed += 1
                        folder = Path(scratch) / str(start)
                        folder.mkdir()
                        for step in schedule.completes(start):
                            self.source.drain(step)
                        self.source.ahead(schedule.in_flight(start)).write(folder)
                        break
                self.source.close()

    def _steps(self, start: int) -> Any:
        me: Any = self
        return train(
            self.config.schedule,
            me,
            me,
            me,
            start=start,
            colocated=False,
            observe=lambda record: {},
            checkpoint=lambda step: None,
            evaluation_due=lambda step: step in self.evaluated,
            evaluate=self._evaluate,
            window=Window(self.config.profile, self.config.run_directory, 0),
        )

    def _evaluate(self, step: int) -> None:
        asked = self.prompts.sets[0].prompts[:3]
        options: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 5}
        self.pool.generate(sample_requests(asked, 1, run_seed=1, purpose="held out", step=step, **options))

    # -- what the loop calls

    def publish(self, version: int) -> dict[str, float]:
        self.pool.unverified(version, self.pool.receive(version, {}), 60.0)
        self.pool.commit(version)
        self.serves = version
        return {"sync_seconds": 0.0}

    def open(self, steps: range, until: int) -> None:
        self.source.open(steps, until)

    def finish(self, steps: range) -> None:
        for step in steps:
            self.source.finish(step)

    def drain(self, steps: range) -> None:
        for step in steps:
            self.source.drain(step)

    def early(self, step: int) -> None:
        """There is nothing."""

    def next(self, step: int) -> tuple[Any, dict[str, float]]:
        return None, self.source.next(step).metrics

    def refresh_reference(self) -> None:
        """There is none."""

    def as_seed(self) -> Any:
        return nullcontext()

    def score(self, batch: Any) -> Any:
        return batch

    def train_step(self, batch: Any) -> dict[str, float]:
        self.delay()
        return {"loss": 0.0}

    def append(self, step: int, groups: Any) -> None:
        """In the records' place."""
        for group in groups:
            for row, rollout in zip(rollout_rows(group), group.rollouts, strict=True):
                completion: Completion = rollout.completion
                exact = {"token_ids": list(completion.token_ids), "log_probs": [p.hex() for p in completion.log_probs]}
                self.rows.append(row | exact)


def main() -> None:
    config = load_config(sys.argv[1])
    spec = resolve(config, digests=False)
    assert spec.kv_cache is not None
    tokenizer = model_tokenizer(config, spec.shape.vocab_size)
    prompts = load_mixture(config, judging_of, tokenizer)
    engine = Engine(config, 0, spec.kv_cache)
    handle, decoding_steps = Handle(engine), {}
    for in_flight in (False, True):
        engine.serve(own := override(config, {"sync.in_flight": in_flight}))
        plain = Run(own, prompts, handle, None)
        plain.run()
        decoding_steps["in flight" if in_flight else "drained"] = engine.decoding_steps
    equal, resumed, evaluated = 0, 0, 0
    for seed in range(int(sys.argv[2])):
        other = Run(config, prompts, handle, seed)
        other.run()
        equal += (other.rows, repr(other.metrics)) == (plain.rows, repr(plain.metrics))
        resumed, evaluated = resumed + other.num_resumed, evaluated + len(other.evaluated)
    spans = [row["spans"] for row in plain.rows]
    texts = [tokenizer.decode(row["token_ids"], skip_special_tokens=True) == row["text"] for row in plain.rows]
    told: dict[str, Any] = {"equal": equal, "rollouts": len(spans), "most_versions": max(map(len, spans))}
    told |= {"several": sum(len(span) > 1 for span in spans), "resumed": resumed, "evaluated": evaluated}
    told |= {"texts_hold": all(texts), "decoding_steps": decoding_steps}
    steps = [[row for row in plain.rows if row["step"] == step] for step in range(config.run.steps)]
    told |= {"versions": [sorted({version for row in rows for version, _ in row["spans"]}) for rows in steps]}
    print("RESULT " + json.dumps(told))


if __name__ == "__main__":
    main()
