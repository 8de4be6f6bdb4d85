"""Offline training from disk: a ledger gives the steps of the live run that wrote it, bit for bit; a preference file gives
pairs without rollout log-probs; and each sentence about a file that does not fit. The engines of the live run are fakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.registry import make_loss
from engine.config import options
from engine.config.load import RunConfig
from engine.core.arrays import TokenIds
from engine.core.errors import ConfigError, DataError
from engine.core.segment_writer import SegmentWriter
from engine.core.segments import segments_of
from engine.core.types import Rollout, RolloutGroup, Score, Status
from engine.data.mixture import Mixture
from engine.data.preferences import load_preferences
from engine.data.prompts import PromptOrder
from engine.data.templates import encode_prompt
from engine.inference.pool import Pool
from engine.rewards.base import Answer
from engine.rollouts.base import StepData
from engine.rollouts.ledger import RolloutLedger
from engine.rollouts.replay import LedgerSource, SupervisedSource, open_preferences, replay_kind
from engine.rollouts.source import RolloutSource
from engine.rollouts.writer import RolloutFile, RolloutFolder, RolloutWriter
from tests.builders import algorithm_options
from tests.rollouts import make_completion
from tests.unit.algorithms.steps import Step
from tests.unit.data.test_mixture import prompt_set, write
from tests.unit.inference.test_pool import FakeEngine
from tests.unit.rollouts.test_rollouts import Parity, group, run_config

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
STATUSES = st.sampled_from(get_args(Status))
# What a replay cannot know, or takes otherwise
OF_SAMPLING = ("wait_seconds", "reward_seconds", "generation_tokens", "generation_seconds")
STEPS = 4
VOCAB_SIZE = 2**31  # a fake engine's only token is of its seed


def offline(path: Path, **changes: dict[str, Any]) -> tuple[RunConfig, Mixture]:
    """Two sources, the first with spare prompts; the run replays `path`, or writes it."""
    data = {"prompts_per_step": 3, "spare_prompts": 2, "replay": str(path), "mix": ({"train": "b", "prompts_per_step": 2},)}
    base: dict[str, Any] = {"run": {"steps": STEPS}, "data": data, "sync": {"sync_interval": "never"}}
    config = run_config(**base | changes)
    return config, Mixture(config.data.sources, (prompt_set("a", 8), prompt_set("b", 5)), config.run.seed)


class Failing(Parity):
    """Parity, but some answers cannot be judged, each status in its turn."""

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        why: dict[int, Status] = {0: "too_long", 1: "invalid", 2: "timeout"}
        scores = super().score(answers)
        kinds = [int(answer.completion) % 8 for answer in answers]
        return [Score(0.0, why[kind]) if kind in why else score for kind, score in zip(kinds, scores, strict=True)]


def live(path: Path, reward: Parity | None = None, **changes: dict[str, Any]) -> list[StepData]:
    config, prompts = offline(path, **changes)
    records = RolloutWriter(RolloutFile(path) if path.suffix else RolloutFolder(path, config.records))
    source = RolloutSource(config, prompts, Pool([FakeEngine(), FakeEngine()], 5.0), reward or Parity(), records)
    source.open(range(STEPS))
    steps = [source.next(step) for step in range(STEPS)]
    source.close()
    records.close()
    return steps


def known(data: StepData) -> StepData:
    """What a replay must repeat of a step."""
    return StepData(data.sequences, data.num_prompts, {k: v for k, v in data.metrics.items() if k not in OF_SAMPLING})


@pytest.mark.parametrize("form", ["rollouts.jsonl", "rollouts", "rollouts of one step a segment"])
@pytest.mark.parametrize(
    "algorithm",
    [{}, {"pairing": "best_worst"}, {"loss": "grpo"}, {"loss": "group_dpo", "alpha": 0.1, "kl_weight": 0.0}],
)
def test_a_replayed_ledger_is_the_live_run_bit_for_bit(tmp_path, monkeypatch, algorithm, form):
    path = tmp_path / form
    if "segment" in form:
        monkeypatch.setattr("engine.rollouts.writer.SegmentWriter", partial(SegmentWriter, segment_bytes=1))
    wanted = live(path, Failing(), algorithm=algorithm)
    config, prompts = offline(path, algorithm=algorithm)
    source = LedgerSource(config, RolloutLedger(path), prompts, VOCAB_SIZE)
    for step in (2, 0, 3, 1):  # a resumed run starts anywhere
        replayed = source.next(step)
        assert known(replayed) == known(wanted[step])
        assert replayed.metrics["wait_seconds"] >= 0 and "generation_tokens" not in replayed.metrics
    assert sum(len(data.sequences) for data in wanted) > 0
    assert all(wanted[0].metrics[name] > 0 for name in ("reward_too_long", "reward_failures", "reward_timeouts"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-(2.0**99), 0, width=32), min_size=1, max_size=6), st.floats(-1e300, 1e300), TEXTS, STATUSES)
def test_any_rollout_survives_the_ledger(tmp_path_factory, log_probs, reward, text, status):
    tokens = tuple(range(len(log_probs)))
    completion = make_completion("p0", 0, 2**62 + 1, 0, tokens, tuple(log_probs), text, "stop")
    made = RolloutGroup(group([1]).prompt, 0, (Rollout(completion, Score(reward, status)),))
    folder = tmp_path_factory.mktemp("any")
    for records in (RolloutFile(folder / "ledger.jsonl"), RolloutFolder(folder / "rollouts", options.RolloutRecords())):
        records.append(0, [made])
        records.close()
    for path in (folder / "ledger.jsonl", folder / "rollouts"):
        assert [row.rollout() for row in RolloutLedger(path).rows(0)] == list(made.rollouts)


def test_a_ledger_is_read_a_step_at_a_time(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    live(path)
    lines = path.read_bytes().splitlines(keepends=True)
    spoiled = [line if line.startswith(b'{"step": 2,') else line[: len(b'{"step": 0, ')] + b"x\n" for line in lines]
    path.write_bytes(b"".join(spoiled) + b'{"step": 9')  # torn by a kill
    ledger = RolloutLedger(path)
    assert (list(ledger.steps), 9 in ledger) == ([0, 1, 2, 3], False)
    assert len(ledger.rows(2)) == 7 * 6
    with pytest.raises(DataError, match=r"line 1: must be one JSON object"):
        ledger.rows(0)


def test_of_a_folder_one_segment_is_read_for_a_step_and_a_gap_is_seen_by_names(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.rollouts.writer.SegmentWriter", partial(SegmentWriter, segment_bytes=1))
    path = tmp_path / "rollouts"
    live(path)
    there = segments_of(path)
    assert len(there) == STEPS and there[2].is_packed
    there[0].rows.write_bytes(b"spoiled")
    ledger = RolloutLedger(path)
    assert (list(ledger.steps), 9 in ledger, 2 in ledger) == ([0, 1, 2, 3], False, True)
    assert len(ledger.rows(2)) == 7 * 6
    with pytest.raises(DataError, match=r"00000000\.jsonl\.zst: must be packed rows"):
        ledger.rows(0)
    there[1].rows.unlink()
    with pytest.raises(DataError, match=r"must hold every step below run\.steps = 4; found no step 1"):
        RolloutLedger(path).check_steps(STEPS)


@pytest.mark.parametrize(("name", "column"), [("tokens", "token_ids"), ("log_probs", "log_probs")])
def test_rollouts_without_what_a_replay_needs_are_refused_by_the_option_and_can_be_read(tmp_path, name, column):
    path = tmp_path / "rollouts"
    live(path, records={"rollouts": tuple({"tokens", "log_probs"} - {name})})
    config, prompts = offline(path)
    assert replay_kind(config) == "rollouts"
    with pytest.raises(DataError, match=rf"`{column}` must be on record, .* sample with '{name}' in records\.rollouts"):
        LedgerSource(config, RolloutLedger(path), prompts, VOCAB_SIZE).next(0)
    assert {(row.num_tokens, row.text) for row in RolloutLedger(path).read(0)} == {(1, None)}


def test_rollouts_of_which_columns_are_missing_are_refused(tmp_path):
    path = tmp_path / "rollouts"
    live(path)
    config, prompts = offline(path)
    columns = path / "00000000.arrows"
    data = columns.read_bytes()
    for kept, words in ((len(data) - 9, "must hold the tokens of step 3; found none"), (0, "step 3; found none")):
        columns.write_bytes(data[:kept])
        with pytest.raises(DataError, match=words):
            LedgerSource(config, RolloutLedger(path), prompts, VOCAB_SIZE).next(3)
    with pytest.raises(DataError, match=r"found the folder of a whole run, .*: name .*rollouts"):
        replay_kind(offline(tmp_path)[0])


def test_rollouts_of_another_template_or_tokenizer_are_refused_and_older_ledgers_are_not(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    wanted = live(path)
    config, prompts = offline(path)
    first, second = prompts.sets
    other = tuple(replace(prompt, token_ids=TokenIds.of([*prompt.token_ids, 7])) for prompt in second.prompts)
    changed = replace(prompts, sets=(first, replace(second, prompts=other)))
    with pytest.raises(DataError, match=r"step 0: `prompt_tokens` of prompt 'b\d' must be .*: set the template") as caught:
        LedgerSource(config, RolloutLedger(path), changed, VOCAB_SIZE).next(0)
    assert str(path) in str(caught.value)
    edited(path, lambda rows: [{k: v for k, v in row.items() if k != "prompt_tokens"} for row in rows])
    assert known(LedgerSource(config, RolloutLedger(path), changed, VOCAB_SIZE).next(0)) != known(wanted[0])
    assert known(LedgerSource(config, RolloutLedger(path), prompts, VOCAB_SIZE).next(0)) == known(wanted[0])


def edited(path: Path, change: Any) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def one(rows: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [rows[0] | fields, *rows[1:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [row for row in rows if row["step"] != 1], "must hold every step below run.steps = 4; found no step 1"),
        (lambda rows: [row for row in rows if row["step"] < 3], "found no step 3, and 3 from 0: lower run.steps"),
        (lambda rows: rows[::-1], "steps must be in order; found 2 after 3"),
        (lambda rows: rows[1:], "step 0: must hold algorithm.samples_per_prompt = 6 .* of each of 7 prompts; found 41 rows"),
        (lambda rows: rows[6:], "step 0: must hold algorithm.samples_per_prompt = 6 .* of each of 7 prompts; found 36 rows"),
        (lambda rows: one(rows, sample_index=3), "step 0: must hold algorithm.samples_per_prompt = 6"),
        (lambda rows: [row | {"prompt_id": "gone"} for row in rows[:6]] + rows[6:], "name a prompt of data.train .*'gone'"),
        (lambda rows: [row | {"version": 1} for row in rows], r"step 0: `version` must be one, .* found \[1\]"),
        (lambda rows: one(rows, log_probs=[]), "line 1: `log_probs` must be one a token; found 0 for 1"),
        (lambda rows: one(rows, token_ids=[2**31]), f"line 1: `token_ids.0` must be as a ledger has it .*; found '{2**31}'"),
        (lambda rows: one(rows, token_ids=[]), r"line 1: `token_ids` must be as a ledger has it .*; found '\[\]'"),
        (lambda rows: one(rows, reward="high"), "line 1: `reward` must be as a ledger has it .*; found 'high'"),
        (lambda rows: one(rows, status="fine"), "line 1: `status` must be"),
        (lambda rows: [row | {"step": -1} for row in rows], "line 1: `step` must be"),
    ],
)
def test_a_ledger_that_does_not_fit_the_run_is_refused_by_name(tmp_path, change, words):
    path = tmp_path / "rollouts.jsonl"
    live(path)
    edited(path, change)
    config, prompts = offline(path)
    with pytest.raises(DataError, match=words) as caught:
        LedgerSource(config, RolloutLedger(path), prompts, VOCAB_SIZE).next(0)
    assert str(path) in str(caught.value)


def test_tokens_that_the_model_has_not_are_refused(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    live(path)
    edited(path, lambda rows: one(rows, token_ids=[2**31 - 1]))
    config, prompts = offline(path)
    with pytest.raises(DataError, match=f"`token_ids` must be of the model's {2**31 - 1} tokens; found {2**31 - 1}"):
        LedgerSource(config, RolloutLedger(path), prompts, 2**31 - 1).next(0)


@pytest.mark.parametrize(
    ("algorithm", "temperature", "written", "words"),
    [
        ({"loss": "grpo"}, 0.7, 0.7, ""),
        ({"loss": "grpo"}, 0.7, None, r"must be of temperature 0.7, .* 'grpo' compares them at; found 1.0: set"),
        ({"loss": "grpo"}, 1.0, 0.7, r"must be of temperature 1.0, .*; found 0.7: set sampling.temperature"),
        ({"loss": "group_dpo", "alpha": 0.1}, 1.0, 0.7, "must be of temperature 1.0"),
        ({"loss": "dpo"}, 0.7, None, ""),
        ({"loss": "dpo"}, 1.0, 0.7, ""),
    ],
)
def test_ratios_are_replayed_at_the_temperature_of_their_log_probs(tmp_path, algorithm, temperature, written, words):
    """Rows without a temperature are of 1; a preference loss does not compare them."""
    path = tmp_path / "rollouts.jsonl"
    live(path, algorithm=algorithm)
    if written is not None:
        edited(path, lambda rows: [row | {"temperature": written} for row in rows])
    config, prompts = offline(path, algorithm=algorithm, sampling={"temperature": temperature})
    source = LedgerSource(config, RolloutLedger(path), prompts, VOCAB_SIZE)
    if not words:
        source.next(0)
        return
    with pytest.raises(DataError, match=words) as caught:
        source.next(0)
    assert str(path) in str(caught.value)


# -- preference files

PAIRS: list[dict[str, Any]] = [
    {"problem": "1+1?", "chosen": "2", "rejected": "3"},
    {"prompt": "Sing.", "chosen": "La la", "rejected": "No"},
    {"prompt": "Sing.", "chosen": "La la la", "rejected": "No", "id": 5},
]


def preferring(folder: Path, *rows: dict[str, Any], **changes: Any) -> RunConfig:
    path = write(folder, "pairs.jsonl", *rows)
    data = {"train": path, "replay": path, "template": "figure5", "prompts_per_step": 2, "max_prompt_tokens": 90}
    tree: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": data | changes.pop("data", {}),
        "sync": {"sync_interval": "never"},
        "sampling": {"max_tokens": 12},
    }
    return run_config(**tree | changes)


def test_a_preference_file_gives_pairs_in_the_seeded_order(model_folder, tiny_tokenizer):
    config = preferring(model_folder, *PAIRS)
    assert (replay_kind(config), config.uses_engines) == ("preferences", False)
    source = open_preferences(config, tiny_tokenizer)
    assert str(source) == "3 pairs; left out: 0 too long, 0 of equal responses"
    for step in (1, 0, 5):
        data = source.next(step)
        rows = [PAIRS[i] for i in PromptOrder(3, config.run.seed).at(step, 2)]
        prompts = [encode_prompt(tiny_tokenizer, str(row.get("problem") or row["prompt"]), "{problem}") for row in rows]
        assert [tuple(s.prompt_ids) for s in data.sequences] == [ids for ids in prompts for _ in range(2)]
        texts = [tiny_tokenizer.decode(s.completion_ids) for s in data.sequences]
        assert texts == [f"{row[kind]}<|eot_id|>" for row in rows for kind in ("chosen", "rejected")]
        assert [(s.group, s.chosen) for s in data.sequences] == [(0, True), (0, False), (1, True), (1, False)]
        assert all(not s.rollout_log_probs and s.advantage == 0 for s in data.sequences)
        assert data.num_prompts == 2
        assert data.metrics.keys() == {"completion_tokens_mean", "completion_tokens_max"}


def test_pairs_that_do_not_fit_are_left_out_and_counted(model_folder, tiny_tokenizer):
    rows = [*PAIRS, {"prompt": "x" * 90, "chosen": "a", "rejected": "b"}, {"prompt": "x", "chosen": "a" * 12, "rejected": "b"}]
    path = write(model_folder, "pairs.jsonl", *rows, {"prompt": "x", "chosen": "a", "rejected": "a"})
    made = load_preferences(path, tiny_tokenizer, "{problem}", 90, 12)
    assert (len(made.pairs), made.num_long, made.num_equal) == (3, 2, 1)
    with pytest.raises(DataError, match=r"at least one pair must fit .* found 3 too long, 0 of equal"):
        load_preferences(write(model_folder, "pairs.jsonl", *PAIRS), tiny_tokenizer, "{problem}", 9, 12)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "p", "chosen": "a"}, "line 2: `rejected` must be a text that is not empty"),
        ({"chosen": "a", "rejected": "b"}, "line 2: `problem` must be"),
        ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "line 2: `chosen` must be a text; found"),
        ([1], "line 2: a row must be a JSON object"),
    ],
)
def test_a_bad_pair_is_named(model_folder, tiny_tokenizer, bad, words):
    with pytest.raises(DataError, match=words):
        load_preferences(write(model_folder, "pairs.jsonl", PAIRS[0], bad), tiny_tokenizer, "{problem}", 90, 12)


def test_what_is_replayed_is_seen_by_its_first_row(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    assert replay_kind(run_config()) is None
    live(path)
    config, _ = offline(path)
    assert replay_kind(config) == "rollouts"
    with pytest.raises(ConfigError, match="must not be the run's own rollouts"):
        replay_kind(config.model_copy(update={"run": config.run.model_copy(update={"directory": str(tmp_path)})}))
    for text in ('{"problem": "p", "answer": "1"}\n', "", "[]\n"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"data\.replay must hold rollouts .*, or rows with `chosen` and `rejected`; found"):
            replay_kind(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": {"loss": "grpo"}}, "algorithm.loss must be 'dpo' or 'group_dpo' with alpha = 0; found 'grpo'"),
        ({"algorithm": {"loss": "group_dpo", "alpha": 0.1}}, "found 'group_dpo' with alpha = 0.1"),
        ({"data": {"spare_prompts": 2}}, "found 0 further sources in data.mix and data.spare_prompts = 2"),
        ({"data": {"mix": ({"train": "b"},)}}, "found 1 further sources in data.mix"),
    ],
)
def test_pairs_have_no_use_for_rewards_or_other_sources(model_folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        replay_kind(preferring(model_folder, *PAIRS, **changes))


def test_without_rollouts_the_loss_is_the_same_and_their_gap_is_no_metric():
    step, of_rollouts = Step(4), {"log_prob_gap_mean", "rollout_kl_mean", "ratio_max", "ess_share"}
    of_rollouts |= {"num_responses", "response_ratio_squares"}  # what that share is made of
    whole, sums, gradients, _ = step.run(make_loss(algorithm_options({})))
    bare, fewer, same, _ = step.run(make_loss(algorithm_options({}), sampled=False))
    assert (bare, same) == (whole, gradients)
    assert fewer == {name: value for name, value in sums.items() if name not in of_rollouts}
    group_dpo = make_loss(algorithm_options({"loss": "group_dpo", "entropy_weight": 1e-4}), sampled=False)
    assert not of_rollouts & {metric.name for metric in group_dpo.metrics}


def test_engines_are_wanted_for_sampling_and_for_evaluation(tmp_path):
    replay = {"replay": "a.jsonl"}
    never = {"sync_interval": "never"}
    assert run_config().uses_engines
    assert not run_config(data=replay, sync=never).uses_engines
    assert run_config(data=replay | {"held_out": "b"}, sync=never).uses_engines
    assert run_config(data=replay | {"mix": ({"train": "b", "held_out": "c"},)}, sync=never).uses_engines


# -- worked solutions

SOLVED = [{"problem": f"{n}+{n}?", "answer": f"{2 * n}", "solution": f"It is {2 * n}."} for n in range(5)]


def supervised(folder: Path, *rows: dict[str, Any], microbatch_tokens: int = 4096) -> RunConfig:
    path = write(folder, "solved.jsonl", *rows)
    return run_config(
        model={"path": str(folder)},
        data={"train": path, "template": "figure5", "max_prompt_tokens": 90},
        sft={"checkpoint_out": "out", "sequences_per_step": 3},
        trainer={"microbatch_tokens": microbatch_tokens},
    )


def test_worked_solutions_come_in_the_seeded_order_with_nothing_beside_them(model_folder, tiny_tokenizer):
    config = supervised(model_folder, *SOLVED, SOLVED[2])
    source = SupervisedSource(config, tiny_tokenizer, 4096)
    assert str(source) == "5 worked solutions; left out: 0 too long, 1 that came before" and source.warnings == []
    for step in (4, 0):
        data = source.next(step)
        rows = [SOLVED[i] for i in PromptOrder(5, config.run.seed).at(step, 3)]
        texts = [tiny_tokenizer.decode(sequence.completion_ids) for sequence in data.sequences]
        assert texts == [f"{row['solution']}<|eot_id|>" for row in rows]
        assert all(row["problem"] in tiny_tokenizer.decode(s.prompt_ids) for row, s in zip(rows, data.sequences, strict=True))
        assert all(s.group == -1 and not s.rollout_log_probs for s in data.sequences)
        assert (data.num_prompts, data.metrics) == (3, {})


@pytest.mark.parametrize(("microbatch_tokens", "positions"), [(64, 4096), (4096, 64)])
def test_a_solution_that_is_longer_than_a_row_or_the_models_positions_is_named(
    model_folder, tiny_tokenizer, microbatch_tokens, positions
):
    config = supervised(model_folder, SOLVED[0] | {"solution": "x" * 80, "id": "long"}, microbatch_tokens=microbatch_tokens)
    with pytest.raises(ConfigError, match=r"found \d+ tokens in long and a limit of 64: raise trainer\.microbatch_tokens"):
        SupervisedSource(config, tiny_tokenizer, positions)
