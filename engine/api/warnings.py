"""What a run can go on with but somebody should know before it starts: end tokens that the model's files do not agree on, rows
that are too long, in a sample, held-out problems that are trained on, values for CPUs on a machine with GPUs, old answers whose
ratios nothing but the clip bounds, and options that change nothing. What a run cannot go on with is the preflight's to tell; a
run itself notes the first three, of all its rows, and the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.load import RunConfig
from engine.config.options import Source, source_key
from engine.config.unused import unused_options
from engine.core.errors import DataError
from engine.data.ends import end_tokens
from engine.data.mixture import longest_asked, prompt_form
from engine.data.overlap import overlap_warning, prompt_digest, shared
from engine.data.preferences import read_pairs
from engine.data.prompts import ASKED, TRAINED, length_warning
from engine.data.records import HUB
from engine.data.rows import Row, read_rows, sample_rows
from engine.data.templates import LeftOut, fit_prompt
from engine.run.machine import visible_gpus
from engine.run.spec import Spec

if TYPE_CHECKING:
    from engine.data.templates import Tokenizer

OLDEST_UNCORRECTED = 9  # steps, of the answers of s = 10 (docs/results.md, "Semi-online GRPO")
LARGE_BYTES = 64 << 20  # of a longer training file held-out problems are looked for when the run reads it


def warnings(spec: Spec, tokenizer: Tokenizer) -> list[str]:
    """Sentences for people, of a run in which the preflight found nothing wrong, with the tokenizer that it loaded."""
    config = spec.config
    disagreement = end_tokens(config.model.path, tokenizer).disagreement
    pairs = config.data.replay if spec.source == "preferences" else None
    trained = set(_trained(config, pairs)) if any(source.held_out for source in config.data.sources) else set()
    told = [*unused_options(config), *filter(None, [disagreement]), *_slow_on_gpus(config), *_uncorrected(spec)]
    return [*told, *_long(config, tokenizer, pairs), *_overlaps(config, trained)]


def _slow_on_gpus(config: RunConfig) -> Iterator[str]:
    """Options that are right on CPUs, where this machine has GPUs. They stay as they are: nobody's numbers change unasked."""
    if not visible_gpus():
        return
    if config.model.dtype == "float32":
        yield (
            "model.dtype = 'float32' on a machine with GPUs takes twice the memory and several times the time of 'bfloat16'; "
            "`semion init` writes what is right for this machine"
        )
    elif config.trainer.layers == "local" or config.optimizer.implementation == "torch":
        yield (
            f"trainer.layers = {config.trainer.layers!r} and optimizer.implementation = {config.optimizer.implementation!r} "
            f"on a machine with GPUs: 'transformer_engine' and 'te' are faster"
        )


def _uncorrected(spec: Spec) -> Iterator[str]:
    """A loss over ratios without a correction, on answers older than those on which it was measured to lose nothing."""
    config = spec.config
    if spec.source != "rollouts" or not config.algorithm.uses_ratios or getattr(config.algorithm, "correction", "") != "none":
        return
    schedule = config.schedule.planned
    oldest = max(map(schedule.staleness, range(config.run.steps)))
    if oldest > OLDEST_UNCORRECTED:
        yield (
            f"algorithm.loss = {config.algorithm.loss!r} trains on answers up to {oldest} steps old, and nothing but its clip "
            f"bounds their ratios: GRPO lost nothing at s = 10, and with s = 40 was 12 points behind one with a correction "
            f"(docs/results.md); watch ess_share, or set algorithm.correction = 'truncate' and algorithm.correction_high = 2.0"
        )


def _long(config: RunConfig, tokenizer: Tokenizer, pairs: str | None) -> Iterator[str]:
    """Sources of which a sample has many prompts that are too long."""
    bounds = {"train": (config.data.max_prompt_tokens, TRAINED), "held_out": (longest_asked(config), ASKED)}
    for place, source in enumerate(config.data.sources):
        for name, (longest, bound) in bounds.items():
            path = getattr(source, name)
            if path is None or (name == "train" and place == 0 and pairs is not None):
                continue
            rows, is_whole = sample_rows(path, needs_answer=False, columns=source.columns)
            form = prompt_form(config, source)
            fitted = [fit_prompt(tokenizer, row.problem, row.messages, form, longest) for row in rows]
            lengths = [len(ids) for ids in fitted if not isinstance(ids, LeftOut)]
            if warning := length_warning(lengths, [found for found in fitted if isinstance(found, LeftOut)], bound):
                yield f"{source_key(place)}.{name}{'' if is_whole else f', of {len(rows)} rows looked at'}: {warning}"


def _overlaps(config: RunConfig, trained: set[bytes]) -> Iterator[str]:
    """Held-out files of which problems are trained on."""
    for place, source in enumerate(config.data.sources):
        if source.held_out is None:
            continue
        problems = [(row.problem, row.messages) for row in _rows(source.held_out, source)]
        if found := overlap_warning(f"{source_key(place)}.held_out", len(problems), shared(problems, trained)):
            yield found


def _trained(config: RunConfig, pairs: str | None) -> Iterator[bytes]:
    """Digests of what is trained on, as far as the files are not large."""
    if pairs is not None and _is_small(pairs):
        for texts in read_pairs(pairs, config.data.columns):
            if not isinstance(texts, DataError):
                yield prompt_digest(texts.problem, texts.messages)
    for source in config.data.sources if pairs is None else ():
        if _is_small(source.train):
            for row in _rows(source.train, source):
                yield prompt_digest(row.problem, row.messages)


def _rows(path: str, source: Source) -> Iterator[Row]:
    """The rows of a file that can be used: the preflight tells the others."""
    rows = read_rows(path, needs_answer=False, columns=source.columns)
    return (row for row in rows if not isinstance(row, DataError))


def _is_small(path: str) -> bool:
    """Whether a source is a file that is read in seconds."""
    return not path.startswith(HUB) and Path(path).is_file() and Path(path).stat().st_size <= LARGE_BYTES
