"""What trainer rank 0 has and no other: the prompts, the pool of engines, the rewards, the rollouts, the run's records and
its evaluation. It trains nothing and starts no process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from engine.core.files import writing
from engine.data.ends import end_tokens
from engine.data.mixture import Mixture, load_held_out, load_mixture
from engine.data.overlap import overlap_warning, shared
from engine.data.templates import model_tokenizer
from engine.evaluation.accuracy import evaluate, greedy_samples
from engine.evaluation.selection import scores
from engine.inference.pool import EngineHandle, Pool
from engine.observe.telling import Doing, activity, tell
from engine.rewards.math.reward import VERIFIER_VERSION
from engine.rewards.registry import Judges, RoutedReward, judging_of, open_rewards
from engine.rollouts.ahead import Ahead, read_ahead
from engine.rollouts.base import StepSource
from engine.rollouts.paused import read_paused
from engine.rollouts.replay import LedgerSource, PreferenceSource, open_ledger, open_preferences
from engine.rollouts.source import RolloutSource
from engine.run.checkpoint import SCHEDULE
from engine.run.records import Records
from engine.run.signals import Event
from engine.run.spec import Spec

log = logging.getLogger(__name__)

NUM_SAMPLES = 8  # held-out problems whose greedy answers are kept for people to read


class Controller:
    """What rank 0 alone has: the pool, the rollouts, the reward, the records."""

    def __init__(
        self,
        spec: Spec,
        engines: list[EngineHandle],
        judges: Judges,
        start: int,
        kept: Mapping[str, Any] | None,
        notes: Sequence[str] = (),
        ahead: Path | None = None,
        paused: Path | None = None,
    ) -> None:
        """The run goes on after `start` steps; `kept` as in `Records.open`; `notes` are told first; `ahead` and `paused`:
        where the checkpoint keeps rollouts of later steps, a folder of segments, or one file in an older one. What was opened
        is closed where it raises."""
        config = self._config = spec.config
        self._spec = spec
        self.collapse: str | None = None  # what the run is to be stopped for
        with activity("tokenizer"):
            self._tokenizer = model_tokenizer(config, spec.shape.vocab_size)
            ends = end_tokens(config.model.path, self._tokenizer)
        self.end_ids = ends.stop
        if ends.disagreement:
            log.warning(ends.disagreement)
        with ExitStack() as opened:  # what was opened last is closed first, whatever the others raise
            opened.enter_context(writing(config.run_directory))
            self._records = Records.open(config, start, kept)
            opened.callback(self._records.close)
            for note in (*notes, *self._records.notes):
                _note(note)
            with activity("prompts", "that are held out"):
                self._held_out = held_out = load_held_out(config, judging_of, self._tokenizer)
            self._sets = [(part.name, part.prompts) for part in held_out]  # by name; a set's problems are of one kind
            for part in held_out:
                _note(f"{part.key}: {part.prompts}")
            self._reward = open_rewards(config, judges) if spec.starts_engines else RoutedReward({})
            opened.callback(self._reward.close)
            self.pool = Pool(engines, config.inference.timeout_seconds)
            with activity("engines") if spec.starts_engines else nullcontext():
                self._versions = _versions(self.pool)
            if spec.starts_engines and (changed := self._records.engines_run_with(self._versions, resumed=start > 0)):
                _note(changed)
            opened.callback(self.pool.finish_profile)
            self.source = self._open_source(start, ahead, paused)
            opened.callback(self.source.close)
            self._opened = opened.pop_all()

    def _open_source(self, start: int, ahead: Path | None, paused: Path | None) -> StepSource:
        """Rollouts sampled now, or what data.replay names."""
        if self._spec.source == "rollouts":
            with activity("prompts"):
                prompts = load_mixture(self._config, judging_of, self._tokenizer)
            _note(str(prompts))
            self._warn(prompts.warnings, prompts.digests if self._held_out else frozenset())
            known = self._known_ahead(start, ahead, paused, prompts)
            return RolloutSource(self._config, prompts, self.pool, self._reward, self._records.rollouts, self.end_ids, known)
        replay: LedgerSource | PreferenceSource
        if self._spec.source == "ledger":
            replay = open_ledger(self._config, self._spec.shape.vocab_size, self._tokenizer, self.end_ids)
        else:
            replay = open_preferences(self._config, self._tokenizer)
        _note(f"data.replay: {replay}")
        self._warn(replay.warnings, replay.digests)
        return replay

    def _known_ahead(self, start: int, file: Path | None, paused: Path | None, prompts: Mixture) -> Ahead:
        """The rollouts of the steps from `start` on that were sampled, or begun, before it. A run that is shorter now needs
        fewer."""
        wanted = self._config.schedule.in_flight(start)
        known = read_ahead(file, prompts, self._config).steps if wanted and file else {}
        begun = read_paused(paused, prompts, self._config) if wanted and paused else {}
        assert known.keys() | begun.keys() >= set(wanted), (sorted(known), sorted(begun), wanted)  # check_prolonged
        return Ahead(
            {step: known[step] for step in wanted if step in known}, {step: begun[step] for step in wanted if step in begun}
        )

    def _warn(self, warnings: list[str], trained: Collection[bytes]) -> None:
        """Notes what is wrong with the data as far as a run can go on: much left out, held-out problems that are trained on."""
        warnings = [*warnings, *(f"{part.key}: {part.prompts.warning}" for part in self._held_out if part.prompts.warning)]
        for part in self._held_out:
            problems = [(prompt.problem, prompt.messages) for prompt in part.prompts.prompts]
            warnings.append(overlap_warning(part.key, len(problems), shared(problems, trained)))
        for warning in filter(None, warnings):
            _note(f"warning: {warning}")

    def evaluate(self, step: int, part_done: Callable[[], object]) -> None:
        """Judges the version that the pool serves on every held-out set, telling how far it has come; `part_done` is called
        after every wait."""
        judged = self._records.judged
        seed_tokens = {row["set"]: row["completion_tokens_mean"] for row in judged if row["step"] == 0}
        for name, found in self._sets:
            prompts, tokens = found.prompts, seed_tokens.get(name)
            asked = len(prompts[: self._config.evaluation.max_problems])
            with activity("evaluation", f"step {step} on {name}", total=asked, unit="problems") as doing:

                def further(num_problems: int, doing: Doing = doing) -> None:
                    doing.at(num_problems)
                    part_done()

                result = evaluate(
                    self._config, prompts, self.pool, self._reward, tokens, part_done=further, num_too_long=found.num_dropped
                )
                summary = {"step": step, "set": name} | result.summary()
                self._records.judge(summary, result.records)
                samples = greedy_samples(self._config, prompts[:NUM_SAMPLES], self.pool)
                part_done()
            self._records.samples.append({"step": step, "set": name} | sample for sample in samples)
            tell({"kind": "evaluation"} | summary)

    def scores(self) -> dict[int, float]:
        """What checkpoints are compared by: the score of step 0, of every step judged since the run was last resumed, and of
        those that had a checkpoint then; empty without checkpoint.best_by."""
        return scores(self._records.judged, self._config.checkpoint.best_by)

    def kept(self, checkpoints: Collection[int]) -> dict[str, Any]:
        """What a checkpoint made now keeps of the records, beside those of these steps, and of a regime that goes by them."""
        state = self._config.schedule.state()
        return self._records.kept(checkpoints) | ({SCHEDULE: state} if state else {})

    def ahead(self, steps: range) -> Ahead | None:
        """What a checkpoint made now keeps of these steps, which are drained or paused; None where nothing is sampled."""
        return self.source.ahead(steps) if isinstance(self.source, RolloutSource) else None

    def finish_step(self, record: dict[str, float]) -> list[Event]:
        """Writes a step down and has the guard look at it; the step as an event, and what was found."""
        self._records.finish_step(record)
        events: list[Event] = [{"kind": "step"} | record]
        action, findings = self._config.guard.action, self._records.guard.observe(record)
        for finding in findings if action != "off" else ():
            self._records.find(finding)
            events.append({"kind": "note", "text": f"guard, step {finding.step}: {finding.text}"})
            ended_by = "the guard" if finding.fatal else "guard.action = 'stop'"
            ends = finding.fatal or (action == "stop" and finding.step + 1 < self._config.run.steps)
            if ends and self.collapse is None:
                self.collapse = f"step {finding.step}: {finding.text}; {ended_by} ended the run"
        return events

    def finish(self) -> list[Event]:
        """Closes everything, the rewards once nothing judges any more; the last event."""
        self._opened.close()
        return [{"kind": "done", "engine_versions": self._versions}]


def _note(text: str) -> None:
    tell({"kind": "note", "text": text})


def _versions(pool: Pool) -> dict[str, Any]:
    """What the engines say of themselves, and the verifier's version; waits until the engines are up."""
    found = pool.describe() or [{}]  # without engines there is nothing to describe
    # Plain texts: torch.__version__ is of a class of torch's, which the command, that reads this, would load torch for.
    return {name: str(value) for name, value in found[0].items() if name not in ("host", "pid", "quantized")} | {
        "verifier": VERIFIER_VERSION
    }
