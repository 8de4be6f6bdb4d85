"""Steps from disk instead of from engines: the rollouts that a ledger holds, the pairs of a preference file, or the worked
solutions of supervised training. Nothing is sampled and nothing is judged here; a replayed ledger gives, bit for bit, the steps
of the offline run that wrote it.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.algorithms.registry import make_algorithm
from engine.config.load import RunConfig
from engine.core.errors import ConfigError, DataError, brief
from engine.core.segments import is_folder_of_segments
from engine.core.types import Judging, Sequence
from engine.data.ends import written_end
from engine.data.forms import Columns, found
from engine.data.mixture import Mixture, load_mixture, load_prompts, prompt_form
from engine.data.overlap import prompt_digest
from engine.data.preferences import PreferenceSet, load_preferences
from engine.data.prompts import PromptOrder
from engine.data.records import records
from engine.data.rows import wanted_fields
from engine.data.supervised import supervised_sequence
from engine.data.tokens import stays_text
from engine.observe.rollouts import ROLLOUTS, ROLLOUTS_FILE, rollouts_of
from engine.rewards.registry import judging_of
from engine.rollouts.base import StepData, Waiting, nothing
from engine.rollouts.batch import step_data
from engine.rollouts.ledger import RolloutLedger
from engine.rollouts.metrics import LENGTH, LENGTH_MAX, WAITED, rollout_metrics, staleness_metrics, warn_of_endings

if TYPE_CHECKING:
    from engine.data.templates import Tokenizer

_ROLLOUT, _PAIR = {"step", "prompt_id", "token_ids"}, {"chosen", "rejected"}  # what the first row of each has


class _FromDisk:
    """What need not be made ready: a step is read when it is asked for, as a whole."""

    def open(self, steps: range, until: int | None = None) -> None:
        """Nothing to open."""

    def finish(self, step: int, waiting: Waiting = nothing) -> None:
        """No engine is at work."""

    def drain(self, step: int, waiting: Waiting = nothing) -> None:
        """Nothing is under way."""

    def early(self, step: int, waiting: Waiting = nothing) -> None:
        """A step is there as a whole."""

    def close(self) -> None:
        """Nothing is held open."""


class LedgerSource(_FromDisk):
    """Step k of the run is step k of the ledger, joined with the run's prompts by their ids."""

    def __init__(
        self,
        config: RunConfig,
        ledger: RolloutLedger,
        prompts: Mixture,
        vocab_size: int,
        end_ids: Collection[int] = (),
    ) -> None:
        """DataError when the ledger lacks a step of the run. `end_ids`: the tokens that end a response, which are looked for
        inside rollouts."""
        self._end_ids = end_ids
        self._config, self._ledger, self._shares, self._vocab_size = config, ledger, prompts.shares, vocab_size
        self._by_id = {prompt.id: prompt for part in prompts.sets for prompt in part.prompts}
        self._warnings = prompts.warnings
        ledger.check_steps(config.run.steps)

    @property
    def digests(self) -> frozenset[bytes]:
        """Of the prompts that are trained on, as data/overlap.py has them."""
        return frozenset(prompt_digest(prompt.problem, prompt.messages) for prompt in self._by_id.values())

    @property
    def warnings(self) -> list[str]:
        """What is to be said of sources that lost much of their data."""
        return self._warnings

    def __str__(self) -> str:
        return f"rollouts of {len(self._ledger.steps)} steps for {len(self._by_id)} prompts"

    def next(self, step: int, waiting: Waiting = nothing) -> StepData:
        """Reads `step`. DataError names what does not fit the run's prompts or options."""
        started = time.monotonic()
        num_prompts, samples = sum(sampled for sampled, _ in self._shares), self._config.algorithm.samples_per_prompt
        groups = self._ledger.groups(step, self._by_id, num_prompts, samples)
        highest = max(int(r.completion.token_ids.array.max()) for group in groups for r in group.rollouts)
        if highest >= self._vocab_size:
            raise DataError(
                f"{self._ledger.path}, step {step}: `token_ids` must be of the model's {self._vocab_size} tokens; found "
                f"{highest}: replay rollouts of a model with the same tokenizer"
            )
        self._check_temperature(step, {r.completion.temperature for group in groups for r in group.rollouts})
        metrics = {WAITED.name: time.monotonic() - started} | rollout_metrics(groups, None, self._end_ids)
        warn_of_endings(metrics, self._config.sampling.max_tokens)
        return step_data(groups, self._shares, metrics | staleness_metrics(groups), self._config)

    def _check_temperature(self, step: int, found: set[float]) -> None:
        """DataError for log-probs of another distribution than those that the loss compares them with."""
        config = self._config
        wanted = config.log_prob_temperature
        if config.algorithm.uses_ratios and found != {wanted}:
            raise DataError(
                f"{self._ledger.path}, step {step}: log-probs must be of temperature {wanted}, which algorithm.loss = "
                f"{config.algorithm.loss!r} compares them at; found {', '.join(map(str, sorted(found)))}: set "
                f"sampling.temperature as it was when the ledger was written by a loss that uses ratios"
            )


class PreferenceSource(_FromDisk):
    """data.prompts_per_step pairs a step, in the seeded order of prompts."""

    def __init__(self, config: RunConfig, pairs: PreferenceSet) -> None:
        self._pairs, self._num_pairs = pairs, config.data.prompts_per_step
        self._order = PromptOrder(len(pairs.pairs), config.run.seed)

    @property
    def digests(self) -> frozenset[bytes]:
        """Of the prompts that are trained on, as data/overlap.py has them."""
        return self._pairs.digests

    @property
    def warnings(self) -> list[str]:
        """What is to be said of a file that lost much of its data."""
        return [f"data.replay: {self._pairs.warning}"] if self._pairs.warning else []

    def __str__(self) -> str:
        return str(self._pairs)

    def next(self, step: int, waiting: Waiting = nothing) -> StepData:
        """The pairs of `step`, each a group of its own; they have no rollout log-probs, and no metric needs them."""
        pairs = [self._pairs.pairs[index] for index in self._order.at(step, self._num_pairs)]
        sequences = [
            Sequence(pair.prompt_ids, response, group=group, chosen=chosen)
            for group, pair in enumerate(pairs)
            for response, chosen in ((pair.chosen_ids, True), (pair.rejected_ids, False))
        ]
        lengths = [len(sequence.completion_ids) for sequence in sequences]
        metrics = {LENGTH.name: sum(lengths) / len(lengths), LENGTH_MAX.name: float(max(lengths))}
        return StepData(sequences, len(pairs), metrics)


class SupervisedSource(_FromDisk):
    """sft.sequences_per_step worked solutions a step, in the seeded order. They are held as tokens."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, max_positions: int) -> None:
        """`tokenizer`: the run's (model_tokenizer); `max_positions`: the model's. ConfigError when a solution with its prompt
        is longer than a microbatch or that."""
        unjudged = Judging(verifiable=False, needs_answer=False, wants_row=False)
        loaded = load_prompts(config, config.data, config.data.train, unjudged, tokenizer)
        end = written_end(tokenizer)
        prompts = [prompt for prompt in loaded.prompts if stays_text(tokenizer, prompt.solution, end)]
        self._num_special = loaded.num_special + len(loaded.prompts) - len(prompts)
        self._loaded = replace(loaded, prompts=())  # what was left out; the texts go
        self._sequences = [supervised_sequence(prompt, tokenizer) for prompt in prompts]
        limit = min(config.trainer.microbatch_tokens, max_positions)
        for prompt, sequence in zip(prompts, self._sequences, strict=True):
            if sequence.num_tokens > limit:
                raise ConfigError(
                    f"trainer.microbatch_tokens and the model's positions must hold every prompt with its solution; found "
                    f"{sequence.num_tokens} tokens in {prompt.id} and a limit of {limit}: raise trainer.microbatch_tokens, or "
                    f"shorten or remove the row"
                )
        self._order = PromptOrder(len(prompts), config.run.seed)
        self._num_sequences = config.sft.sequences_per_step

    @property
    def warnings(self) -> list[str]:
        """What is to be said of a file that lost much of its data."""
        special = f"left out: {self._num_special} rows that spell special tokens, which the tokenizer cannot keep text"
        told = [self._loaded.warning, special if self._num_special else ""]
        return [f"data.train: {text}" for text in told if text]

    def __str__(self) -> str:
        spell = f", {self._num_special} that spell special tokens" if self._num_special else ""
        left_out = f"{self._loaded.num_dropped} too long, {self._loaded.num_duplicates} that came before{spell}"
        return f"{len(self._sequences)} worked solutions; left out: {left_out}"

    def next(self, step: int, waiting: Waiting = nothing) -> StepData:
        """The solutions of `step`, each alone; what is measured of them is the loss's."""
        sequences = [self._sequences[index] for index in self._order.at(step, self._num_sequences)]
        return StepData(sequences, len(sequences), {})


def replay_kind(config: RunConfig) -> Literal["rollouts", "preferences"] | None:
    """What data.replay names, by its first row; None where nothing is replayed.

    DataError when it is neither, ConfigError when the run cannot train on it.
    """
    path = config.data.replay
    if path is None:
        return None
    place, own = Path(path), config.run_directory
    if place.resolve() in ((own / ROLLOUTS_FILE).resolve(), (own / ROLLOUTS).resolve()):
        raise ConfigError(f"data.replay must not be the run's own rollouts; found {path}: name another run.directory")
    if is_folder_of_segments(place):
        return "rollouts"
    if place.is_dir() and (inside := rollouts_of(place)) is not None:
        raise DataError(f"data.replay must be the rollouts of a run; found the folder of a whole run, {path}: name {inside}")
    columns: Columns = config.data.columns or {}
    pair = {columns.get(name, name) for name in _PAIR}
    where, first = next(iter(records(path, wanted_fields(_ROLLOUT | _PAIR, columns))), (path, None))
    names = first.keys() if isinstance(first, dict) else set()
    if names >= _ROLLOUT and Path(path).suffix == ".jsonl":
        return "rollouts"
    if isinstance(first, dict) and all(name in first or found(first, name) is not None for name in pair):
        _check_preferences(config)
        return "preferences"
    raise DataError(
        f"{where}: data.replay must hold rollouts as `semion rollout` writes them, or rows with `chosen` and `rejected`; found "
        f"{brief(first)}: name another file"
    )


def open_ledger(config: RunConfig, vocab_size: int, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> LedgerSource:
    """The rollouts that data.replay names, with the data they were sampled from, for a model with that vocabulary and end
    tokens."""
    assert config.data.replay is not None
    mixture = load_mixture(config, judging_of, tokenizer)
    return LedgerSource(config, RolloutLedger(config.data.replay), mixture, vocab_size, end_ids)


def open_preferences(config: RunConfig, tokenizer: Tokenizer) -> PreferenceSource:
    """The pairs that data.replay names, which need no other data."""
    path = config.data.replay
    assert path is not None
    data = config.data
    limits = data.max_prompt_tokens, config.sampling.max_tokens
    form = prompt_form(config, data)
    return PreferenceSource(config, load_preferences(path, tokenizer, form, *limits, data.columns))


def _check_preferences(config: RunConfig) -> None:
    """ConfigError for options that a file of pairs has no use for."""
    d = config.data
    if make_algorithm(config.algorithm).needs_rollouts:
        options = config.algorithm.model_dump(include={"loss", "alpha"})
        raise ConfigError(
            f"data.replay: pairs have no rewards and no rollout log-probs, so algorithm.loss must be 'dpo' or 'group_dpo' with "
            f"alpha = 0; found {' with alpha = '.join(map(repr, options.values()))}: change it"
        )
    if d.mix or d.spare_prompts:
        raise ConfigError(
            f"data.replay: pairs are one source and are never skipped; found {len(d.mix)} further sources in data.mix and "
            f"data.spare_prompts = {d.spare_prompts}: remove them"
        )
