"""A pool of real trainer processes that lives for a whole test session: cases are sent to it by name as JSON over
pipes, big results travel as safetensors files. Every wait has a deadline; after a failure the pool starts afresh.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 150.0


class CaseFailed(AssertionError):
    """A rank raised, died or was late; the message holds every rank's word."""


class WorkerPool:
    """Runs a named case on the first n of its processes, starting them when first needed."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, case: str, world_size: int, **arguments: Any) -> list[Any]:
        """Results of all ranks, in rank order. CaseFailed when any rank did not give one in time."""
        while len(self._workers) < world_size:
            self._workers.append(_Worker(len(self._workers)))
        ranks = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(ranks):
                place = {"rank": rank, "world_size": world_size, "store": f"{folder}/store"}
                worker.send({"case": case, "place": place, "arguments": arguments})
            deadline = time.monotonic() + DEADLINE_SECONDS
            answers = [worker.receive(deadline) for worker in ranks]
        if any("error" in answer for answer in answers):
            self.close()  # ranks that waited for the failed one are of no more use
            raise CaseFailed("\n".join(f"rank {r}: {a.get('error', 'ok')}" for r, a in enumerate(answers)))
        return [answer["result"] for answer in answers]

    def close(self) -> None:
        """Kills the processes and waits for their end."""
        for worker in self._workers:
            worker.kill()
        self._workers = []


def own_device_first(rank: int) -> dict[str, str]:
    """As the engine starts its ranks: each sees its own GPU first and the others after it. Nothing where there are none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(device) for device in range(torch.cuda.device_count())]
    if rank >= len(devices):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join([devices[rank], *devices[:rank], *devices[rank + 1 :]])}


class _Worker:
    def __init__(self, rank: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        ours, theirs = os.pipe()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONWARNINGS": "ignore",
            **own_device_first(rank),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(theirs)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[theirs],
            start_new_session=True,
        )
        os.close(theirs)
        self._answers = ours
        self._buffer = b""

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return {"error": "no answer before the deadline\n" + self._words()}
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                return {"error": "the process died\n" + self._words()}
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self._answers)
        self._log.close()

    def _words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:]
