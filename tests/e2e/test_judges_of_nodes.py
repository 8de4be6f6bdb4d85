"""Answers judged by the processes of two real Ray nodes on one machine: the scores of one, a verifier that hangs on the other
node, and that node's process killed while it judges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.fake_slurm import NODES
from tests.e2e.ray_nodes import ray_nodes

pytestmark = pytest.mark.timeout(600)
PORT = 24_637
JUDGE = '''
import os, time
from pathlib import Path

from engine.core.types import Score
from engine.rewards.base import Reward

class Grouped(Reward):
    per_group = True

    def score(self, answers):
        Path(answers[0].prompt.problem, f"{answers[0].completion}-{os.getpid()}").touch()
        time.sleep(0.01)
        return [Score(float(len(answer.completion)), "ok", (("of", float(len(answers))),)) for answer in answers]

def mark(problem, completion):
    """Leaves the number of the process that judges; `problem` is the folder."""
    Path(problem, f"{completion}-{os.getppid()}").touch()
    if completion.startswith("held"):
        while not Path(problem, "free").exists():
            time.sleep(0.01)
    if completion.startswith("hang"):
        time.sleep(600)
    return float(len(completion))
'''
PROGRAM = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil

from engine.rewards.base import Answer
from engine.rewards.registry import open_rewards
from engine.run.processes import Cluster
from tests.builders import config, spec
from tests.rollouts import make_prompt

root, name = Path(sys.argv[1]), sys.argv[2]
made = config(
    root / "run",
    cluster={"nodes": 2, "gpus_per_node": 1},
    trainer={"timeout_seconds": 240.0},
    inference={"engines": 1},
    data={"reward": name},
    rewards={"workers": 1, "deadline_seconds": 5.0},
)
resolved = spec(made)
assert resolved.nodes == (0, 1), resolved.nodes


def asked(folder, texts):
    folder.mkdir()
    return [Answer(make_prompt("p", (1,), str(folder), "", "", "", reward=name), text, group=i) for i, text in enumerate(texts)]


def workers(folder):
    return {int(file.name.rpartition("-")[2]) for file in folder.iterdir() if "-" in file.name}


def shown(scores):
    return [(score.value, score.status) for score in scores]


told = {}
with Cluster(resolved) as cluster, open_rewards(made, cluster.start_judges()) as reward:
    texts = ["x" * (i % 9 + 1) + str(i) for i in range(200)]
    told["scores"] = shown(reward.score(asked(root / "all", texts)))
    told["workers"] = len(workers(root / "all"))
    told["hanging"] = shown(reward.score(asked(root / "hang", ["hang1", "hang2", "a", "bb"])))
    told["hanging workers"] = len({int(file.name.rpartition("-")[2]) for file in (root / "hang").glob("hang*-*")})
    held = asked(root / "held", [f"held{i}" for i in range(6)])
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score, held)
        while len(found := workers(root / "held")) < 2:
            time.sleep(0.02)
        (other,) = [pid for pid in found if psutil.Process(pid).ppid() != os.getpid()]
        psutil.Process(psutil.Process(other).ppid()).kill()
        deadline = time.monotonic() + 60
        while psutil.pid_exists(other) and psutil.Process(other).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a worker ends with the process that started it"
            time.sleep(0.02)
        (root / "held" / "free").touch()
        told["killed"] = shown(scores.result(120))
    told["after"] = shown(reward.score(asked(root / "after", texts)))
    sources = config(root / "run", data={"reward": name.replace(":mark", ":Grouped")}).data.sources
    with open_rewards(made, cluster.start_judges(sources), sources) as reward:
        found = reward.score([replace(a, group=i // 4, prompt=replace(a.prompt, reward=sources[0].judge))
                              for i, a in enumerate(asked(root / "class", texts))])
        told["class"], told["sizes"] = shown(found), sorted({dict(score.parts)["of"] for score in found})
        told["class nodes"] = len(workers(root / "class"))
print("TOLD " + json.dumps(told))
"""


def test_two_nodes_judge_as_one_and_one_goes_on_without_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "judge.py"
    file.write_text(JUDGE)
    with ray_nodes(NODES[:2], PORT, tmp_path, monkeypatch):
        arguments = [sys.executable, "-c", PROGRAM, str(tmp_path), f"{file}:mark"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.partition("TOLD ")[2])
    right = [[float(len("x" * (i % 9 + 1) + str(i))), "ok"] for i in range(200)]
    assert told["scores"] == told["after"] == right
    assert told["class"] == right and told["sizes"] == [4.0] and told["class nodes"] == 2, "a class, group by group"
    assert told["workers"] == told["hanging workers"] == 2, "one of each node"
    assert told["hanging"] == [[0.0, "timeout"], [0.0, "timeout"], [1.0, "ok"], [2.0, "ok"]]
    assert told["killed"] == [[5.0, "ok"]] * 6, "no answer is taken for one that killed its judge"
    assert (tmp_path / "run" / "logs" / "judges_of_node_1.log").exists()
    assert "the process of judges of node 1 ended" in done.stderr
