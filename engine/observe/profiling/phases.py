"""Names for what a process of a run is busy with, and the marks that a profiler finds them by: a range of torch's profiler
where one is recording, and an NVTX range where torch is built for CUDA. It records nothing itself (recorder.py does) and
keeps no state: whether anybody listens is torch's to know.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Any

PREFIX = "semion."  # tells our ranges from everybody else's


class Phase(StrEnum):
    """What a stretch of a process's time was for. An indented one lies inside the one above it."""

    WINDOW = "window"  # all that was recorded, in every process
    WAIT = "wait"  # for the step's batch: on rank 0 for engines and rewards, elsewhere for rank 0
    REWARDS = "rewards"  # in wait, after the last completion: for the rewards alone
    SCORE = "score"  # what the loss needs beside the batch
    REFERENCE = "reference"  # in score: forwards of the reference
    SPREAD = "spread"  # in score: forwards of the policy, for groups that fit no microbatch
    TRAIN = "train"  # an optimizer step
    FORWARD = "forward"  # in train, reference and spread: one microbatch, log-probs and loss included
    LOG_PROBS = "log-probs"  # in forward: from logits or hidden states to token log-probs
    BACKWARD = "backward"  # in train: one microbatch
    PIPELINE = "pipeline"  # sends to and waits for the neighbouring stages
    REDUCE = "reduce"  # in train: gradients over data-parallel and tensor-parallel ranks
    OPTIMIZER = "optimizer"  # in train: clip and step
    PUBLISH = "publish"  # the trainer's side of a weight sync
    PLACE = "place"  # an engine's side of it
    DECODE = "decode"  # one step of vLLM
    ENGINE_LOG_PROBS = "engine log-probs"  # an engine scores sequences
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"


NOTHING: AbstractContextManager[None] = nullcontext()


def phase(which: Phase) -> AbstractContextManager[None]:
    """While entered, this thread is in that phase. Ranges of a thread nest. Without a profiler and without CUDA it costs
    a look-up; on a build for CUDA an NVTX push and pop, which do nothing unless a tool is attached."""
    torch = sys.modules.get("torch")  # a process without it has no profiler either
    if torch is None:
        return NOTHING
    recorded, marked = torch.autograd.profiler._is_profiler_enabled, torch.version.cuda is not None
    return _Range(torch, PREFIX + which, recorded, marked) if recorded or marked else NOTHING


class _Range:
    """One occurrence of a phase."""

    __slots__ = ("_marked", "_name", "_record", "_torch")

    def __init__(self, torch: Any, name: str, recorded: bool, marked: bool) -> None:
        self._torch, self._name, self._marked = torch, name, marked
        self._record = torch.autograd.profiler.record_function(name) if recorded else None

    def __enter__(self) -> None:
        if self._marked:
            self._torch.cuda.nvtx.range_push(self._name)
        if self._record is not None:
            self._record.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._record is not None:
            self._record.__exit__(*raised)
        if self._marked:
            self._torch.cuda.nvtx.range_pop()
