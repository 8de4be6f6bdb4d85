"""Where a run's prompts come from: one source or several, of which every batch holds the same exact numbers, source by source.
Each has its own order, template and reward; the orders are arithmetic (prompts.py), so a mixture has no state either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.load import RunConfig
from engine.config.options import Source, source_key
from engine.core.errors import DataError, SemionError
from engine.core.seeds import counted_seed
from engine.core.types import Judging, Prompt
from engine.data.overlap import prompt_digest
from engine.data.prompts import ASKED, TRAINED, PromptOrder, PromptSet
from engine.data.rows import load_rows
from engine.data.templates import PromptForm, read_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JudgingOf = Callable[[RunConfig, Source], Judging]  # what must be known of a source's rewards (rewards.registry.judging_of)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The problems that one source is evaluated on."""

    place: int  # of the source among data.sources
    source: Source
    prompts: PromptSet
    name: str  # of the set in the run's records: the file's stem, or the option where two files share it

    @property
    def key(self) -> str:
        """The option that names them."""
        return f"{source_key(self.place)}.held_out"


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sources of a run with their prompts, in the order of data.sources."""

    sources: tuple[Source, ...]
    sets: tuple[PromptSet, ...]
    seed: int

    @property
    def prompts_per_step(self) -> int:
        """Prompts that a batch counts, over all sources; spare ones are sampled beyond them."""
        return sum(source.prompts_per_step for source in self.sources)

    @property
    def shares(self) -> list[tuple[int, int]]:
        """(prompts sampled, prompts of the batch) of each source in a step."""
        return [(source.prompts_per_step + source.spare_prompts, source.prompts_per_step) for source in self.sources]

    def at(self, step: int) -> list[Prompt]:
        """The prompts to sample for `step` (from 0): of each source its prompts and its spare ones, source by source."""
        return [
            prompts.prompts[index]
            for place, (prompts, (sampled, _)) in enumerate(zip(self.sets, self.shares, strict=True))
            for index in PromptOrder(len(prompts.prompts), self._seed_of(place)).at(step, sampled)
        ]

    def __str__(self) -> str:
        return "; ".join(f"{source_key(place)}.train: {prompts}" for place, prompts in enumerate(self.sets))

    @property
    def warnings(self) -> list[str]:
        """What is to be said of sources that lost much of their data."""
        return [f"{source_key(i)}.train: {prompts.warning}" for i, prompts in enumerate(self.sets) if prompts.warning]

    @property
    def digests(self) -> frozenset[bytes]:
        """Of all prompts, as overlap.py has them."""
        return frozenset(prompt_digest(prompt.problem, prompt.messages) for part in self.sets for prompt in part.prompts)

    def _seed_of(self, place: int) -> int:
        """The first source's order is that of a run without others."""
        return counted_seed(self.seed, "source", place) if place else self.seed


def load_mixture(config: RunConfig, judging_of: JudgingOf, tokenizer: PreTrainedTokenizerBase) -> Mixture:
    """Reads and tokenizes all prompts to train on with the run's tokenizer (model_tokenizer). A problem that an earlier
    source has is left out and counted.

    DataError for rows that cannot be used, or when one prompt id stands for two problems, also of different sources; it
    begins with the option and the file.
    """
    sets: list[PromptSet] = []
    for place, source in enumerate(config.data.sources):
        before = [prompt for earlier in sets for prompt in earlier.prompts]
        with _naming(f"{source_key(place)}.train", source.train):
            sets.append(load_prompts(config, source, source.train, judging_of(config, source), tokenizer, before))
    return Mixture(config.data.sources, tuple(sets), config.run.seed)


def held_out_sources(config: RunConfig) -> dict[str, int]:
    """The name of every evaluation set in the run's records, and the place of its source: the file's stem, or the option
    where two files share it."""
    stems = {place: Path(s.held_out).stem for place, s in enumerate(config.data.sources) if s.held_out is not None}
    common = [stem for stem in stems.values() if list(stems.values()).count(stem) > 1]
    return {source_key(place) if stem in common else stem: place for place, stem in stems.items()}


def load_held_out(config: RunConfig, judging_of: JudgingOf, tokenizer: PreTrainedTokenizerBase) -> tuple[HeldOut, ...]:
    """The evaluation set of every source that has one, in the order of the sources."""
    found = []
    for name, place in held_out_sources(config).items():
        source = config.data.sources[place]
        assert source.held_out is not None
        with _naming(f"{source_key(place)}.held_out", source.held_out):
            judging, longest = judging_of(config, source), longest_asked(config)
            prompts = load_prompts(config, source, source.held_out, judging, tokenizer, longest=longest)
            found.append(HeldOut(place, source, prompts, name))
    return tuple(found)


@contextmanager
def _naming(option: str, path: str) -> Iterator[None]:
    """Lets a DataError about `path` begin with the option that names it."""
    try:
        yield
    except DataError as error:
        raise naming(option, path, error) from error


def naming(option: str, path: str, error: SemionError) -> DataError:
    """The error about `path`, beginning with the option that names it."""
    rest = str(error).removeprefix(path)
    return DataError(f"{option} ({path}){rest if rest != str(error) else f': {error}'}")


def longest_asked(config: RunConfig) -> int:
    """Tokens of the longest held-out prompt that an engine can answer: data.max_prompt_tokens, which says what is trained on,
    leaves no problem out of an evaluation."""
    return config.inference.max_model_tokens - config.sampling.max_tokens


def load_prompts(
    config: RunConfig,
    source: Source,
    path: str,
    judging: Judging,
    tokenizer: PreTrainedTokenizerBase,
    before: Many[Prompt] = (),
    *,
    longest: int | None = None,
) -> PromptSet:
    """The prompts of a file with the source's template and reward, of no more than `longest` tokens (data.max_prompt_tokens
    where not said). DataError names the file."""
    rows = load_rows(path, needs_answer=judging.needs_answer, keep_columns=judging.wants_row, columns=source.columns)
    most, limit = (config.data.max_prompt_tokens, TRAINED) if longest is None else (longest, ASKED)
    form, verifiable = prompt_form(config, source), judging.verifiable
    try:
        return PromptSet.from_rows(
            rows, tokenizer, form, most, reward=source.judge, verifiable=verifiable, before=before, limit=limit
        )
    except DataError as error:
        raise error if str(error).startswith(path) else DataError(f"{path}: {error}") from error


def prompt_form(config: RunConfig, source: Source) -> PromptForm:
    """How a source's problems are put to the policy. ConfigError for a chat template that cannot be read."""
    return PromptForm(source.template, source.system, read_chat_template(config.data.chat_template))
