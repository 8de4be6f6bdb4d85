"""Waves of a step (sync.streaming): which groups they hold by hand and by a plain count, that a source hands the first ones out
while engines sample the last, that nothing of it depends on when anything comes, and that the step is the one without.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.commands.sampling import OF_ONE_MODEL
from engine.config.load import RunConfig, dump_config, load_config
from engine.core.errors import ConfigError, InferenceError
from engine.core.types import Sequence
from engine.inference.pool import Pool, deal, open_after
from engine.inference.sampling import SampleRequest
from engine.rewards.registry import check_streaming
from engine.rollouts.base import StepData
from engine.rollouts.ledger import rollout_rows
from engine.rollouts.source import RolloutSource
from engine.rollouts.waves import COMPLETE_SHARES, Streamed, Waves, least_groups
from tests import builders
from tests.unit.inference.test_pool import FakeEngine
from tests.unit.rollouts.test_rollouts import Holding, OneByOne, Parity, open_source, run_config

__all__ = ["open_source"]  # a fixture
ONLINE: dict[str, dict[str, Any]] = {"sync": {"sync_interval": 1, "streaming": True}}
GRPO: dict[str, dict[str, Any]] = {"algorithm": {"loss": "grpo", "samples_per_prompt": 6, "kl_weight": 0.1}}
Open = Callable[..., RolloutSource]


def answers(places: list[int]) -> dict[int, Any]:
    return {place: f"answer {place}" for place in places}


def cut(waves: Waves) -> list[tuple[int, tuple[int, ...], list[int]]]:
    """(number, groups, places of the answers) of each."""
    return [(wave.number, wave.groups, list(wave.answers.all())) for wave in waves]


def test_waves_by_hand() -> None:
    """Eight groups of two. Half of the groups are complete after the third turn, seven eighths never before the last."""
    waves = Waves(8, 2, (1 / 2, 7 / 8))
    with waves:
        for places in ([0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5], [7, 9], [11, 13], [15]):
            waves.put(answers(places))
            waves.turn()
    assert cut(waves) == [
        (0, (0, 1, 2, 3, 4), list(range(10))),
        (1, (5, 6), [10, 11, 12, 13]),
        (2, (7,), [14, 15]),
    ]
    whole = Waves(2, 2, (1 / 2,))
    with whole:
        whole.put(answers([3, 2, 1, 0]))
        whole.turn()
    assert cut(whole) == [(0, (0, 1), [0, 1, 2, 3])], "nothing is cut off where nothing is left"
    none = Waves(2, 2)
    with none:
        none.put(answers([0, 1]))
        none.turn()
        assert next(iter(none)).is_last, "without shares the step is one wave, whose answers may still arrive"
        none.put(answers([2, 3]))


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_waves_are_those_of_a_plain_count(num_groups: int, size: int, num_engines: int, least: int, seed: int) -> None:
    """Engines complete answers in any order, as many at a turn as the pool asks for. Each wave is what a count of the groups
    that are complete says, whatever is put together with what."""
    draw = random.Random(seed)
    orders = [list(range(engine, num_groups * size, num_engines)) for engine in range(num_engines)]
    for order in orders:
        draw.shuffle(order)
    turns: list[list[int]] = []
    left = [open_after(len(order)) for order in orders]
    for turn in range(max(map(len, left))):
        new = []
        for order, counts in zip(orders, left, strict=True):
            if turn < len(counts):
                before = len(order) - counts[turn - 1] if turn else 0
                new += order[before : len(order) - counts[turn]]
        turns.append(new)
    expected, here, taken, shares = [], set[int](), set[int](), list(COMPLETE_SHARES)
    for new in turns[:-1]:
        here |= set(new)
        complete = {g for g in range(num_groups) if all(g * size + i in here for i in range(size))}
        if len(here) == num_groups * size:
            break
        if shares and len(complete) >= shares[0] * num_groups:
            if num_groups - len(complete) < least:
                break
            if len(complete - taken) < least:
                continue
            shares = [share for share in shares if len(complete) < share * num_groups]
            expected.append(complete - taken)
            taken |= complete
    expected = [one for one in [*expected, set(range(num_groups)) - taken] if one]
    waves = Waves(num_groups, size, COMPLETE_SHARES, least)
    with waves:
        for new in turns:
            draw.shuffle(new)
            middle = draw.randint(0, len(new))
            waves.put(answers(new[:middle]))
            waves.put(answers(new[middle:]))
            waves.turn()
    found = cut(waves)
    assert [set(groups) for _, groups, _ in found] == expected and len(found) <= 3
    assert all(places == [g * size + i for g in groups for i in range(size)] for _, groups, places in found)


@pytest.mark.parametrize(
    ("loss", "ranks", "least"), [("dpo", 1, 1), ("dpo", 8, 16), ("group_dpo", 32, 64), ("grpo", 8, 3), ("oapl", 32, 11)]
)
def test_a_wave_has_work_for_every_data_parallel_rank(loss: str, ranks: int, least: int) -> None:
    """Pairs and groups whose loss couples them are dealt whole, six responses of others one by one."""
    made = builders.config(algorithm={"loss": loss, "samples_per_prompt": 6}, trainer={"data_parallel": ranks})
    assert least_groups(made) == least


def test_a_step_of_pairs_for_32_ranks_is_one_wave_and_for_8_ranks_two() -> None:
    for ranks, num_waves in ((32, 1), (8, 2)):
        waves = Waves(64, 2, COMPLETE_SHARES, 2 * ranks)
        with waves:
            for places in (range(48), range(48, 64), range(64, 112), range(112, 128)):
                waves.put(answers(list(places)))
                waves.turn()
        assert len(cut(waves)) == num_waves


def test_who_gives_up_wakes_who_waits_for_a_wave() -> None:
    waves = Waves(4, 2, COMPLETE_SHARES)
    threading.Timer(0.1, waves.abandon).start()
    with pytest.raises(CancelledError):
        next(iter(waves))
    failed = Waves(4, 2, COMPLETE_SHARES)
    failed.put(answers([0, 1]))
    with suppress(ZeroDivisionError), failed:
        raise ZeroDivisionError
    with pytest.raises(CancelledError):
        next(iter(failed))


def taken(source: RolloutSource, step: int) -> list[StepData]:
    """All parts of a step, as the trainer takes them."""
    parts = []
    while (part := source.early(step)) is not None:
        parts.append(part)
    return [*parts, source.next(step)]


def plain(sequences: list[Sequence]) -> list[Sequence]:
    """Whatever the numbers of their groups, in an order that depends on nothing else."""
    return sorted((replace(s, group=min(s.group, 0)) for s in sequences), key=lambda s: s.completion_ids[0])


@pytest.mark.parametrize("algorithm", [{}, GRPO, {"algorithm": {"loss": "group_dpo", "samples_per_prompt": 6}}])
def test_the_parts_of_a_step_are_the_step(open_source: Open, algorithm: dict[str, Any]) -> None:
    """One engine hands 12, 6, 3, 2 and 1 of 24 samples over, in the order of four prompts: two of them are complete after the
    first call, three after the second."""
    streamed, whole = (run_config(**ONLINE | algorithm), run_config(**algorithm | {"sync": {"sync_interval": 1}}))
    source, other = open_source(streamed), open_source(whole)
    for one in (source, other):
        one.open(range(0, 1))
    parts, expected = taken(source, 0), other.next(0)
    assert [part.num_prompts for part in parts] == [2, 1, 1] and parts[0].metrics == parts[1].metrics == {}
    assert plain([s for part in parts for s in part.sequences]) == plain(expected.sequences)
    prompts = [ids for part in parts for ids in {s.prompt_ids for s in part.sequences}]
    assert len(prompts) == len(set(prompts)) > 1, "no group is cut"
    told = parts[-1].metrics
    untimed = {"wait_seconds", "reward_seconds"}
    own = {"num_waves", "streamed_share", "streamed_seconds"}
    assert {k: v for k, v in told.items() if k not in untimed | own} == {
        k: v for k, v in expected.metrics.items() if k not in untimed
    }
    assert told["num_waves"] == 3
    tokens = [sum(len(s.prompt_ids) + len(s.completion_ids) for s in part.sequences) for part in parts]
    assert told["streamed_share"] == (tokens[0] + tokens[1]) / sum(tokens) > 0


def test_a_wave_is_handed_out_while_engines_sample(open_source: Open) -> None:
    """The engine keeps its last answer until two waves have been trained on, and their seconds are told."""
    allowed = threading.Event()
    source = open_source(run_config(**ONLINE | GRPO), Holding(allowed))
    source.open(range(0, 1))
    part = source.early(0)
    assert part is not None and part.num_prompts == 2
    time.sleep(0.2)
    part = source.early(0)
    assert part is not None and part.num_prompts == 1
    threading.Timer(0.1, allowed.set).start()
    assert source.early(0) is None
    rest = source.next(0)
    assert rest.num_prompts == 1
    assert 0.2 <= rest.metrics["streamed_seconds"] < rest.metrics["wait_seconds"] + 0.5
    assert rest.metrics["wait_seconds"] > 0


@pytest.mark.parametrize("is_sampled", [True, False])
def test_what_is_waited_for_after_the_last_response_is_the_reward(is_sampled: bool) -> None:
    streamed = Streamed(sampled_at=time.monotonic() if is_sampled else None)
    threading.Timer(0.2, lambda: streamed.judged.put(None)).start()
    assert streamed.next(lambda: None) is None
    assert streamed.waited_seconds >= 0.15
    assert (streamed.judged_seconds >= 0.15) == is_sampled and streamed.judged_seconds <= streamed.waited_seconds


def test_what_an_engine_raises_ends_the_waves_and_is_raised_by_next(open_source: Open) -> None:
    class Failing(Holding):
        def call(self, method: str, *arguments: Any) -> Any:
            self.failing = {"collect": TimeoutError()} if method == "collect" and not arguments[1] else {}
            return FakeEngine.call(self, method, *arguments)

    source = open_source(run_config(**ONLINE | GRPO), Failing(threading.Event()))
    source.open(range(0, 1))
    while source.early(0) is not None:  # the first wave, where it was judged before the engine failed
        pass
    with pytest.raises(InferenceError, match="engine 0 did not answer 'collect'"):
        source.next(0)


def test_a_source_that_streams_is_closed_without_waiting_for_engines(open_source: Open) -> None:
    reward = OneByOne(enough=25)
    source = open_source(run_config(**ONLINE | GRPO), Holding(reward.engines_go_on), reward=reward)
    source.open(range(0, 1))
    assert source.early(0) is not None
    started = time.monotonic()
    source.close()
    assert time.monotonic() - started < 4, "the engine is late after 5 seconds"
    reward.engines_go_on.set()


class Late(FakeEngine):
    """Ends requests in an order of its own, and answers late or at once as `draw` says."""

    def __init__(self, draw: random.Random | None) -> None:
        super().__init__()
        self.draw = draw

    def ended(self, left: list[str], count: int) -> list[str]:
        return sorted(left, key=lambda one: hash_of(self.held[one]))[:count]

    def call(self, method: str, *arguments: Any) -> Any:
        answer, draw = super().call(method, *arguments), self.draw
        if draw is None:
            return answer

        delay = draw.uniform(0, 0.01)

        class Later:
            def result(_, timeout_seconds: float) -> Any:
                time.sleep(delay)
                return answer.result(timeout_seconds)

        return Later()


def hash_of(request: SampleRequest) -> int:
    """As good as any order of lengths, in which prompts differ: a function of what is sampled."""
    return request.seed % 1000 + 700 * request.token_ids[0]


class LateReward(Parity):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.draw = draw

    def score(self, answers: Any) -> Any:
        time.sleep(self.draw.uniform(0, 0.01))
        return super().score(answers)


@pytest.mark.parametrize("num_engines", [1, 2])
def test_no_delay_changes_a_wave(open_source: Open, num_engines: int) -> None:
    """Twenty schedules of random delays of engines, the reward and the trainer: every part of five steps is the same."""
    config = run_config(data={"prompts_per_step": 8}, **ONLINE | GRPO)

    def parts(draw: random.Random | None) -> list[list[tuple[list[Sequence], int]]]:
        engines = [Late(draw) for _ in range(num_engines)]
        source = open_source(config, *engines, **({"reward": LateReward(draw)} if draw is not None else {}))
        found = []
        for step in range(5):
            for engine in engines:
                engine.version = step
            source._pool.commit(step)
            source.open(range(step, step + 1))
            of_step = []
            while (part := source.early(step)) is not None:
                of_step.append((part.sequences, part.num_prompts))
                time.sleep(draw.uniform(0, 0.01) if draw is not None else 0)
            rest = source.next(step)
            found.append([*of_step, (rest.sequences, rest.num_prompts)])
        return found

    expected = parts(None)
    assert max(map(len, expected)) == 3
    for seed in range(20):
        assert parts(random.Random(seed)) == expected


def test_the_ledger_tells_waves(open_source: Open) -> None:
    source = open_source(run_config(**ONLINE | GRPO))
    source.open(range(0, 1))
    written: list[Any] = []
    source._records = type("Records", (), {"append": lambda _, step, groups: written.extend(groups)})()  # type: ignore[assignment]
    taken(source, 0)
    assert [row["wave"] for group in written for row in rollout_rows(group)] == [0] * 12 + [1] * 6 + [2] * 6
    other = open_source(run_config(**GRPO))
    other.open(range(0, 2))
    other._records = source._records
    written.clear()
    other.next(0)
    assert not any("wave" in row for group in written for row in rollout_rows(group)), "without, nothing is said of it"


def test_the_pool_says_when_every_engine_has_answered_its_next_call() -> None:
    requests = [SampleRequest(f"{i}", f"p{i // 3}", i, i, (1,), 1.0, 1.0, 8) for i in range(9)]  # type: ignore[arg-type]
    pool = Pool([FakeEngine(), FakeEngine()], 5.0)
    (ticket,) = pool.submit([requests])
    arrived: list[int] = []
    turns: list[list[int]] = []
    pool.gather(ticket, lambda new: arrived.extend(sorted(new)), lambda: turns.append(sorted(arrived)))
    (shares,) = deal([requests], 2)
    left = [open_after(len(share)) for share in shares]
    expected = [
        sorted(
            place
            for share, counts in zip(shares, left, strict=True)
            for place in share[: len(share) - (counts[turn] if turn < len(counts) else 0)]
        )
        for turn in range(max(map(len, left)))
    ]
    assert turns == expected


RULES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "interval": ({"sync": {"sync_interval": 2}}, "sync.sync_interval must be 1 and sync.lookahead 0.*found 2 and 0"),
    "never": ({"sync": {"sync_interval": "never"}}, "found 'never' and 0"),
    "lookahead": ({"sync": {"lookahead": 1}}, "found 1 and 1"),
    "spare": ({"data": {"spare_prompts": 2}}, r"data\.spare_prompts chooses among all; found \[2\]"),
    "colocated": ({"inference": {"placement": "colocated"}}, "'colocated' they sleep then"),
    "overlap": ({"trainer": {"data_parallel": 2, "overlap_gradients": True}}, "overlap_gradients sums them while"),
    "fp8": ({"trainer": {"fp8": "current"}}, "found 'current'"),
    "batch": ({"algorithm": {"loss": "grpo", "normalize_advantages": "batch_std"}}, "'batch_std' needs; found both"),
}


@pytest.mark.parametrize("name", RULES)
def test_what_looks_at_a_step_as_a_whole_is_refused(name: str) -> None:
    changes, message = RULES[name]
    with pytest.raises(ValueError, match=message):
        run_config(**{table: ONLINE.get(table, {}) | changes.get(table, {}) for table in ONLINE | changes})
    without = {table: values | ({"streaming": False} if table == "sync" else {}) for table, values in changes.items()}
    if name not in ("colocated", "fp8"):  # which need more, whatever streams
        assert isinstance(run_config(**without), RunConfig), "it is streaming that cannot go with it"


def test_a_loss_of_ones_own_streams_where_it_is_a_sum_over_groups(tmp_path: Any) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from engine.algorithms.grpo import Grpo\nfrom engine.algorithms.group import GroupLoss\n"
        "class Sum(GroupLoss):\n    def group_loss(self, group):\n        return group.sums(group.log_probs).mean()\n"
        "class Other(Grpo):\n    def __call__(self, *given):\n        return super().__call__(*given)\n"
        "class Said(Other):\n    sums_over_groups = True\n"
        "    def __call__(self, *given):\n        return super().__call__(*given)\n"
        "class Whole(Grpo):\n    def of_step(self, sequences, groups):\n        return sequences\n"
    )
    for name in ("Sum", "Said"):
        run_config(algorithm={"loss": f"{file}:{name}", "samples_per_prompt": 6}, **ONLINE)
    for name, found in (("Other", "no sums_over_groups = True beside its __call__"), ("Whole", "its own of_step")):
        with pytest.raises(ValueError, match=f"needs a loss that is a sum over groups.*{found}"):
            run_config(algorithm={"loss": f"{file}:{name}", "samples_per_prompt": 6}, **ONLINE)


def test_a_reward_streams_where_its_scores_depend_on_no_other_group(tmp_path: Any) -> None:
    (tmp_path / "own.py").write_text(
        "from engine.rewards.base import Reward\n"
        "class Together(Reward):\n    def score(self, answers):\n        return []\n"
        "class Apart(Together):\n    per_group = True\n"
        "from engine.rewards.math.reward import MathReward\n"
        "class Verifier(MathReward):\n    def score(self, answers):\n        return []\n"
        "def alone(completion):\n    return 0.0\n"
        "def of_group(group):\n    return [0.0 for _ in group]\n"
    )

    def check(*names: str, **changes: Any) -> None:
        named = [name if name in ("math", "model") else f"{tmp_path}/own.py:{name}" for name in names]
        reward = named[0] if len(named) == 1 else named
        check_streaming(run_config(data={"reward": reward, "prompts_per_step": 4}, **ONLINE | changes))

    for names in (("math",), ("Apart",), ("alone",), ("of_group",), ("math", "alone")):
        check(*names)
    check("model", reward_model={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"found data.reward = .*Together', which judges a step together"):
        check("Together")
    with pytest.raises(
        ConfigError, match=r"found .*:Verifier', which inherits per_group, .* set per_group = True in the class"
    ):
        check("Verifier")
    check("Together", sync={"sync_interval": 1})


@pytest.mark.parametrize("sync", [{"streaming": True}, {"lookahead": 2, "in_flight": True}, {"reference": "follow"}])
def test_rollouts_of_one_model_are_sampled_with_any_regime(tmp_path: Any, sync: dict[str, Any]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(dump_config(run_config(sync={"sync_interval": 1} | sync)))
    found = load_config(file, list(OF_ONE_MODEL)).sync
    assert (found.sync_interval, found.lookahead, found.in_flight, found.streaming) == ("never", 0, False, False)
