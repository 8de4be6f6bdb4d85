"""The files that a purpose reads: whether they are there, some of their rows, and whether prompts and solutions fit. Of a large
file a sample is read."""

from __future__ import annotations

from pathlib import Path

from engine.api.faults.look import Faults, Look, caught, tried
from engine.config.options import Source, source_key
from engine.core.errors import ConfigError, DataError, SemionError
from engine.core.places import meant
from engine.core.segments import is_folder_of_segments
from engine.data.forms import Columns
from engine.data.mixture import longest_asked, naming, prompt_form
from engine.data.preferences import FIELDS as PAIR_FIELDS
from engine.data.preferences import pair_texts
from engine.data.prompts import ASKED, TRAINED
from engine.data.records import HUB, check_source, first_faults, sampled
from engine.data.rows import Row, identity, load_rows, sample_rows, wanted_fields
from engine.data.supervised import completion_tokens
from engine.data.templates import LeftOut, PromptForm, fit_prompt
from engine.data.tokens import stays_text
from engine.observe.rollouts import rollouts_of
from engine.rewards.registry import judging_of
from engine.rollouts.ledger import RolloutLedger
from engine.rollouts.replay import replay_kind

LARGE_LEDGER_BYTES = 256 << 20  # a longer one is looked at when the run reads it
READ = {"eval": ("held_out",), "rollout": ("train",)}  # what a purpose reads of a source; any other reads both


def data_faults(look: Look) -> Faults:
    """The faults of the files that this purpose reads."""
    data = look.config.data
    kind = None
    if data.replay is not None and look.purpose == "train":
        is_of_run = Path(data.replay).is_dir() and (
            is_folder_of_segments(Path(data.replay)) or rollouts_of(Path(data.replay)) is not None
        )  # which `replay_kind` looks at
        faults = [] if is_of_run else caught(_check_file, "data.replay", data.replay)
        if not faults:
            kind, faults = tried(replay_kind, look.config)
        yield from faults
        if kind == "preferences":
            yield from caught(_pair_faults, data.replay, data.columns)
        if kind == "rollouts":
            yield from caught(_ledger_faults, look, data.replay)
    files = [("--suite", source.held_out, source) for source in (look.sets or {}).values()]
    if look.purpose != "generate" and not (look.purpose == "eval" and look.sets is not None):
        files = [
            (f"{source_key(place)}.{name}", getattr(source, name), source)
            for place, source in enumerate(data.sources)
            for name in READ.get(look.purpose, ("train", "held_out"))
        ] + files
    ids: dict[str, str] = {}
    for key, path, source in files:
        if path is not None and not (key == "data.train" and kind == "preferences"):
            yield from caught(_file_faults, look, key, path, source, ids)


def _file_faults(look: Look, key: str, path: str, source: Source, ids: dict[str, str]) -> Faults:
    """A file of problems: some of its rows, whether one fits, and whether ids of rows to train on are unique."""
    _check_file(key, path)
    judges = look.judges and look.reads("rewards", "reward_model")
    judging = tried(judging_of, look.config, source)[0] if judges else None  # what judges has its own check
    needs_answer, wants_row = (judging.needs_answer, judging.wants_row) if judging is not None else (False, False)
    try:
        rows, is_whole = sample_rows(path, needs_answer, keep_columns=wants_row, columns=source.columns)
    except DataError as error:
        yield from (naming(key, path, fault) for fault in error.faults)
        return
    trains = key.endswith(".train")
    for row in rows if trains else ():
        problem = identity(row.problem, row.messages)
        if row.id and ids.setdefault(row.id, problem) != problem:
            yield DataError(
                f"{key} ({path}): `id` must name one problem; found {row.id!r} for {ids[row.id][:60]!r} and "
                f"{problem[:60]!r}: change one, or remove the `id` fields"
            )
            break
    fits_engines = look.config.data.max_prompt_tokens <= longest_asked(look.config)  # else a rule of the configuration says so
    if look.renders and (trains or fits_engines):
        yield from caught(_length_faults, look, key, path, source, rows, is_whole, needs_answer)


def _length_faults(
    look: Look, key: str, path: str, source: Source, rows: list[Row], is_whole: bool, needs_answer: bool
) -> Faults:
    trained = key.endswith(".train")
    longest, limit = (look.config.data.max_prompt_tokens, TRAINED) if trained else (longest_asked(look.config), ASKED)
    form = prompt_form(look.config, source)

    def fits(row: Row) -> bool:
        try:
            return not isinstance(fit_prompt(look.tokenizer, row.problem, row.messages, form, longest), LeftOut)
        except DataError as error:
            raise DataError(f"{key} ({path}): {row.where.removeprefix(path).lstrip(', ')}: {error}") from error

    def others() -> list[Row]:
        return load_rows(path, needs_answer=needs_answer, columns=source.columns)

    if not any(map(fits, rows)) and (is_whole or not any(map(fits, others()))):
        yield DataError(
            f"{key} ({path}): at least one prompt must fit {limit}; found none of {longest} or fewer tokens: raise it, or name "
            f"other data"
        )
    if look.purpose == "sft" and key.endswith(".train"):
        told = [row for row in rows if fits(row) and stays_text(look.tokenizer, row.solution)]
        yield from _solution_faults(look, key, path, told, form)


def _solution_faults(look: Look, key: str, path: str, rows: list[Row], form: PromptForm) -> Faults:
    """The first row without a solution, and the first that is too long with it."""
    if lacking := next((row for row in rows if not row.solution), None):
        yield DataError(
            f"{key} ({path}): `solution` must not be empty for supervised training; found none for "
            f"{lacking.problem[:60]!r}: add it"
        )
    if not look.reads("trainer"):
        return
    limit = min(look.config.trainer.microbatch_tokens, look.shape.max_positions if look.shape else 1 << 62)
    for row in rows:
        prompt = fit_prompt(look.tokenizer, row.problem, row.messages, form, look.config.data.max_prompt_tokens)
        assert not isinstance(prompt, LeftOut), prompt
        num_tokens = len(prompt) + len(completion_tokens(look.tokenizer, row.solution))
        if num_tokens > limit:
            yield ConfigError(
                f"trainer.microbatch_tokens and the model's positions must hold every prompt with its solution; found "
                f"{num_tokens} tokens for {row.problem[:60]!r} of {path} and a limit of {limit}: raise "
                f"trainer.microbatch_tokens, or shorten or remove the row"
            )
            return


def _ledger_faults(look: Look, path: str) -> None:
    """The steps of rollouts on disk, and the first rows."""
    if Path(path).is_file() and Path(path).stat().st_size > LARGE_LEDGER_BYTES:
        return
    ledger = RolloutLedger(path)
    if look.reads("run"):
        ledger.check_steps(look.config.run.steps)
    ledger.rows(0)


def _pair_faults(path: str, columns: Columns | None) -> Faults:
    """The first pairs without their texts, among some."""
    faults: list[SemionError] = []
    found, is_whole = sampled(path, wanted_fields(PAIR_FIELDS, columns or {}))
    for where, record in found:
        faults += [record] if isinstance(record, DataError) else tried(pair_texts, where, record, columns)[1]
    yield from first_faults(path, faults, len(found), is_whole=is_whole)


def _check_file(key: str, path: str) -> None:
    """DataError for a file or folder that is not there, or that no data can be in."""
    if not path.startswith(HUB) and not Path(path).exists():
        fix = meant(path, key, "a dataset of the hub is named as hf://{}")
        raise DataError(f"{key} must be a file or a dataset's folder; found none at {path}: {fix}")
    try:
        check_source(path)
    except DataError as error:
        raise naming(key, path, error) from error
