"""The case of test_memory.py: the memory that one rank's Policy really takes on the CPU. Every operator of torch is watched,
and every storage that it made counts until it is gone: what C++ and autograd hold too, but not what an operator makes and frees
inside itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.algorithms.registry import make_loss
from engine.config.load import RunConfig
from engine.core.types import Batch
from engine.megatron.packing import make_batch
from engine.megatron.parallel_state import ParallelState
from engine.megatron.policy import Policy
from tests.parallel.policies import make_policy
from tests.rollouts import make_sequence

NUM_ROWS = 3  # microbatches of a rank: one more than wait for their backward on two stages


def memory(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, int]:
    """The most bytes at once in a second step, of which what the policy holds from step to step, by component."""
    with Watch() as watch:
        policy = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
        batch = policy.score(full_rows(config, parallel.dp_rank))
        policy.train_step(batch)
        watch.most = watch.live()
        policy.train_step(batch)
    held = _held(policy)
    return held | {"step": watch.most - sum(held.values()), "total": watch.most}


class Watch(TorchDispatchMode):
    """Counts the bytes of all storages made while it is entered. `most`: the largest number seen after an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0  # not less than what is live: looked at before each storage is asked whether it still is

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage())
        if self._bound > self.most:
            self.most = max(self.most, self.live())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        known = self._found.get(storage._cdata)
        if known is None or known[0].expired():
            self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self._bound += storage.nbytes()

    def live(self) -> int:
        """Bytes of what is still there."""
        self._found = {key: entry for key, entry in self._found.items() if not entry[0].expired()}
        self._bound = sum(size for _, size in self._found.values())
        return self._bound


def full_rows(config: RunConfig, dp_rank: int) -> Batch:
    """Microbatches for this rank, each a pair of one short prompt that fills it to the last token: nearly all have a target."""
    completion = (2,) * ((config.trainer.microbatch_tokens - 2) // 2)
    count = 2 * NUM_ROWS * config.trainer.data_parallel
    sequences = [
        make_sequence((3 + index // 2,) * 3, completion, (-1.0,) * len(completion), 1.0, index // 2, index % 2 == 0)
        for index in range(count)
    ]
    return make_batch(sequences, step=0, num_prompts=4, trainer=config.trainer, dp_rank=dp_rank)


def _held(policy: Policy) -> dict[str, int]:
    """Bytes of the storages behind each component; what two share counts for the first."""
    buffers = [buffer for chunk in policy._chunks for buffer in chunk.buffers]
    seen: set[int] = set()
    return {
        "weights": _bytes(policy.parameters.values(), seen),
        "gradients": _bytes((buffer.grad_data for buffer in buffers), seen),
        "reference": _bytes(policy._reference.weights.values(), seen),
        "optimizer": _bytes(policy._optimizer.state().values(), seen),
    }


def _bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
