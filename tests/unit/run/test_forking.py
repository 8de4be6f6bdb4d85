"""A fork begins with the very bits of another run's checkpoint under other options, says where it comes from wherever the run
is told of, leaves the other run alone, and is refused where its options make no sense of those bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import cli
from engine.config.load import RunConfig, dump_config, load_config
from engine.core.jsonl import JsonlLedger
from engine.models.hf import HfCheckpoint
from engine.observe.origin import read_origin
from engine.observe.reading import read_run
from engine.observe.regime import prove
from engine.rewards.model import ASKED, READ
from engine.run.card import complete
from engine.run.checkpoint import data_digests, export, latest, manifest_digest, read_manifest, reference_place
from engine.run.forking import LATER, _reference, decides_rollouts, fork_faults, other_contents, sampled_otherwise
from engine.run.records import Records
from tests.builders import config, make_model
from tests.checkpoints import open_folder, snapshot_of
from tests.unit.run.test_records import rollouts_of

ROW = {"problem": "1+1", "answer": "2", "solution": "It is 2."}
SYNC = {"sync_interval": 2, "reference": 6}
JUDGED = {"step": 0, "set": "held_out", "mean": 0.25, "measure": "accuracy", "standard_error": 0.0, "truncated": 0.0}
JUDGED |= {"num_problems": 1, "num_seeds": 2, "completion_tokens_mean": 9.0}
STATE = {"0.exp_avg": torch.arange(6.0), "schedule.step": torch.tensor(8)}


@pytest.fixture
def source(tmp_path: Path, tiny_tokenizer: Any) -> RunConfig:
    """A run of eight steps with checkpoints after 4, 6 and 8, of which the last needs the sixth for its reference."""
    make_model(tmp_path / "model", tiny_tokenizer)
    for name in ("train", "held_out", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW | {"problem": name}) + "\n")
    data = {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held_out.jsonl"), "max_prompt_tokens": 512}
    made = config(
        tmp_path / "a",
        model={"path": str(tmp_path / "model")},
        data=data,
        run={"steps": 8},
        sync=SYNC,
        checkpoint={"every": 2, "keep": 3},
        trainer={"layers": "local", "fuse_gradient_accumulation": False},  # as a resolved run has it
    )
    checkpoints = open_folder(made.run_directory / "checkpoints", digests=data_digests(made))
    records = Records.open(made, 0, None)
    records.judge(JUDGED, [])
    for step in range(8):
        records.metrics.write({"step": step})
        records.rollouts.append(step, [rollouts_of(step, version=step - step % 2)])
    for step in (4, 6, 8):
        weights = HfCheckpoint(made.model.path)
        tensors = {name: torch.full_like(weights.tensor(name), float(step)) for name in weights.files}
        place = reference_place(made, step)
        about = {"reference_step": place} if isinstance(place, int) else {"needs_seed": place == "seed"}
        checkpoints.commit(step, snapshot_of(STATE, tensors.items(), **about), made, records.kept({step}))
        checkpoints.wait()
    records.close()
    return made


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fork(source: RunConfig, *arguments: str, expect: int = 0) -> Path:
    directory = source.run_directory.with_name("b")
    before = listing(source.run_directory)
    assert cli.main(["fork", str(source.run_directory), f"run.directory={directory}", *arguments]) == expect
    assert listing(source.run_directory) == before, "the other run is not touched"
    return directory


def loaded(directory: Path) -> tuple[RunConfig, Any]:
    made = load_config(directory / "config.toml")
    return made, open_folder(directory / "checkpoints").load(made)


def test_a_fork_begins_with_the_bits_of_the_newest_checkpoint(source: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    directory = fork(source, "run.steps=20", "algorithm.beta=0.5", "optimizer.learning_rate=1e-5")
    made, saved = loaded(directory)
    assert (saved.step, made.algorithm.beta, made.run.steps) == (8, 0.5, 20)  # type: ignore[attr-defined]
    assert saved.state.keys() == STATE.keys()
    assert all(torch.equal(saved.state[name], value) for name, value in STATE.items())
    there = source.run_directory / "checkpoints" / "step_00000008"
    theirs = HfCheckpoint(there / "policy")
    assert all(torch.equal(saved.policy.tensor(name), theirs.tensor(name)) for name in theirs.files)
    assert saved.reference is not None and float(saved.reference.tensor("model.norm.weight")[0]) == 6.0
    origin = read_origin(directory)
    assert origin is not None
    assert (origin.run, origin.step, origin.checkpoint) == (str(source.run_directory), 8, manifest_digest(there))
    assert origin.changed == {"run.steps": (8, 20), "algorithm.beta": (0.1, 0.5), "optimizer.learning_rate": (1e-6, 1e-5)}
    said = capsys.readouterr().out
    assert "after 8 steps" in said and "algorithm.beta 0.1 -> 0.5" in said
    assert f"semion train {directory}/config.toml --resume auto" in said
    assert cli.main(["check", str(directory / "config.toml"), "--resume", "auto"]) == 0


@pytest.mark.parametrize(
    ("file", "what", "judged"),
    [
        ("train.jsonl", "data.train (contents)", []),
        ("held_out.jsonl", "data.held_out (contents)", []),
        (None, "the version of the verifier", []),
        ("other.jsonl", None, [JUDGED]),
    ],
)
def test_other_contents_are_recorded_and_old_accuracies_not_put_beside_new_ones(
    source: RunConfig, monkeypatch: pytest.MonkeyPatch, file: str | None, what: str | None, judged: list[Any]
) -> None:
    """Of what has the same name in both runs: data, and who judges."""
    if file is None:
        monkeypatch.setattr("engine.rewards.math.reward.VERIFIER_VERSION", "next")
    else:
        (source.run_directory.parent / file).write_text(json.dumps(ROW | {"problem": "changed"}) + "\n")
    before = read_manifest(source.run_directory / "checkpoints" / "step_00000008")["data"]
    directory = fork(source, "run.steps=20")
    made, saved = loaded(directory)
    origin = read_origin(directory)
    assert origin is not None and set(origin.changed) == {"run.steps", *([] if what is None else [what])}
    if what is not None:
        key = what.removesuffix(" (contents)")
        assert origin.changed[what] == tuple(str(digests[key])[:12] for digests in (before, data_digests(made)))
        assert what in origin.differences()
    records = Records.open(made, saved.step, open_folder(directory / "checkpoints").records())
    assert records.judged == judged
    records.close()


def test_its_records_begin_with_it_and_every_checkpoint_says_where_it_comes_from(source: RunConfig, tmp_path: Path) -> None:
    directory = fork(source, "run.steps=20", "--at", "6")
    made, saved = loaded(directory)
    checkpoints = open_folder(directory / "checkpoints")
    records = Records.open(made, saved.step, checkpoints.records())
    assert records.notes == [] and records.judged == [JUDGED]
    for step in (6, 7):
        records.metrics.write({"step": step, "staleness": step - 6, **({"sync_seconds": 1.0} if step == 6 else {})})
        records.rollouts.append(step, [rollouts_of(step, version=6)])
    weights = {name: saved.policy.tensor(name) for name in saved.policy.files}
    assert reference_place(made, 8, checkpoints.origin) == 6, "its first checkpoint holds the policy of step 6"
    checkpoints.commit(8, snapshot_of(STATE, weights.items(), reference_step=6), made, records.kept({8}))
    checkpoints.wait()
    records.close()
    newest = latest(directory / "checkpoints")
    assert newest is not None and read_manifest(newest)["fork"]["step"] == 6
    assert float(open_folder(directory / "checkpoints").load(made).reference.tensor("model.norm.weight")[0]) == 6.0  # type: ignore[union-attr]
    run = read_run(directory, "b", made.schedule)
    assert run.proof is not None and run.proof.holds, run.proof
    assert not prove(directory, made.schedule).holds, "its first step is not 0"
    facts = dict(run.facts)
    assert "after 6 steps" in facts["forked from"] and "run.steps 8 -> 20" in facts["changed from it"]
    assert run.document()["fork"]["step"] == 6
    complete(export(newest, tmp_path / "out"), newest)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| forked from | `a` after 6 steps, checkpoint `" in card and "run.steps 8 -> 20" in card


@pytest.mark.parametrize(
    ("changes", "at", "place", "value"),
    [
        (["sync.reference=6"], "4", "seed", None),
        (["sync.reference=6"], "6", None, None),  # copied before its first step
        (["sync.reference=6"], "8", "own", 6.0),  # of another checkpoint, which the fork has not
        (["sync.reference=never"], "6", "own", 6.0),  # the other run copied it there
        (["sync.reference=follow"], "8", None, None),
    ],
)
def test_the_reference_is_what_it_was_until_it_is_next_copied(
    source: RunConfig, changes: list[str], at: str, place: str | None, value: float | None
) -> None:
    directory = fork(source, "run.steps=40", *changes, "--at", at)
    made, saved = loaded(directory)
    origin = read_origin(directory)
    assert origin is not None and origin.reference == place
    assert (None if saved.reference is None else float(saved.reference.tensor("model.norm.weight")[0])) == value
    step = int(at) + 2 if place is not None and not made.schedule.reference_due(int(at) + 2) else None
    if step is not None:
        assert reference_place(made, step, origin) == place, "and later checkpoints hold it too"
    assert reference_place(made, 38, origin) in (36, None, place)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["model.dtype=bfloat16", "run.steps=20"], 2, "model.dtype must be what"),
        (["optimizer.moment_dtype=bfloat16", "optimizer.implementation=te", "run.steps=20"], 2, "optimizer.moment_dtype must"),
        (["trainer.data_parallel=2", "run.steps=20"], 2, "trainer.data_parallel must be what"),
        (["run.steps=8"], 2, "run.steps must be more than the 8 steps"),
        (["sync.sync_interval=3", "checkpoint.every=3", "run.steps=20"], 2, "prompts are submitted after its 8 steps"),
        (["sync.lookahead=1", "run.steps=20"], 2, "sync.lookahead = 1 asks for the rollouts of steps 8 to 9 "),
        (["run.steps=20", "--at", "5"], 4, "--at must be the step of a checkpoint in"),
        (["run.steps=20", "algorithm.gamma=1"], 2, "algorithm.gamma is not an option"),
        (["run.steps=20", "data.train=gone.jsonl"], 3, "data.train must be a file"),
        (["run.steps=20", "sync.reference=never", "sync.sync_interval=never", "evaluation.every=1"], 2, "has moved"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    source: RunConfig, capsys: pytest.CaptureFixture[str], changes: list[str], code: int, words: str
) -> None:
    directory = fork(source, *changes, expect=code)
    assert words in capsys.readouterr().err
    assert not directory.exists()


IN_FLIGHT = {"sync_interval": 2, "lookahead": 2, "in_flight": True}


@pytest.mark.parametrize(
    ("sync", "sampling", "words"),
    [
        (IN_FLIGHT, {}, []),
        (IN_FLIGHT | {"lookahead": 0, "in_flight": False}, {"top_p": 0.5}, []),
        (
            IN_FLIGHT,
            {"top_p": 0.5},
            ["sampling.top_p must be what run was written with, for it keeps rollouts of steps 4 to 7, sampled and judged"],
        ),
        (
            IN_FLIGHT | {"in_flight": False},
            {},
            ["step 4, of version 0 or 2; found 2, 2 and false, which ask for version 0: set them back, or lookahead = 0"],
        ),
        (
            IN_FLIGHT | {"lookahead": 1, "in_flight": False},
            {},
            ["step 4, of version 0 or 2; found 2, 1 and false, which ask for version 2"],
        ),
    ],
)
def test_rollouts_that_a_checkpoint_keeps_are_gone_on_with_as_they_were_begun(
    tmp_path: Path, sync: dict[str, Any], sampling: dict[str, Any], words: list[str]
) -> None:
    """After 4 steps of a run with updates in flight: those of steps 4 and 5 are complete, those of 6 and 7 paused."""
    saved = config(tmp_path / "a", run={"steps": 12}, sync=IN_FLIGHT)
    assert (saved.schedule.completes(4), saved.schedule.in_flight(4)) == (range(4, 6), range(4, 8))
    manifest = {"step": 4, "config": json.loads(saved.model_dump_json()), "ahead": [4, 8], "paused_from": 6}
    made = config(tmp_path / "b", run={"steps": 12}, sync=sync, sampling=sampling)
    found = [str(fault) for fault in fork_faults(Path("run"), manifest, made)]
    assert len(found) == len(words)
    assert all(said in fault for said, fault in zip(words, found, strict=True))


AHEAD = {"sync_interval": 2, "lookahead": 1}
GRPO = {"loss": "grpo"}


def faults_ahead(folder: Path, saved: dict[str, Any], made: dict[str, Any], **manifest: Any) -> list[str]:
    """What is said of a fork after 4 steps of a run whose checkpoint keeps the rollouts of steps 4 and 5."""
    least: dict[str, Any] = {"run": {"steps": 12}, "sync": AHEAD, "algorithm": GRPO}
    before, now = config(folder / "a", **(least | saved)), config(folder / "b", **(least | made))
    kept = {"step": 4, "config": json.loads(before.model_dump_json()), "ahead": [4, 6]} | manifest
    return [str(fault) for fault in fork_faults(Path("run"), kept, now)]


@pytest.mark.parametrize(
    ("saved", "made", "words"),
    [
        (
            {},
            {"sampling": {"temperature": 0.5}},
            ["sampling.temperature must be", "found 0.5 instead of 1.0: set it back, or set"],
        ),
        ({}, {"sampling": {"max_tokens": 16}}, ["sampling.max_tokens must be", "found 16 instead of 8"]),
        ({}, {"run": {"steps": 12, "seed": 7}}, ["run.seed must be", "found 7 instead of 0"]),
        ({}, {"model": {"head": "float32"}}, ["model.head must be", "found 'float32' instead of 'model'"]),
        ({}, {"rewards": {"unevaluated": "refuse"}}, ["rewards.unevaluated must be", "found 'refuse' instead of 'accept'"]),
        ({}, {"data": {"reward": "a.py:f"}}, ["data.reward must be", "found 'a.py:f' instead of 'math'"]),
        ({}, {"data": {"train": "other"}}, ["data.train must be", "found 'other' instead of 'unused'"]),
        ({}, {"data": {"prompts_per_step": 8}}, ["data.prompts_per_step must be"]),
        ({}, {"data": {"mix": [{"train": "b", "held_out": "c"}]}}, ["data.mix[0] must be", "found 'b' instead of None"]),
        ({"data": {"mix": [{"train": "b"}]}}, {}, ["data.mix[0] must be", "found None instead of 'b'"]),
        (
            {"data": {"mix": [{"train": "b"}]}},
            {"data": {"mix": [{"train": "b", "system": "x", "held_out": "c"}]}},
            ["data.mix[0].system must be", "found 'x' instead of ''"],
        ),
        ({}, {"algorithm": GRPO | {"samples_per_prompt": 4}}, ["algorithm.samples_per_prompt must be"]),
        (
            {},
            {"inference": {"vllm": {"kv_cache_dtype": "fp8"}}},
            ["inference.vllm.kv_cache_dtype must", "'fp8' instead of None"],
        ),
        (
            {"algorithm": {"loss": "dpo"}, "sampling": {"temperature": 0.7}},
            {"sampling": {"temperature": 0.7}},
            ["algorithm.loss = 'grpo' looks at log-probs of temperature 0.7", "found temperature 1.0, as 'dpo' asked for"],
        ),
    ],
)
def test_what_decided_the_rollouts_that_a_checkpoint_keeps_stays_as_it_was(
    tmp_path: Path, saved: dict[str, Any], made: dict[str, Any], words: list[str]
) -> None:
    (found,) = faults_ahead(tmp_path, saved, made)
    assert all(said in found for said in [*words, "for it keeps rollouts of steps 4 to 5", "set sync.lookahead = 0"])
    assert faults_ahead(tmp_path, saved, made | {"sync": {"sync_interval": 2}}) == [], "nothing that was kept is trained on"


@pytest.mark.parametrize(
    "made",
    [
        {"sampling": {"truncated": "wrong", "overlong_buffer": 4}},  # of a step when it is trained on, whoever sampled it
        {"algorithm": GRPO | {"kl_weight": 0.0, "clip_ratio_high": 0.3}},
        {"algorithm": {"loss": "cispo"}},
        {"algorithm": {"loss": "dpo"}},  # at temperature 1 both look at the same log-probs
        {"inference": {"engines": 2}, "optimizer": {"learning_rate": 1e-5}},
    ],
)
def test_what_is_done_with_kept_rollouts_later_may_change(tmp_path: Path, made: dict[str, Any]) -> None:
    assert faults_ahead(tmp_path, {}, made) == []


DECIDE = [
    "run.seed",
    "model.path",
    "model.family",
    "model.dtype",
    "model.head",
    "data.train",
    "data.template",
    "data.system",
    "data.columns",
    "data.reward",
    "data.reward_weights",
    "data.reward_combine",
    "data.prompts_per_step",
    "data.spare_prompts",
    "data.mix",
    "data.max_prompt_tokens",
    "data.chat_template",
    "data.replay",
    "algorithm.samples_per_prompt",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.min_p",
    "sampling.stop",
    "sampling.max_tokens",
    "inference.quantization",
    "inference.vllm",
    "rewards.unevaluated",
    "rewards.function",
    "rewards.weights",
    "rewards.environment",
    "rewards.deadline_seconds",
    "rewards.memory_mebibytes",
    "reward_model.path",
    "reward_model.dtype",
    "reward_model.max_tokens",
]


def test_every_option_either_decides_rollouts_or_is_known_not_to() -> None:
    """An option that is new is on neither list, and is refused until it has been put on one of them."""
    reviewed = [line.partition(":")[0] for line in (Path(__file__).parents[1] / "config/options.txt").read_text().splitlines()]
    assert [name for name in reviewed if decides_rollouts(name)] == DECIDE
    assert decides_rollouts("sampling.new") and decides_rollouts("inference.new") and decides_rollouts("new_section.new")
    assert decides_rollouts("data.mix[3].columns.problem") and not decides_rollouts("data.mix[3].held_out")
    for section, names in LATER.items():
        known = {name.partition(".")[2] for name in reviewed if name.startswith(f"{section}.")}
        assert known and (names or set()) <= known, section
    there = dict.fromkeys(reviewed, 0)
    for name in reviewed:
        found = sampled_otherwise(there, there | {name: 1})
        form = name in ("model.path", "model.family", "model.dtype")  # which a fork cannot change with anything kept or not
        assert found == ({name: (0, 1)} if name in DECIDE and not form else {}), name


def test_data_and_rewards_of_other_contents_are_refused_where_rollouts_are_kept(tmp_path: Path) -> None:
    """As data.train, or the code of a reward, that somebody wrote over since."""
    train, reward = tmp_path / "train.jsonl", tmp_path / "mine.py"
    train.write_text(json.dumps(ROW) + "\n")
    reward.write_text("def right(completion, answer):\n    return 1.0\n")
    options = {"data": {"train": str(train), "held_out": str(train), "reward": f"{reward}:right"}}
    digests = data_digests(config(tmp_path / "a", **options))
    assert faults_ahead(tmp_path, options, options, data=digests) == []
    for changed in ("data.train", f"data.reward {reward}:right"):
        (found,) = faults_ahead(tmp_path, options, options, data=digests | {changed: "0"})
        assert found.startswith(f"{changed} must be what run was written with") and "found other contents" in found
    assert faults_ahead(tmp_path, options, options, data=digests | {"data.held_out": "0"}) == []


def test_a_run_that_decides_its_intervals_is_forked_into_one_of_fixed_ones(tmp_path: Path) -> None:
    """Not the other way round, for it decides by all steps of its own run. The reference that follows is where its last sync
    was, as the checkpoint says."""
    saved = config(tmp_path / "a", run={"steps": 12}, sync={"sync_interval": "auto", "auto_bound": 0.05, "reference": "follow"})
    for step in range(7):
        saved.schedule.observe(step, 0.0)
    manifest = {
        "step": 7,
        "config": json.loads(saved.model_dump_json()),
        "records": {"schedule": saved.schedule.state()},
        "files": {},
    }
    own = config(tmp_path / "b", run={"steps": 12}, sync={"sync_interval": "auto", "auto_bound": 0.05})
    found = [str(fault) for fault in fork_faults(Path("run"), manifest, own)]
    assert len(found) == 1 and "sync.sync_interval must be a number or 'never' in a fork" in found[0]
    made = config(tmp_path / "b", run={"steps": 12}, sync={"sync_interval": 1})
    assert list(fork_faults(Path("run"), manifest, made)) == []
    assert _reference(tmp_path / "step", manifest, made) == ("own", tmp_path / "step" / "policy"), "it was to be copied there"


def test_another_model_or_no_new_directory_is_refused(
    source: RunConfig, tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "wider", tiny_tokenizer)
    fork(source, f"model.path={tmp_path / 'wider'}", "run.steps=20", expect=2)
    assert "model.path must be what" in capsys.readouterr().err
    assert cli.main(["fork", str(source.run_directory), "run.steps=20"]) == 2
    assert "add run.directory=FOLDER" in capsys.readouterr().err
    assert cli.main(["fork", str(source.run_directory), f"run.directory={source.run_directory}", "run.steps=20"]) == 2
    assert "run.directory must be new" in capsys.readouterr().err
    fork(source, "run.steps=20")
    fork(source, "run.steps=20", expect=2)
    assert "run.directory must be new; found checkpoints" in capsys.readouterr().err
    assert cli.main(["fork", str(tmp_path), "run.directory=x"]) == 2
    assert "RUN must be the directory of a run" in capsys.readouterr().err


def test_another_layout_is_read_by_those_of_the_ranks_that_wrote_it(source: RunConfig) -> None:
    directory = fork(source, "run.steps=20", "trainer.data_parallel=2", "checkpoint.other_layout=allow")
    made, saved = loaded(directory)
    assert (made.trainer.data_parallel, saved.trainer.data_parallel, saved.state) == (2, 1, None)
    assert saved.open_rank(0).get_tensor("schedule.step") == 8
    assert dump_config(made) == (directory / "config.toml").read_text()


def test_a_fork_that_was_killed_on_the_way_is_made_again(source: RunConfig) -> None:
    directory = fork(source, "run.steps=20")
    (directory / "checkpoints" / "LATEST").unlink()
    fork(source, "run.steps=30")
    assert loaded(directory)[0].run.steps == 30
    ledger = JsonlLedger(directory / "metrics.jsonl")
    ledger.append([{"step": 8}])
    ledger.close()
    (directory / "checkpoints" / "LATEST").unlink()
    fork(source, "run.steps=20", expect=2)  # there are steps on record


def test_how_the_reward_model_was_asked_is_asked_too(tmp_path: Path) -> None:
    """Of kept rollouts; and where nothing is kept, it is told. A checkpoint that says nothing of it is of one that asked
    otherwise, but of how the files read, which was looked at later, nothing is known then."""
    (folder := tmp_path / "judge").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("aaa")
    options: dict[str, Any] = {"data": {"reward": "model"}, "reward_model": {"path": str(folder)}}
    least: dict[str, Any] = {"run": {"steps": 12}, "sync": AHEAD, "algorithm": GRPO}
    made = config(tmp_path / "c", **(least | options))
    digests = data_digests(made)
    assert faults_ahead(tmp_path, options, options, data=digests) == []
    for known, found in (
        ({name: digest for name, digest in digests.items() if name != ASKED}, [ASKED]),
        (digests | {ASKED: "1"}, [ASKED]),
        ({name: digest for name, digest in digests.items() if name != READ}, []),
        (digests | {"reward_model.path": "0"}, ["reward_model.path"]),
    ):
        assert list(other_contents({"data": known}, made)) == found
        faults = faults_ahead(tmp_path, options, options, data=known)
        assert [fault.partition(" must be what run was written with")[0] for fault in faults] == found
    (folder / "chat_template.jinja").write_text("bbb")  # as long as it was
    assert list(other_contents({"data": digests}, made)) == [READ]
    assert [fault.partition(" must be")[0] for fault in faults_ahead(tmp_path, options, options, data=digests)] == [READ]
    assert other_contents({"data": {}}, made) == {}, "another reward, which an option tells"
