"""What a policy whose matrices are kept in FP8 alone is asked on every rank: which values they begin with, what is copied,
gathered, exported and synced, and whether its state goes to a policy with bfloat16 weights and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from engine.algorithms.registry import make_loss
from engine.config.load import RunConfig
from engine.core.types import Batch
from engine.megatron.parallel_state import ParallelState
from engine.megatron.policy import Policy
from engine.models.export_plan import export_plan
from engine.models.registry import family_of
from engine.models.sharding import EngineLayout
from tests.parallel.material import batch_of
from tests.parallel.policies import make_policy
from tests.unit.bridge.world import Case, World

BLOCK = 128


def fp8_parameters(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, Any]:
    """Three steps with the reference renewed before the last; what holds of the weights before, between and after."""
    policy = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    kept: dict[str, Any] = {name: tensor for name, tensor in policy._own.items() if hasattr(tensor, "_fp8_dtype")}
    batches = [batch_of(step, policy.shape.vocab_size, config.trainer, parallel.dp_rank) for step in range(3)]
    plain = config.trainer.model_copy(update={"fp8_parameters": False})
    seed = make_policy(config.model_copy(update={"trainer": plain}), parallel, make_loss(config.algorithm), checkpoint)
    found: dict[str, Any] = {"kept": len(kept), "begins_with_the_checkpoint": _begins_with(seed, policy, kept)}
    first = _reference_log_probs(policy, batches[0])
    found["reference_is_the_policy"] = _equal(first, policy.log_probs(batches[0]))
    found["losses"] = []
    for step in range(2):
        with _gathers() as gathered:
            metrics = policy.train_step(policy.score(batches[step]))
        found["losses"].append(metrics["loss"])
        found["norms"] = [*found.get("norms", ()), metrics["grad_norm"]]
        found["gathered"] = gathered
    found["reference_stays"] = _equal(first, _reference_log_probs(policy, batches[0]))
    policy.refresh_reference()
    found["reference_moves"] = not _equal(first, _reference_log_probs(policy, batches[0]))
    found["losses"].append(policy.train_step(policy.score(batches[2]))["loss"])
    found["looked_up"] = all(torch.equal(policy.parameters[name], _by_hand(tensor)) for name, tensor in kept.items())
    reference = policy._reference.weights
    found["copies_as_counted"] = all(_copies(kept[name]) == 2 and _copies(reference[name]) == 1 for name in kept)
    found["in_fp8"] = sum(tensor.numel() for tensor in kept.values())
    found["of"] = sum(tensor.numel() for tensor in policy._own.values())
    found["same_on_all_ranks"] = _same(torch.cat([policy.parameters[name].flatten() for name in policy.parameters]), parallel)
    if parallel.world_size == 1:
        found["synced"] = _synced(policy)
    return found


def change_weights(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, Any]:
    """Two steps with bfloat16 weights, then the state through a policy that keeps them in FP8 and back: which of its tensors
    are the same bits, and the third step's loss before, between and after."""

    def policy(in_fp8: bool) -> Policy:
        trainer = config.trainer.model_copy(update={"fp8_parameters": in_fp8})
        return make_policy(config.model_copy(update={"trainer": trainer}), parallel, make_loss(config.algorithm), checkpoint)

    plain, between, back = policy(False), policy(True), policy(False)
    *before, last = (batch_of(step, plain.shape.vocab_size, config.trainer, parallel.dp_rank) for step in range(3))
    for batch in before:
        plain.train_step(plain.score(batch))
    state = plain.state.copy()
    between.state.load(state)
    back.state.load(between.state.copy())
    again = back.state.copy()
    return {
        "names": again.keys() == state.keys(),
        "optimizer": all(torch.equal(again[name], value) for name, value in state.items() if name.startswith("optimizer.")),
        "losses": [one.train_step(one.score(last))["loss"] for one in (plain, between, back)],
    }


def _begins_with(checkpoint: Policy, policy: Policy, kept: dict[str, Any]) -> bool:
    """Whether this rank's fp32 weights of the FP8 ones are the checkpoint's, and not what FP8 made of them."""
    state, parts = policy._optimizer.state(), 0
    for key in (key for key in state if key.endswith(".main")):
        local, _, part = key.removesuffix(".main").partition("[")
        name = next((name for name in kept if family_of(policy.shape).local_name(name) == local), None)
        if name is None:
            continue
        start, end = map(int, part.rstrip("]").split(":")) if part else (0, kept[name].numel())
        wanted, rounded = (one.parameters[name].detach().float().flatten()[start:end] for one in (checkpoint, policy))
        if not torch.equal(state[key].flatten(), wanted) or torch.equal(wanted, rounded):
            return False
        parts += 1
    return parts > 0


def _reference_log_probs(policy: Policy, batch: Batch) -> list[Any]:
    return [row.reference_log_probs for row in policy.score(batch).microbatches]


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def _gathers() -> Iterator[dict[str, int]]:
    """Bytes of the whole buffers that megatron-core gathers meanwhile, by their type."""
    from megatron.core.distributed import param_and_grad_buffer

    module: Any = param_and_grad_buffer
    gather, counted = module.dist_all_gather_func, dict[str, int]()

    def count(whole: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        name = str(whole.dtype)
        counted[name] = counted.get(name, 0) + whole.nbytes
        return gather(whole, *arguments, **options)

    module.dist_all_gather_func = count
    try:
        yield counted
    finally:
        module.dist_all_gather_func = gather


def _copies(tensor: Any) -> int:
    """Of a matrix's bytes, for products that read it in one direction or the other."""
    both = [getattr(tensor, name, None) for name in ("_rowwise_data", "_columnwise_data", "_data", "_transpose")]
    return sum(one is not None for one in both)


def _by_hand(tensor: Any) -> torch.Tensor:
    """Bytes times scales, rounded to bfloat16 once."""
    in_blocks = hasattr(tensor, "_rowwise_data")
    data = (tensor._rowwise_data if in_blocks else tensor._data).view(torch.float8_e4m3fn).float()
    scales = tensor._rowwise_scale_inv if in_blocks else tensor._scale_inv.view(1, 1)
    found = torch.empty(data.shape, dtype=torch.bfloat16, device=data.device)
    side = BLOCK if in_blocks else max(data.shape)
    for row in range(0, data.size(0), side):
        for col in range(0, data.size(1), side):
            block = data[row : row + side, col : col + side]
            found[row : row + side, col : col + side] = block * scales[row // side, col // side]
    return found


def _same(mine: torch.Tensor, parallel: ParallelState) -> bool:
    """Whether all data-parallel ranks hold the same."""
    others = [torch.empty_like(mine) for _ in range(parallel.dp_size)]
    dist.all_gather(others, mine.detach(), group=parallel.dp_group)
    return all(torch.equal(one, mine) for one in others)


def _synced(policy: Policy) -> bool:
    """Whether an engine holds, after a sync of two tensor ranks, what an export of the policy says, to the bit."""
    plan = export_plan(policy.shape, policy.layout, policy.dtype, 1 << 20)
    exported = {name: full.cpu() for bucket in plan for name, full in policy.gathering.bucket(bucket, policy.parameters) or ()}
    case = Case(policy.shape, policy.layout, engine=EngineLayout(2), bucket_bytes=100_000, dtype="bfloat16")
    world = World(case)
    assert all(message.bucket.packed for message in world.plan.messages), "what is made for a look cannot be sent from there"
    on_host = {name: tensor.detach().cpu() for name, tensor in policy.parameters.items()}
    held: Any = on_host if torch.cuda.is_available() else policy.parameters
    world.model, world.held = exported, {0: held}
    said = world.sync()
    world.check()
    return not said and len(exported) > 0
