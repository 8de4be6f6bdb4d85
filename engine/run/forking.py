"""A new run that starts from a checkpoint of another one with other options (`semion fork`): what may change, and the files it
begins with. The other run's directory is read and not touched; what is trained from there on is the loop's business, which
goes on from the checkpoint in the new directory as after any interruption.

    DIRECTORY/fork.json                     where it comes from: run, step, digest of the checkpoint, options and contents that
                                            differ
    DIRECTORY/config.toml                   the options of the new run
    DIRECTORY/checkpoints/step_00000040/    the checkpoint's files (hard links where the disk has them), under a new manifest
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config.load import CHECKED, RunConfig, dump_config, flat
from engine.config.options import AlgorithmOptions
from engine.core.errors import CheckpointError, ConfigError, SemionError, brief
from engine.core.files import atomic_write, locked, storing, sync
from engine.observe.origin import FORK, Origin
from engine.rewards.model import ASKED, READ
from engine.run.checkpoint import (
    AXES,
    LATEST,
    MANIFEST,
    POLICY,
    REFERENCE,
    STEPS,
    VERIFIER,
    ahead_of,
    data_digests,
    latest,
    manifest_digest,
    read_manifest,
    recall_schedule,
    reference_folder,
    sealed,
    trainer_of,
)

KEPT = {  # options that a fork has as the checkpoint: its weights and its optimizer's state have their form
    "model": ("path", "family", "dtype"),
    "trainer": ("fp8", "fp8_parameters"),
    "optimizer": ("implementation", "moment_dtype", "offload_share"),
}
# Of each section the options that decide neither what engines sample nor how it is judged; None: none of them does. An option
# that is not here does, so a new one is refused until somebody has said otherwise.
LATER: dict[str, set[str] | None] = {
    "run": {"directory", "steps", "restarts", "on_lost_node", "sinks"},
    "data": {"held_out"},
    "algorithm": {"loss", "entropy_weight", "reduction"},  # and what a loss adds to them, which it alone looks at
    "sync": None,  # versions say what of it counts
    # Done when a step is trained on (rollouts/truncation.py)
    "sampling": {"truncated", "overlong_buffer", "overlong_penalty"},
    "trainer": None,
    "optimizer": None,
    # Here and of the reward model: other batches round otherwise, and sample the same
    "inference": {
        *("engines", "placement", "tensor_parallel", "max_model_tokens", "max_concurrent", "kv_cache", "threads"),
        *("packed_weights", "timeout_seconds"),
    },
    "rewards": {"workers", "concurrency", "timeout_seconds"},
    "reward_model": {"kv_cache", "engines", "tensor_parallel", "timeout_seconds"},
    "checkpoint": None,
    "records": None,
    "evaluation": None,
    "guard": None,
    "cluster": None,
    "profile": None,
    "sft": None,
}
# Begin the names of options, and of contents, that decide how held-out answers score
JUDGING = ("data.", "evaluation.", "reward", "model.", ASKED, READ, VERIFIER)


@dataclass(frozen=True)
class Fork:
    """A fork that has been found possible."""

    checkpoint: Path
    manifest: Mapping[str, Any]  # of `checkpoint`
    config: RunConfig  # of the new run
    origin: Origin
    reference: Path | None  # the Hugging Face folder that the new run's reference begins as, in a folder of its own


def checkpoint_at(run: Path, step: int | None) -> Path:
    """The checkpoint of a run after so many steps, the newest where not said; CheckpointError names those that stand."""
    folder = run / "checkpoints"
    newest = latest(folder)
    if newest is None:
        raise CheckpointError(f"{run} must be the directory of a run with a checkpoint; found none: name another")
    if step is None:
        return newest
    found = folder / f"step_{step:08d}"
    if not (found / MANIFEST).exists():
        there = ", ".join(str(int(path.name.removeprefix("step_"))) for path in sorted(folder.glob(STEPS)))
        raise CheckpointError(f"--at must be the step of a checkpoint in {folder}; found {step}: there are {there}")
    return found


def fork_faults(checkpoint: Path, manifest: Mapping[str, Any], config: RunConfig) -> Iterator[SemionError]:
    """Why a run of `config` cannot begin with the checkpoint, but for what a look at the configuration alone tells."""
    step, saved, directory = int(manifest["step"]), manifest["config"], config.run_directory
    if (directory / "checkpoints" / LATEST).exists():  # a fork that was killed before it wrote this is made again
        yield ConfigError(f"run.directory must be new; found checkpoints in {directory}: name another one")
    for section, names in KEPT.items():
        for name in names:
            before, now = saved[section].get(name), getattr(getattr(config, section), name)
            if name in saved[section] and before != now:
                yield ConfigError(
                    f"{section}.{name} must be what {checkpoint} was written with, for a fork goes on with its weights and its "
                    f"optimizer's state; found {now!r} instead of {before!r}: set it back, or export its policy (semion "
                    f"export) and start a new run with that as model.path"
                )
    writer = trainer_of(manifest)
    if config.checkpoint.other_layout == "refuse":
        for name in sorted(AXES):
            before, now = getattr(writer, name), getattr(config.trainer, name)
            if before != now:
                yield ConfigError(
                    f"trainer.{name} must be what {checkpoint} was written with; found {now!r} instead of {before!r}: set it "
                    f"back, or add checkpoint.other_layout=allow, which is not bit for bit"
                )
    schedule = config.schedule
    if step >= config.run.steps:
        yield ConfigError(
            f"run.steps must be more than the {step} steps that {checkpoint} has done; found {config.run.steps}: raise it"
        )
    elif schedule.measures is not None:
        yield ConfigError(
            f"sync.sync_interval must be a number or 'never' in a fork, for 'auto' decides by all steps of its own run, from "
            f"the first; found 'auto' after {step} steps of another: set it to a number"
        )
    elif not schedule.resumable(step):
        yield ConfigError(
            f"a run can begin with {checkpoint} only where prompts are submitted after its {step} steps; found "
            f"{schedule.regime}, where the last such step is {schedule.last_resumable(step)}: name a checkpoint of such a step "
            f"with --at, or choose an interval that divides {step}"
        )
    else:
        wanted, ahead = schedule.in_flight(step), ahead_of(manifest)
        if not set(wanted) <= set(ahead):
            found = f"those of {ahead.start} to {ahead.stop - 1}" if ahead else "none"
            yield ConfigError(
                f"sync.lookahead = {config.sync.lookahead} asks for the rollouts of steps {wanted.start} to {wanted.stop - 1} "
                f"from weights before {checkpoint}; found {found} in it: set it to 0, or as that run had it"
            )
        elif wanted:
            yield from _faults_of_sampled(checkpoint, manifest, config, wanted)


def _faults_of_sampled(
    checkpoint: Path, manifest: Mapping[str, Any], config: RunConfig, wanted: range
) -> Iterator[SemionError]:
    """Why the rollouts of the steps `wanted`, which the checkpoint keeps, are not those of `config`."""
    saved = _saved(manifest)
    other = next((t for t in wanted if saved.schedule.versions(t) != config.schedule.versions(t)), None)
    if other is not None:
        yield ConfigError(
            f"sync.sync_interval, sync.lookahead and sync.in_flight must be what {checkpoint} was written with, for it keeps "
            f"rollouts of step {other}, of version {_named(saved.schedule.versions(other))}; found "
            f"{config.sync.sync_interval!r}, {config.sync.lookahead} and {str(config.sync.in_flight).lower()}, which ask for "
            f"version {_named(config.schedule.versions(other))}: set them back, or lookahead = 0 and in_flight = false"
        )
    kept = f"it keeps rollouts of steps {wanted.start} to {wanted.stop - 1}, sampled and judged before it"
    instead = "set sync.lookahead = 0 and sync.in_flight = false, for a run that samples all its steps itself"
    for name, (before, now) in sampled_otherwise(_options(saved), _options(config)).items():
        yield ConfigError(
            f"{name} must be what {checkpoint} was written with, for {kept}; found {brief(now)} instead of {brief(before)}: "
            f"set it back, or {instead}"
        )
    if saved.sampling.temperature == config.sampling.temperature and saved.log_prob_temperature != config.log_prob_temperature:
        yield ConfigError(
            f"algorithm.loss = {config.algorithm.loss!r} looks at log-probs of temperature {config.log_prob_temperature}, and "
            f"those that {checkpoint} keeps must be of it, for {kept}; found temperature {saved.log_prob_temperature}, as "
            f"{saved.algorithm.loss!r} asked for there: choose a loss that looks at these, or {instead}"
        )
    for name in _other_contents(manifest, config):
        yield ConfigError(
            f"{name} must be what {checkpoint} was written with, for {kept}; found other contents: put back what it was, or "
            f"{instead}"
        )


def _options(config: RunConfig) -> dict[str, Any]:
    """All options by their full names, as JSON has them."""
    return flat(json.loads(config.model_dump_json()))


def sampled_otherwise(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the options of two runs, by their full names, those that decide what a rollout holds or how it was judged and are not
    the same, with both values. What KEPT refuses is left to it. A source that only one of them has is one of these."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys((*there, *here)):
        section, _, option = name.partition(".")
        before, now = (None if value == [] else value for value in (there.get(name), here.get(name)))  # a list without sources
        if before == now or option in KEPT.get(section, ()) or not decides_rollouts(name):
            continue
        source = name[: name.find("].") + 1] if name.startswith("data.mix[") else ""
        if source and not (f"{source}.train" in there and f"{source}.train" in here):
            name, before, now = source, there.get(f"{source}.train"), here.get(f"{source}.train")
        found[name] = before, now
    return found


def decides_rollouts(name: str) -> bool:
    """Whether the option of that full name decides what a rollout holds or how it was judged."""
    section, _, option = name.partition(".")
    option = option.rpartition("].")[2].partition(".")[0]  # of a further source, or of a table of names
    if section == "algorithm" and option not in AlgorithmOptions.model_fields:
        return False
    later = LATER.get(section, set())
    return later is not None and option not in later


def _other_contents(manifest: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """What decides rollouts, is named as it was when the checkpoint was written, and has other contents now: data, a template,
    a reward, how the reward model is asked. What is not there at all the preflight tells."""
    try:
        found = other_contents(manifest, config)
    except SemionError:
        return
    for key in found:
        if decides_rollouts(key.partition(" ")[0]) or key == "sync.semantics":  # whose versions are told by its code
            yield key


def other_contents(manifest: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[str | None, str]]:
    """Of what a checkpoint records beside options, data and who judges, what has other contents in `config`, with both digests
    or versions. What only one of them has follows from their options."""
    before: Mapping[str, str | None] = manifest.get("data") or {}
    asked_then = {ASKED: None} if "reward_model.path" in before else {}  # and did not say how
    there = asked_then | dict(before)
    found = {}
    for key, digest in data_digests(config).items():
        if digest is not None and key in there and digest != there[key] and (there[key] is not None or key == ASKED):
            found[key] = there[key], digest
    return found


def _saved(manifest: Mapping[str, Any]) -> RunConfig:
    """The configuration that a checkpoint was written with, which kept the rules of its day."""
    return RunConfig.model_validate_json(json.dumps(manifest["config"]), context=CHECKED)


def _named(versions: Iterable[int]) -> str:
    return " or ".join(map(str, versions))


def planned(checkpoint: Path, config: RunConfig, *, needs_reference: bool) -> Fork:
    """What is to be made. `needs_reference`: whether the new run's loss looks at one. CheckpointError where the reference that
    it would go on with is not on disk, ConfigError where it cannot be kept."""
    manifest = read_manifest(checkpoint)
    place, folder = _reference(checkpoint, manifest, config) if needs_reference else (None, None)
    if place == "own" and config.sync.reference == "never" and config.schedule.never_syncs:
        raise ConfigError(
            f"sync.reference = 'never' must be the seed model in an offline run, whose engines sample from it; found "
            f"{checkpoint}, whose reference has moved: set sync.reference to a number of steps, or choose another checkpoint"
        )
    there, here = flat(manifest["config"]), _options(config)
    names = [name for name in (*there, *(name for name in here if name not in there)) if name != "run.directory"]
    changed = {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}
    for key, (before, now) in other_contents(manifest, config).items():
        if key not in changed:  # else its option tells
            what = f"{key} (contents)" if "." in key.partition(" ")[0] else key
            changed[what] = before and before[:12], now[:12]
    run = str(checkpoint.parent.parent)
    origin = Origin(run, int(manifest["step"]), manifest_digest(checkpoint), changed, place)
    return Fork(checkpoint, manifest, config, origin, folder)


def _reference(
    checkpoint: Path, manifest: Mapping[str, Any], config: RunConfig
) -> tuple[Literal["seed", "own"] | None, Path | None]:
    """What the reference begins as, and the folder that has it: as it was when the checkpoint's run trained its next step,
    unless the new run takes it from the policy there."""
    step, saved = int(manifest["step"]), _saved(manifest)
    recall_schedule(saved, manifest)
    if config.schedule.reference_due(step) and config.sync.reference_mix == 1:
        return None, None
    folder = reference_folder(checkpoint, manifest)
    if folder is not None:
        return "own", folder
    if saved.schedule.reference_due(step):
        return "own", checkpoint / POLICY
    if saved.schedule.reference_version(step) == 0:
        return "seed", None
    raise CheckpointError(
        f"{checkpoint} must hold the reference that the new loss compares with; found none, for the loss of its run looked at "
        f"none: choose --at or sync.reference so that the reference is taken from the policy there"
    )


def make(fork: Fork) -> None:
    """Writes the new run's directory; nobody else may be at work there. Killed on the way, it leaves a directory without a
    checkpoint, which another fork may fill. StorageError where it cannot be written."""
    directory, step = fork.config.run_directory, fork.origin.step
    with locked(directory), storing(directory):
        folder = directory / "checkpoints"
        staging, final = folder / f".staging-step_{step:08d}", folder / f"step_{step:08d}"
        for stale in (staging, final):
            shutil.rmtree(stale, ignore_errors=True)
        files = _files(fork)
        for name, (source, _) in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _placed(source, staging / name)
        manifest = dict(fork.manifest) | {
            "config": json.loads(fork.config.model_dump_json()),
            "data": data_digests(fork.config),
            "files": {name: known for name, (_, known) in sorted(files.items())},
            "reference": {"folder": REFERENCE} if fork.reference is not None else None,
            "records": _records(fork),
            "trainer": json.loads(trainer_of(fork.manifest).model_dump_json()),
            "fork": fork.origin.as_json(),
        }
        (staging / MANIFEST).write_text(json.dumps(sealed(manifest), indent=1), encoding="utf-8")
        for path in (staging / MANIFEST, *(path for path in staging.iterdir() if path.is_dir()), staging):
            sync(path)
        with atomic_write(directory / FORK, durable=True) as part:
            part.write_text(json.dumps(fork.origin.as_json(), indent=1), encoding="utf-8")
        with atomic_write(directory / "config.toml", durable=True) as part:
            part.write_text(dump_config(fork.config), encoding="utf-8")
        staging.rename(final)
        sync(folder)
        with atomic_write(folder / LATEST, durable=True) as part:
            part.write_text(final.name, encoding="utf-8")


def _files(fork: Fork) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """Every file of the new checkpoint but its manifest: where it is now, and what is known of it. CheckpointError for one that
    is not there in its size; their digests are compared when the run goes on, by all ranks together."""
    checkpoint, known = fork.checkpoint, fork.manifest["files"]
    found = {name: (checkpoint / name, known[name]) for name in known if not name.startswith(f"{REFERENCE}/")}
    if fork.reference is not None:
        holder, folder = fork.reference.parent, fork.reference.name
        of_holder = known if holder == checkpoint else read_manifest(holder)["files"]
        for name in of_holder:
            if name.startswith(f"{folder}/"):
                found[f"{REFERENCE}/{name.removeprefix(f'{folder}/')}"] = (holder / name, of_holder[name])
    for source, record in found.values():
        size = source.stat().st_size if source.exists() else "none"
        if size != record["bytes"]:
            raise CheckpointError(f"{source} must have {record['bytes']} bytes; found {size}: use another checkpoint")
    return found


def _placed(source: Path, target: Path) -> None:
    """The file's bytes under another name: no copy of them where the disk is the same. Nobody writes into a file of a
    checkpoint that has a name."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
        sync(target)


def _records(fork: Fork) -> dict[str, Any] | None:
    """What the new run's records begin as: empty, under the guard's state, and with what held-out sets were judged before where
    they are judged in the same way."""
    kept = fork.manifest.get("records")
    if kept is None:
        return None
    judges_alike = not any(name.startswith(JUDGING) for name in fork.origin.changed)
    return dict(kept) | {
        "rollouts": None,
        "bytes": dict.fromkeys(kept["bytes"], 0),
        "judged": kept["judged"] if judges_alike else [],
    }
