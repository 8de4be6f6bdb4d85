"""Covers the judging processes of engine/rewards: hostile answers, the deaths of children and of their workers, the user's
own function, and an end that leaves no process behind. Verdicts are tests/unit/rewards/test_verifier.py's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.config.load import RunConfig
from engine.config.options import Rewards
from engine.core.errors import ConfigError, WatchdogError
from engine.core.types import Prompt, Score
from engine.rewards.base import Answer, Reward
from engine.rewards.function import FunctionReward
from engine.rewards.math.reward import MathReward
from engine.rewards.pool import workers
from engine.rewards.pool.frames import read_frame, write_frame
from engine.rewards.registry import open_rewards
from tests.builders import config as run_config
from tests.rollouts import make_prompt

RIGHT, WRONG = Score(1.0, "ok"), Score(0.0, "ok")
DEADLINE_SECONDS = 2.0
BOX = "\\boxed{%s}"
HOSTILE = {
    "tower of powers": BOX % "9^{9^{9^{9}}}",
    "power of a power": BOX % "2^{2^{100000}}",
    "tower without LaTeX": "the answer is 9^9^9^9",
    "factorial": BOX % "1000000000!",
    "factorials of factorials": BOX % "9!!!!!",
    "binomial": BOX % r"\binom{1000000000}{500000000}",
    "long sum": BOX % r"\sum_{i=1}^{1000000000} \frac{1}{i^2}",
    "a million digits": BOX % ("9" * 1_000_000),
    "deep parentheses": BOX % ("(" * 500 + "1" + ")" * 500),
    "deep fractions": BOX % (r"\frac{1}{1+" * 200 + "1" + "}" * 200),
    "deeper fractions": BOX % (r"\frac{1}{1+" * 2000 + "1" + "}" * 2000),
    "large set": BOX % (r"\{" + ",".join(map(str, range(3000))) + r"\}"),
    "union of intervals": BOX % r"\cup".join(f"({i},{i + 1})" for i in range(300)),
    "many boxes": BOX % "1" * 100_000,
    "open boxes": "\\boxed{" * 100_000,
    "not text": "4\x00\udcff\u202e\U0001d7cf",
    "nothing": "",
}


def prompt(answer: str) -> Prompt:
    return make_prompt("id", (1,), "problem", answer, "", "")


def processes() -> list[psutil.Process]:
    """Our workers and the children that judge for them."""
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    late_at = time.monotonic() + seconds
    while not condition() and time.monotonic() < late_at:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    with MathReward(Rewards(workers=1, deadline_seconds=DEADLINE_SECONDS, memory_mebibytes=1024)) as made:
        made.score([Answer(prompt("1"), "1")])  # started
        yield made


def test_hostile_answers_cost_no_more_than_their_deadline(reward: MathReward) -> None:
    for name, text in HOSTILE.items():
        start = time.monotonic()
        (hostile,) = reward.score([Answer(prompt("57"), text)])
        seconds = time.monotonic() - start
        assert seconds < DEADLINE_SECONDS + 30.0, (name, seconds)  # it would take minutes; the slack is a busy machine's, whose
        # wall clock goes on while the judge waits for a core
        assert hostile.value == 0.0, name
        assert reward.score([Answer(prompt("57"), BOX % "57")]) == [RIGHT], name
        if name in ("tower of powers", "factorial", "binomial"):
            assert hostile.status == "timeout", name


def test_a_child_that_crashes_is_a_death_and_the_next_answer_is_judged(reward: MathReward) -> None:
    (worker,) = reward._workers
    (child,) = psutil.Process(worker.process.pid).children()
    child.kill()
    assert wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)
    assert reward.score([Answer(prompt("5"), "5"), Answer(prompt("6"), "6")]) == [Score(0.0, "died"), RIGHT]
    assert reward._workers == [worker]


def test_equal_answers_are_judged_once_and_all_get_the_score(reward: MathReward) -> None:
    (worker,) = reward._workers
    given: list[str] = []
    give = worker.give
    worker.give = lambda number, request, seconds: (given.append(request[1]), give(number, request, seconds))  # type: ignore
    assert reward.score([Answer(prompt("5"), text) for text in ("5", "6", "5", "5")]) == [RIGHT, WRONG, RIGHT, RIGHT]
    assert given == ["5", "6"]


def test_memory_is_bounded() -> None:
    with MathReward(Rewards(workers=1, deadline_seconds=DEADLINE_SECONDS, memory_mebibytes=256)) as small:
        bomb, honest = small.score([Answer(prompt("5"), BOX % "2^{10000000000}"), Answer(prompt("5"), "5")])
        (child,) = psutil.Process(small._workers[0].process.pid).children()
        assert child.rlimit(psutil.RLIMIT_AS) == (256 << 20, 256 << 20)
        assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert bomb.value == 0.0 and honest == RIGHT  # the status depends on who notices: Math-Verify or we


@pytest.mark.parametrize(("cores", "threads", "wanted"), [(1, 0, 1), (2, 4, 1), (16, 4, 12), (96, 32, 64), (192, 32, 64)])
def test_so_many_workers_as_fit_the_machine_where_none_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, wanted: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert workers.num_workers(Rewards(), threads) == wanted
    assert workers.num_workers(Rewards(workers=3), threads) == 3


def test_rewards_share_the_cores_and_see_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    found = [workers.fitted(run_config(), 4, num_pools).rewards.workers for num_pools in (0, 1, 3, 5, 100)]
    assert found == [12, 12, 4, 2, 1]
    assert workers.fitted(run_config(rewards={"workers": 9}), 4, 3).rewards.workers == 9, "as asked for"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert workers._environment(())["OMP_NUM_THREADS"] == "1"


def test_two_workers_keep_the_order() -> None:
    slow = BOX % "9!!!!!"
    items = [Answer(prompt(str(i % 3)), slow if i == 4 else BOX % i) for i in range(30)]
    with MathReward(Rewards(workers=2, deadline_seconds=DEADLINE_SECONDS)) as pair:
        scores = pair.score(items)
        assert pair.score([]) == []
    assert scores[:4] == [RIGHT] * 3 + [WRONG] and scores[4] == Score(0.0, "timeout") and scores[5:] == [WRONG] * 25


def test_a_dead_or_stuck_worker_is_replaced_and_its_answers_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(workers, "MIN_WALL_SECONDS", 2.0)
    monkeypatch.setattr(workers, "WALL_SECONDS_PER_CPU_SECOND", 1.0)
    items = [Answer(prompt("5"), "5"), Answer(prompt("5"), "6"), Answer(prompt("5"), "5")]
    before = set(processes())
    with MathReward(Rewards(workers=1, deadline_seconds=DEADLINE_SECONDS)) as single:
        assert single.score(items) == [RIGHT, WRONG, RIGHT]
        for kind in (signal.SIGKILL, signal.SIGSTOP):
            (worker,) = single._workers
            os.kill(worker.process.pid, kind)
            assert single.score(items) == [RIGHT, WRONG, RIGHT], kind.name
            assert worker not in single._workers
    assert wait_until(lambda: set(processes()) == before)


def test_an_answer_that_takes_two_workers_down_is_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    with MathReward(Rewards(workers=1)) as single:
        assert single.score([Answer(prompt("5"), "5")]) == [RIGHT]
        give = workers._Worker.give

        def give_and_kill(self: workers._Worker, index: int, request: workers.Request, seconds: float) -> None:
            if request[1] == "kill":
                self.process.kill()
            give(self, index, request, seconds)

        monkeypatch.setattr(workers._Worker, "give", give_and_kill)
        assert single.score([Answer(prompt("5"), "kill"), Answer(prompt("5"), "5")]) == [Score(0.0, "died"), RIGHT]


def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with MathReward(Rewards()) as broken, pytest.raises(WatchdogError, match=r"3 dead or late in a row.*exit code 1"):
        broken.score([Answer(prompt("5"), "5")])


def test_close_ends_everything_and_twice_is_once() -> None:
    before = set(processes())
    reward: Reward = MathReward(Rewards(workers=2, deadline_seconds=60.0))
    reward.score([Answer(prompt("5"), "5"), Answer(prompt("5"), "6")])
    assert wait_until(lambda: len(set(processes()) - before) == 4)
    started = set(processes()) - before
    reward.close()
    reward.close()
    assert wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started), 2.0)


PARENT = """
import os, sys, time
from engine.config.options import Rewards
from engine.rewards.function import FunctionReward
from engine.rewards.math.reward import MathReward
from engine.rewards.registry import open_rewards
from engine.rewards.base import Answer
from tests.rollouts import make_prompt
reward = MathReward(Rewards(workers=1, deadline_seconds=60.0))
reward.score([Answer(make_prompt("id", (1,), "", "5", "", ""), "5")])
import psutil
print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
if sys.argv[1] == "busy":
    reward.score([Answer(make_prompt("id", (1,), "", "5", "", ""), r"\\boxed{9!!!!!}")])
"""


@pytest.mark.parametrize("end", ["busy", "exit"])  # SIGKILL in the middle of an answer; leaving without close()
def test_nothing_outlives_the_parent(end: str) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", PARENT, end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if end == "busy":
            time.sleep(0.3)
            parent.kill()
        parent.wait(20)
    assert wait_until(lambda: not any(alive(pid) for pid in pids), 3.0)


def alive(pid: int) -> bool:
    """Whether the process runs; nobody may reap an orphan here, so a zombie is dead."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


FUNCTIONS = """
import math, os, subprocess, time
from dataclasses import dataclass
from engine.rewards.base import Reward

@dataclass
class Judged:
    share: float

def right(problem, answer, completion):
    return Judged(0.5).share if answer in completion else -1

def long(problem, answer, completion):
    return len(completion)

def wild(problem, answer, completion):
    if completion == "raise":
        raise KeyError("no such answer")
    if completion == "exit":
        raise SystemExit(0)
    if completion == "hang":
        subprocess.Popen(["sleep", str(10_000_000 + os.getppid())])
        time.sleep(1234)
    if completion == "memory":
        return len(bytearray(1 << 33))
    if completion == "kill":
        os.kill(os.getpid(), 9)
    if completion == "eat":
        return float(len(os.read(0, 100)))
    print("what a user prints")
    return {"nan": math.nan, "text": "1.0", "nothing": None, "true": True, "huge": 10**400}.get(completion, 0.25)

def sees(problem, answer, completion):
    return float(completion in os.environ)

def crooked(problem, completion, gold):
    return 1.0

def blind(problem):
    return 1.0

def both(completion, group):
    return [1.0]

class Judge(Reward):
    pass

constant = 3
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "json.py"  # the name of a library must not matter
    path.write_text(FUNCTIONS)
    return path


def test_a_users_function_gives_the_score(functions: Path) -> None:
    asked = make_prompt("id", (1,), "What is 5 + 2?", "7", "", "", "function")
    with FunctionReward(Rewards(function=f"{functions}:right")) as user:
        assert user.score([Answer(asked, "it is 7"), Answer(asked, "it is 8")]) == [Score(0.5, "ok"), Score(-1.0, "ok")]


def test_a_completion_larger_than_a_pipe_reaches_the_function_whole(functions: Path) -> None:
    with FunctionReward(Rewards(function=f"{functions}:long", deadline_seconds=30.0)) as user:
        assert user.score([Answer(prompt("7"), "é" * 1_000_000)]) == [Score(1_000_000.0, "ok")]


def test_whatever_a_users_function_does_is_a_status_and_the_next_answer_is_judged(functions: Path, capfd: Any) -> None:
    before = set(processes())
    fine = Score(0.25, "ok")
    expected = {
        **dict.fromkeys(("raise", "exit", "nan", "text", "nothing", "huge"), Score(0.0, "invalid")),
        **{"hang": Score(0.0, "timeout"), "kill": Score(0.0, "died"), "memory": Score(0.0, "died")},
        **{"true": Score(1.0, "ok"), "eat": Score(0.0, "ok"), "fine": fine},
    }
    with FunctionReward(Rewards(function=f"{functions}:wild", workers=1, deadline_seconds=1.0, memory_mebibytes=1024)) as user:
        (worker,) = user._workers
        for text, score in expected.items():
            assert user.score([Answer(prompt("7"), text), Answer(prompt("7"), "fine")]) == [score, fine], text
        assert user._workers == [worker]
        started = ["sleep", str(10_000_000 + worker.process.pid)]
        assert wait_until(lambda: not any(p.info["cmdline"] == started for p in psutil.process_iter(["cmdline"])))
    assert wait_until(lambda: set(processes()) == before)
    told = capfd.readouterr().err
    assert "KeyError: 'no such answer'" in told and told.count("Traceback") == 1, "the first error, once"


def test_a_users_function_sees_what_python_needs_and_no_secret(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("RAY_AUTH_TOKEN", "OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    needed = ("PATH", "HOME", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONHASHSEED")
    for name in (*secrets, "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1" if name == "OMP_NUM_THREADS" else "C")
    with FunctionReward(Rewards(function=f"{functions}:sees")) as user:
        seen = {name: score.value for name in (*secrets, *needed) for score in user.score([Answer(prompt("7"), name)])}
    assert seen == dict.fromkeys(secrets, 0.0) | dict.fromkeys(needed, 1.0)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (None, ("rewards.function is required", "missing")),
        ("right", ("rewards.function must read", "'right'", "colon")),
        ("nowhere.py:right", ("a file that exists", "nowhere.py")),
        ("{file}:wrong", ("name something of", "wrong", "check the name")),
        ("{file}:constant", ("a function, or a class", "constant as 3")),
        ("{file}:crooked", ("takes, by name, some of problem, answer", "crooked with problem, completion, gold", "signature")),
        ("{file}:blind", ("takes, by name", "blind with problem")),
        ("{file}:both", ("`group` instead of `completion`", "completion, group")),
        ("{file}:Judge", ("must name a function", "the class", "data.reward")),
        ("{folder}/torn.py:right", ("can be imported", "SyntaxError")),
        ("no.such.module:right", ("can be imported", "ModuleNotFoundError")),
        ("math:dist", ("takes, by name", "dist with p, q")),
    ],
)
def test_a_function_that_cannot_be_called_is_a_sentence(functions: Path, name: str | None, parts: tuple[str, ...]) -> None:
    (functions.parent / "torn.py").write_text("def right(:\n")
    before = set(processes())
    named = name and name.format(file=functions, folder=functions.parent)
    with pytest.raises(ConfigError) as caught:
        FunctionReward(Rewards(function=named))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)
    assert wait_until(lambda: set(processes()) == before)


def test_each_prompt_goes_to_the_reward_it_names(functions: Path, tmp_path: Path) -> None:
    tree = {
        "run": {"directory": "run", "steps": 1},
        "model": {"path": "seed"},
        "data": {"train": "a.jsonl", "mix": [{"train": "b.jsonl", "reward": "function"}]},
        "rewards": {"function": f"{functions}:right"},
    }
    mine, theirs = (make_prompt("id", (1,), "problem", "7", "", "", name) for name in ("math", "function"))
    with open_rewards(RunConfig.model_validate(tree)) as routed:
        scores = routed.score([Answer(theirs, "7"), Answer(mine, "7"), Answer(theirs, "8"), Answer(mine, "8")])
    assert scores == [Score(0.5, "ok"), RIGHT, Score(-1.0, "ok"), WRONG]


@pytest.mark.parametrize("name", ["math.worker", "function_worker"])
def test_a_worker_imports_neither_torch_nor_our_records(name: str) -> None:
    code = f"import sys, engine.rewards.{name}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert not {"torch", "numpy", "pydantic", "transformers"} & set(run.stdout.split())


@pytest.mark.parametrize("message", [["\ud800é\x00", 1.5], "x" * 50_000, [None]])
def test_frames_survive_a_pipe_and_a_torn_one_is_an_end(message: object) -> None:
    read_end, write_end = os.pipe()
    write_frame(write_end, message)
    assert read_frame(read_end) == message
    os.write(write_end, b"\x09\x00\x00\x00[1")
    os.close(write_end)
    assert read_frame(read_end) is None
    os.close(read_end)
