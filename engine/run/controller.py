"""What trainer rank 0 has and no other: the prompts, the pool of engines, the rewards, the rollouts, the run's records and
its evaluation. It trains nothing and starts no process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.config.load import RunConfig, dump_config
from engine.data.mixture import load_held_out, load_mixture
from engine.evaluation.accuracy import evaluate, greedy_samples
from engine.evaluation.selection import scores
from engine.inference.pool import EngineHandle, Pool
from engine.observe.guard import Guard
from engine.observe.sinks import JsonlLedger, MetricsWriter, read_rows
from engine.rewards.math.reward import VERIFIER_VERSION
from engine.rewards.model import ScoringEngine
from engine.rewards.registry import RoutedReward, judging_of, open_rewards
from engine.rollouts.base import StepSource
from engine.rollouts.replay import open_replay
from engine.rollouts.source import RolloutSource

Event = dict[str, Any]
NUM_SAMPLES = 8  # held-out problems whose greedy answers are kept for people to read


class Desk:
    """What rank 0 alone has: the pool, the rollouts, the reward, the records."""

    def __init__(
        self, config: RunConfig, engines: list[EngineHandle], reward_engine: ScoringEngine | None, start: int
    ) -> None:
        self._config, directory = config, config.run_directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.toml").write_text(dump_config(config), encoding="utf-8")
        self._metrics = MetricsWriter(directory)
        self._evaluations = JsonlLedger(directory / "evaluations.jsonl")
        self._samples = JsonlLedger(directory / "samples.jsonl")
        self._ledger = JsonlLedger(directory / "rollouts.jsonl")
        self._findings = JsonlLedger(directory / "guard.jsonl")
        self._sinks = (self._metrics, self._evaluations, self._samples, self._ledger, self._findings)
        again = config.evaluation_due(start)  # else what was judged at the checkpoint stands
        for sink in self._sinks:
            sink.truncate(start if again or sink not in (self._evaluations, self._samples) else start + 1)
        self._judged = [{k: v for k, v in row.items() if k != "records"} for row in self._evaluations.rows()]
        self._guard, self.collapse = Guard(config.guard), ""  # `collapse`: what the run is to be stopped for
        for row in read_rows(directory / "metrics.jsonl"):
            self._guard.observe(row)
        held_out = load_held_out(config, judging_of)
        self._sets = [(part.name, part.prompts.prompts) for part in held_out]  # by name; a set's problems are of one kind
        self._events: list[Event] = [{"kind": "note", "text": f"{part.key}: {part.prompts}"} for part in held_out]
        self._reward = open_rewards(config, reward_engine) if config.uses_engines else RoutedReward({})
        self.pool = Pool(engines, config.inference.timeout_seconds)
        found = self.pool.describe() or [{}]  # without engines there is nothing to describe
        self._versions = {k: v for k, v in found[0].items() if k not in ("host", "pid")} | {"verifier": VERIFIER_VERSION}
        self.source = self._open_source()

    def _open_source(self) -> StepSource:
        """Rollouts sampled now, or what data.replay names."""
        if self._config.data.replay is not None:
            replay = open_replay(self._config)
            self._events.append({"kind": "note", "text": f"data.replay: {replay}"})
            return replay
        prompts = load_mixture(self._config, judging_of)
        self._events.append({"kind": "note", "text": str(prompts)})
        return RolloutSource(self._config, prompts, self.pool, self._reward, self._ledger)

    def evaluate(self, step: int, part_done: Callable[[], object]) -> None:
        """Judges the version that the pool serves on every held-out set; `part_done` is called after every wait."""
        seed_tokens = {row["set"]: row["completion_tokens_mean"] for row in self._judged if row["step"] == 0}
        for name, prompts in self._sets:
            result = evaluate(self._config, prompts, self.pool, self._reward, seed_tokens.get(name), part_done=part_done)
            summary = {"step": step, "set": name} | result.summary()
            self._judged.append(summary)
            self._evaluations.append([summary | {"records": result.records}])
            samples = greedy_samples(self._config, prompts[:NUM_SAMPLES], self.pool)
            part_done()
            self._samples.append({"step": step, "set": name} | sample for sample in samples)
            self._events.append({"kind": "evaluation"} | summary)

    def scores(self) -> dict[int, float]:
        """What checkpoints are compared by: the score of every step evaluated so far; empty without checkpoint.best_by."""
        return scores(self._judged, self._config.checkpoint.best_by)

    def finish_step(self, record: dict[str, float]) -> list[Event]:
        """Writes a step down and has the guard look at it; the events up to and including it."""
        self._metrics.write(record)
        events = [*self._drain(), {"kind": "step"} | record]
        for finding in self._guard.observe(record) if self._config.guard.action != "off" else ():
            self._findings.append([{"step": finding.step, "what": finding.what, "text": finding.text}])
            events.append({"kind": "note", "text": f"guard, step {finding.step}: {finding.text}"})
            if self._config.guard.action == "stop":
                self.collapse = self.collapse or f"step {finding.step}: {finding.text}"
        return events

    def finish(self) -> list[Event]:
        """Closes everything; the last events."""
        self.source.close()
        self.pool.finish_profile()
        self._reward.close()
        for sink in self._sinks:
            sink.close()
        return [*self._drain(), {"kind": "done", "engine_versions": self._versions}]

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

