"""What the ranks of the pool are asked to do; each case runs on every rank and returns something JSON can say. The
comparisons are made in the tests, in one process, from the files that the cases leave.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.algorithms.base import Loss
from engine.algorithms.nll import NllLoss
from engine.algorithms.registry import make_loss
from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.errors import NumericsError
from engine.core.tensor_files import write_tensors
from engine.core.types import IGNORED, Batch, Microbatch
from engine.megatron.packing import make_batch
from engine.megatron.parallel_state import ParallelState, open_parallel_state
from engine.megatron.policy import Policy
from engine.megatron.reshard import SavedOptimizer
from engine.megatron.scatter import scatter_batch
from engine.models.config_file import read_shape
from engine.models.export_plan import export_files, export_plan, file_bytes, in_turns
from engine.models.hf import HfCheckpoint, shard_names, write_companions
from engine.models.sharding import trainer_layout
from engine.ops import lm_head_log_probs, log_square_probs, token_log_probs
from engine.run.milestones import files_of_turn
from engine.run.spec import assemble
from tests import reference_ops
from tests.builders import algorithm_options
from tests.parallel.fp8_case import change_weights, fp8_parameters
from tests.parallel.material import ALGORITHMS, batch_of, pairs_in_a_group, run_config, sequences
from tests.parallel.memory_case import memory
from tests.parallel.policies import make_policy
from tests.parallel.pretended_gpu import pretended_gpu
from tests.parallel.streamed_case import streamed

Case = Callable[..., Any]
TIMEOUT = timedelta(seconds=60)
FILE_BYTES = 20_000  # of a file of weights, so that ranks have several


def run(name: str, place: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """Opens this rank's parallel, runs a case of this file and leaves torch.distributed again."""
    cases: dict[str, Case] = {
        "train": train,
        "export": export,
        "resume": resume,
        "leave": leave,
        "go_on": go_on,
        "without_signal": without_signal,
        "seed": seed,
        "infinite": infinite,
        "curve": curve,
        "change_layers": change_layers,
        "offload": offload,
        "fp8_moments": fp8_moments,
        "fp8_parameters": fp8_parameters,
        "change_weights": change_weights,
        "log_probs": log_probs,
        "distribution": distribution,
        "without_reference": without_reference,
        "memory": memory,
        "same_steps": same_steps,
        "makes_room": makes_room,
        "scattered": scattered,
        "streamed": streamed,
    }
    config = run_config(arguments.pop("trainer"), arguments.pop("options", {}))
    store = dist.FileStore(place["store"], place["world_size"])
    rank, world_size = place["rank"], place["world_size"]
    parallel = open_parallel_state(config.trainer, rank=rank, world_size=world_size, store=store, timeout=TIMEOUT)
    try:
        return cases[name](config, parallel, **arguments)
    finally:
        parallel.close()


def loss_of(name: str) -> Loss:
    """The loss under test by its short name."""
    return NllLoss() if name == "nll" else make_loss(algorithm_options(ALGORITHMS[name]))


def full_tensors(policy: Policy, prefix: str) -> dict[str, torch.Tensor]:
    """This leader's Hugging Face tensors of what the policy now serves, in small buckets; empty off the leaders."""
    plan = export_plan(policy.shape, policy.layout, policy.dtype, 20_000)
    gathered = [policy.gathering.bucket(bucket, policy.parameters) for bucket in plan]
    return {prefix + name: value for bucket in gathered if bucket is not None for name, value in bucket}


def logits(policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
    """Full-vocabulary logits [L, V] of the positions with a target, by microbatch, on the last stage's first tensor rank."""
    parallel = policy.parallel

    def collect(local: torch.Tensor, _: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        return local.sum(), local.detach().clone()

    with torch.no_grad():
        rows = policy.run(batch, collect, forward_only=True)
    full = {}
    for index, row in enumerate(rows):
        shards = [torch.empty_like(row) for _ in range(parallel.tp_size)]
        dist.all_gather(shards, row, group=parallel.tp_group)
        full[f"logits.{index}"] = torch.cat(shards, 1)[:, : policy.shape.vocab_size].contiguous()
    return full if parallel.tp_rank == 0 and parallel.dp_rank == 0 else {}


def collect_gradients(policy: Policy) -> None:
    """Makes every `main_grad` whole after a step under the distributed optimizer, whose reduce-scatter leaves a rank
    with its shard of each bucket and unreduced gradients elsewhere. The next step zeroes them all."""
    parallel = policy.parallel
    buffers = [buffer for chunk in policy._chunks for buffer in chunk.buffers]
    for bucket in [bucket for buffer in buffers for bucket in buffer.buckets]:
        own = bucket.grad_data.view(parallel.dp_size, -1)[parallel.dp_rank].clone()
        dist.all_gather_into_tensor(bucket.grad_data, own, group=parallel.dp_group)


def train(config: RunConfig, parallel: ParallelState, checkpoint: str, loss: str, output: str) -> list[dict[str, float]]:
    """Three steps; leaders write logits before them, gradients of each (as clipped) and weights after. Returns the
    metrics."""
    policy = make_policy(config, parallel, loss_of(loss), checkpoint)
    kept: dict[str, torch.Tensor] = {}
    metrics = []
    for step in range(3):
        batch = batch_of(step, policy.shape.vocab_size, config.trainer, parallel.dp_rank, pairs_in_a_group(loss))
        if step == 0 and not config.trainer.fused_lm_head:
            kept |= logits(policy, batch)
        metrics.append(policy.train_step(policy.score(batch)))
        if config.trainer.distributed_optimizer:
            collect_gradients(policy)
        parameters: dict[str, Any] = {**policy.parameters}
        # In the parameters' own type: another would cost them the hooks that reduce their gradients.
        with policy.serving({name: parameter.main_grad.to(parameter.dtype) for name, parameter in parameters.items()}):
            kept |= full_tensors(policy, f"gradient.{step}.")
    kept |= full_tensors(policy, "weight.")
    if kept:
        whole = {name: value.contiguous() for name, value in kept.items()}
        save_file(whole, Path(output) / f"{parallel.rank}.safetensors")
    return metrics


def export(config: RunConfig, parallel: ParallelState, checkpoint: str, output: str) -> int:
    """Leaders write every tensor as it was read; how many they hold."""
    tensors = full_tensors(make_policy(config, parallel, NllLoss(), checkpoint), "")
    if tensors:
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, Path(output) / f"{parallel.rank}.safetensors")
    return len(tensors)


def through_files(policy: Policy, checkpoint: str, folder: Path) -> Callable[[Policy], None]:
    """The policy's state as a checkpoint has it, all ranks writing their files of its weights and its reference's; what
    another policy takes it with. Collective."""
    parallel = policy.parallel
    plan = export_files(
        policy.shape, policy.layout, parallel.dp_size, policy.dtype, 10_000, min_file_bytes=1, max_file_bytes=FILE_BYTES
    )
    names = dict(zip(shard_names(len(plan)), (file.names for file in plan), strict=True))
    state = policy.state.copy(weights=False)
    assert not any(name.startswith(("policy.", "reference.")) for name in state)
    sets: tuple[Literal["policy"], Literal["reference"]] = ("policy", "reference")
    num_written = 0
    for which in sets[: 1 + policy.has_reference]:
        (folder / which).mkdir(parents=True, exist_ok=True)
        digests = dict[int, str]()
        for index, tensors in policy.files(plan, of=which).items():
            assert set(tensors) == set(plan[index].names)
            assert sum(tensor.nbytes for tensor in tensors.values()) == file_bytes(plan[index], policy.dtype), "as planned"
            digests[index] = write_tensors(folder / which / [*names][index], tensors).sha256
            num_written += 1
        if which == "policy":
            turns = [files_of_turn(policy, plan, turn) for turn in in_turns(plan)]
            assert len(turns) > 1 and all(len(found) <= 1 for found in turns), "a file of this rank's at a time"
            again = folder / f"again_{parallel.rank}"
            found = {index: write_tensors(again, tensors).sha256 for turn in turns for index, tensors in turn.items()}
            assert found == digests, "in turns it is the same to the byte"
        if parallel.rank == 0:
            write_companions(folder / which, names, policy.dtype, 0, checkpoint)
    written = torch.tensor(num_written)
    dist.all_reduce(written)
    assert int(written) == len(plan) * (1 + policy.has_reference), "each file is one rank's"
    read = [HfCheckpoint(folder / which) for which in sets[: 1 + policy.has_reference]]
    return lambda other: other.state.load_checkpoint(state, *read)


def leave(config: RunConfig, parallel: ParallelState, checkpoint: str, output: str) -> list[dict[str, float]]:
    """Two steps, a reference that moved after the first, the state as a checkpoint has it, and two more; all metrics."""
    policy = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    metrics = _steps(policy, config, range(1))
    policy.refresh_reference()
    metrics += _steps(policy, config, range(1, 2))
    through_files(policy, checkpoint, Path(output))
    save_file(policy.state.copy(weights=False), Path(output) / f"{parallel.rank}.safetensors")
    return metrics + _steps(policy, config, range(2, 4))


def go_on(
    config: RunConfig, parallel: ParallelState, checkpoint: str, output: str, before: dict[str, Any]
) -> list[dict[str, float]]:
    """The last two steps of `leave` in another layout than `before`; their metrics. The state is left as `leave` does."""
    policy = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    writer = Trainer.model_validate(before)
    saved = SavedOptimizer(
        policy.shape,
        trainer_layout(writer),
        writer.data_parallel,
        lambda rank: safe_open(Path(output) / f"{rank}.safetensors", framework="pt"),
    )
    state = policy.state.of_other_layout(saved)
    policy.state.load_checkpoint(state, *(HfCheckpoint(Path(output) / which) for which in ("policy", "reference")))
    assert policy.state.copy(weights=False).keys() == state.keys()
    return _steps(policy, config, range(2, 4))


def _steps(policy: Policy, config: RunConfig, which: range) -> list[dict[str, float]]:
    batches = [batch_of(step, policy.shape.vocab_size, config.trainer, policy.parallel.dp_rank) for step in which]
    return [policy.train_step(policy.score(batch)) for batch in batches]


def resume(config: RunConfig, parallel: ParallelState, checkpoint: str, output: str) -> dict[str, bool]:
    """Three steps in one go, and the last of them again by policies from the first one's state, as one has it that holds all,
    and as a checkpoint has it, whose reference is older than its weights."""

    def steps(policy: Policy, which: range) -> list[dict[str, float]]:
        return _steps(policy, config, which)

    file = Path(output) / f"state.{parallel.rank}.safetensors"
    first = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    save_file(first.state.copy(), file)
    untrained = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    untrained.state.load(load_file(file))
    steps(first, range(1))
    mixed = True
    if first.has_reference:
        mix, before = config.sync.reference_mix, first.state.copy()
        first.refresh_reference()
        for name, now in first.state.copy().items():
            if name.startswith("reference."):
                own, old = before[name.replace("reference.", "policy.", 1)], before[name]
                between = torch.allclose(now, old + mix * (own - old), rtol=1e-6, atol=1e-8) and not torch.equal(now, old)
                mixed &= between if mix < 1 else torch.equal(now, own)
    save_file(first.state.copy(), file)
    whole = steps(first, range(1, 2))
    resume_at_two = through_files(first, checkpoint, Path(output) / "files")
    whole += steps(first, range(2, 3))
    second = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    second.state.load(load_file(file))
    again = steps(second, range(1, 3))
    third = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    resume_at_two(third)
    last = steps(third, range(2, 3))
    ours, theirs, of_files = first.state.copy(), second.state.copy(), third.state.copy()
    return {
        "metrics": whole == again and whole[1:] == last,
        "keys": list(ours) == list(theirs) == list(of_files),
        "tensors": all(torch.equal(ours[name], other[name]) for name in ours for other in (theirs, of_files)),
        "mixed": mixed,
        "from_start": steps(untrained, range(1)) == steps_of_seed(config, parallel, checkpoint),
    }


def steps_of_seed(config: RunConfig, parallel: ParallelState, checkpoint: str) -> list[dict[str, float]]:
    """The first step of a policy that was never saved."""
    policy = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    batch = batch_of(0, policy.shape.vocab_size, config.trainer, parallel.dp_rank)
    return [policy.train_step(policy.score(batch))]


def curve(config: RunConfig, parallel: ParallelState, checkpoint: str, num_steps: int) -> list[dict[str, float]]:
    """Metrics of `num_steps` DPO steps over two batches that alternate; scoring must leave the state as it was."""
    policy = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    batches = [batch_of(step, policy.shape.vocab_size, config.trainer, parallel.dp_rank) for step in range(2)]
    metrics = []
    for step in range(num_steps):
        before = policy.state.copy()
        scored = policy.score(batches[step % 2])
        assert all(torch.equal(before[name], value) for name, value in policy.state.copy().items()), "scoring moved the state"
        metrics.append(policy.train_step(replace(scored, step=step)))
    return metrics


def makes_room(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, bool]:
    """Three steps as they are, and with the optimizer's state on the host before each of them, whether it was there yet or
    not; and a third one after a state that was loaded while the optimizer's own was on the host."""
    options = config.optimizer.model_copy(update={"memory_while_sampling": "host"})
    hosted = config.model_copy(update={"optimizer": options})
    loss = make_loss(config.algorithm)
    plain, policy, other = (make_policy(made, parallel, loss, checkpoint) for made in (config, hosted, hosted))
    found = dict.fromkeys(("freed", "restored", "state", "saved", "metrics", "loaded"), True)

    def memory(held: Policy) -> list[int]:
        return [storage.nbytes() for slot in held._optimizer._slots for storage in slot.storages()]

    def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
        return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)

    for step in range(3):
        before, sizes = policy.state.copy(), memory(policy)
        policy.make_room()
        found["freed"] &= len(sizes) == len(memory(policy)) and not any(memory(policy))
        found["saved"] &= equal(policy.state.copy(), before)
        if step == 2:
            other.make_room()
            other.state.load(before)
            found["loaded"] &= not any(memory(other)) and equal(other.state.copy(), before)
            again = _steps(other, config, range(2, 3))
        one, two = (_steps(held, config, range(step, step + 1)) for held in (plain, policy))
        found["metrics"] &= one == two
        found["restored"] &= all(memory(policy)) and sum(memory(policy)) >= sum(sizes) > (0 if step else -1)
        found["state"] &= equal(policy.state.copy(), plain.state.copy())
    found["loaded"] &= again == two and equal(other.state.copy(), plain.state.copy())
    return found


def same_steps(config: RunConfig, parallel: ParallelState, checkpoint: str, other: dict[str, Any]) -> dict[str, Any]:
    """Three steps, before the last of which the reference moves, with the configuration and with `other` trainer options, where
    gradients are given back in between: whether metrics and states have the same bits, and how far the weights are apart."""

    def run(changes: dict[str, Any]) -> tuple[list[dict[str, float]], Policy]:
        trainer = config.trainer.model_copy(update=changes)
        made = config.model_copy(update={"trainer": trainer})
        policy = make_policy(made, parallel, make_loss(config.algorithm), checkpoint)
        metrics = _steps(policy, config, range(2))
        if changes:
            policy.give_back_gradients()
            assert not any(buffer.grad_data.untyped_storage().nbytes() for chunk in policy._chunks for buffer in chunk.buffers)
        policy.refresh_reference()
        return metrics + _steps(policy, config, range(2, 3)), policy

    (metrics, plain), (others, policy) = run({}), run(other)
    one, two = plain.state.copy(), policy.state.copy()
    weights = [name for name in one if name.startswith("policy.")]
    return {
        "metrics": metrics == others,
        "tensors": list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one),
        "apart": max(float((one[name].float() - two[name].float()).abs().max()) for name in weights),
        "moved": max(abs(row["grad_norm"]) for row in others),
        "dtypes": sorted({str(buffer.grad_data.dtype) for chunk in policy._chunks for buffer in chunk.buffers}),
        "norms": [(row["grad_norm"], own["grad_norm"]) for row, own in zip(metrics, others, strict=True)],
    }


def change_layers(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, Any]:
    """Two steps with the local spec, then its state through a policy with the configured one and back: whether both hold
    the same bits, and the losses of the third step before, between and after."""

    def with_layers(layers: str) -> Policy:
        trainer = config.trainer.model_copy(update={"layers": layers})
        return make_policy(config.model_copy(update={"trainer": trainer}), parallel, make_loss(config.algorithm), checkpoint)

    def steps(policy: Policy, which: range) -> float:
        batches = [batch_of(step, policy.shape.vocab_size, config.trainer, parallel.dp_rank) for step in which]
        return [policy.train_step(policy.score(batch))["loss"] for batch in batches][-1]

    local = with_layers("local")
    steps(local, range(2))
    state = local.state.copy()
    between, back = with_layers(config.trainer.layers), with_layers("local")
    between.state.load(state)
    back.state.load(between.state.copy())
    again = back.state.copy()
    return {
        "names": again.keys() == state.keys(),
        "tensors": all(torch.equal(again[name], value) for name, value in state.items()),
        "losses": [steps(policy, range(2, 3)) for policy in (local, between, back)],
    }


def offload(config: RunConfig, parallel: ParallelState, checkpoint: str, output: str) -> dict[str, Any]:
    """What `resume` returns with part of the optimizer's state on the host, and how far three steps of it are from three
    without. On a CPU the model's memory plays the GPU's."""
    with nullcontext() if torch.cuda.is_available() else pretended_gpu():
        found: dict[str, Any] = dict(resume(config, parallel, checkpoint, output))
        states = []
        for share in (config.optimizer.offload_share, 0.0):
            optimizer = config.optimizer.model_copy(update={"offload_share": share})
            policy = make_policy(
                config.model_copy(update={"optimizer": optimizer}), parallel, make_loss(config.algorithm), checkpoint
            )
            for step in range(3):
                policy.train_step(policy.score(batch_of(step, policy.shape.vocab_size, config.trainer, parallel.dp_rank)))
            states.append(policy.state.copy())
            if share:
                adam = policy._optimizer._optimizer.optimizer
                hosted = sum(p.numel() for one in adam.cpu_optimizers for group in one.param_groups for p in group["params"])
    names = [name for name in states[1] if name.startswith("policy.")]
    worst = max(float((states[0][name].float() - states[1][name].float()).abs().max()) for name in names)
    return found | {"worst": worst, "hosted": hosted / sum(states[1][name].numel() for name in names)}


def fp8_moments(config: RunConfig, parallel: ParallelState) -> dict[str, Any]:
    """Two steps of Transformer Engine's AdamW with FP8 moments, on gradients of 0 and of 1."""
    from engine.megatron.te_adam import TeAdam

    weight: Any = torch.nn.Parameter(torch.ones(48, dtype=torch.bfloat16, device=parallel.device))
    narrow = {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.uint8}
    adam = TeAdam([weight], 0.1, master_weights=True, use_decoupled_grad=True, store_param_remainders=True, **narrow)
    found: dict[str, Any] = {}
    for name, gradient in (("zero", 0.0), ("one", 1.0)):
        weight.decoupled_grad = torch.full((48,), gradient, device=parallel.device)
        adam.step()
        moment = adam.state[weight]["exp_avg"]
        found |= {name: moment.float().tolist(), "transposed": moment._transpose is not None}
    return found | {"finite": bool(weight.isfinite().all())}


def without_signal(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, Any]:
    """A step of pairs, one of none at all, one of a single pair, and the last of them again by a second policy from the state
    after the empty one. What moved: the metric of each step, and the names in the state that the empty step changed."""
    if config.optimizer.offload_share and not torch.cuda.is_available():
        with pretended_gpu():
            return _without_signal(config, parallel, checkpoint)
    return _without_signal(config, parallel, checkpoint)


def _without_signal(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, Any]:
    policy = make_policy(config, parallel, loss_of("dpo"), checkpoint)
    made = [sequences(0, policy.shape.vocab_size), [], sequences(2, policy.shape.vocab_size)[:2]]
    batches = [
        make_batch(rows, step=step, num_prompts=5, trainer=config.trainer, dp_rank=parallel.dp_rank)
        for step, rows in enumerate(made)
    ]
    steps, states = [], []
    for batch in batches:
        steps.append(policy.train_step(policy.score(batch)))
        states.append(policy.state.copy())
    changed = [name for name, value in states[1].items() if not torch.equal(value, states[0][name])]
    second = make_policy(config, parallel, loss_of("dpo"), checkpoint)
    second.state.load(states[1])
    again = second.train_step(second.score(batches[2]))
    resumed = again == steps[2] and all(torch.equal(value, states[2][name]) for name, value in second.state.copy().items())
    return {
        "updated": [step["updated"] for step in steps],
        "rates": [step["learning_rate"] for step in steps],
        "norm": steps[1]["grad_norm"],
        "changed": changed,
        "resumed": resumed,
    }


def scattered(config: RunConfig, parallel: ParallelState, steps: list[int]) -> list[bool]:
    """Whether the batch that rank 0 deals and sends this rank is what the rank makes of all sequences itself, of steps of so
    many sequences."""
    found = []
    for step, count in enumerate(steps):
        made = sequences(step, 67)[:count]
        received = scatter_batch(made if parallel.rank == 0 else None, 5, step, config.trainer, parallel, attention=1e-3)
        layout: dict[str, Any] = {"trainer": config.trainer, "dp_rank": parallel.dp_rank, "attention": 1e-3}
        found.append(_equal_batches(received, make_batch(made, step=step, num_prompts=5, **layout)))
    return found


def _equal_batches(one: Batch, other: Batch) -> bool:
    """Bit for bit, dtypes too."""
    if replace(one, microbatches=()) != replace(other, microbatches=()) or len(one.microbatches) != len(other.microbatches):
        return False
    columns = [
        (getattr(a, field.name), getattr(b, field.name))
        for a, b in zip(one.microbatches, other.microbatches, strict=True)
        for field in fields(Microbatch)
    ]
    tensors = [(a, b) for a, b in columns if isinstance(a, torch.Tensor)]
    rest = [(a, b) for a, b in columns if not isinstance(a, torch.Tensor)]
    tensors += [(a[name], b[name]) for a, b in rest if isinstance(a, dict) and a.keys() == b.keys() for name in a]
    return all(a.keys() == b.keys() if isinstance(a, dict) else a is b for a, b in rest) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors
    )


def seed(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, bool]:
    """Two steps, the reference moved between them where it may: whether the parameters are the seed model's while
    `as_seed` is entered and the trained ones after it, also in a policy that resumed."""

    def weights(policy: Policy) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}

    def equal(policy: Policy, wanted: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(parameter, wanted[name]) for name, parameter in policy.parameters.items())

    loss, copies = make_loss(config.algorithm), assemble(config, read_shape(checkpoint)).copies
    policy = make_policy(config, parallel, loss, checkpoint, copies=copies)
    before = weights(policy)
    for step in range(2):
        policy.train_step(policy.score(batch_of(step, policy.shape.vocab_size, config.trainer, parallel.dp_rank)))
        if config.schedule.reference_due(step + 1):
            policy.refresh_reference()
    trained = weights(policy)
    resumed = make_policy(config, parallel, loss, checkpoint, copies=copies)
    resumed.state.load(policy.state.copy())
    found = {}
    for name, one in (("first", policy), ("resumed", resumed)):
        with one.as_seed():
            found[f"{name}_lends_the_seed"] = equal(one, before) and not equal(one, trained)
        found[f"{name}_takes_it_back"] = equal(one, trained)
    return found


def distribution(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, Any]:
    """Log-probs of policy and reference of a step by microbatch on the last stage; where the head is fused, their distance
    from float64 products of the same hidden states."""
    policy = make_policy(config, parallel, make_loss(config.algorithm), checkpoint)
    batch = policy.score(batch_of(0, policy.shape.vocab_size, config.trainer, parallel.dp_rank))
    own = policy.log_probs(batch)
    found: dict[str, Any] = {
        "own": [row.tolist() for row in own],
        "reference": [m.reference_log_probs.tolist() for m in batch.microbatches if m.reference_log_probs is not None],
    }
    if config.trainer.fused_lm_head:
        assert policy._target_log_probs is not None
        weight, temperature = policy._target_log_probs.weight, config.log_prob_temperature

        def exact(hidden: torch.Tensor, row: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
            valid = weight.detach().double()[: policy.shape.vocab_size]
            targets = row.targets[row.target_positions]
            log_probs = reference_ops.lm_head_log_probs(hidden.detach().double(), valid, targets, temperature=temperature)
            return log_probs.sum(), log_probs

        with torch.no_grad():
            wanted = policy.run(batch, exact, forward_only=True)
        own = [row[microbatch.target_positions] for row, microbatch in zip(own, batch.microbatches, strict=True)]
        found["distance"] = max(float((a - b).abs().max()) for a, b in zip(own, wanted, strict=True))
    return found


def without_reference(config: RunConfig, parallel: ParallelState, checkpoint: str, loss: str) -> dict[str, bool]:
    """Three steps of a policy whose reference is the policy itself, and of one that keeps a copy, copied before every step, and
    makes the pass; then a step of one whose reference is what sampled. What the second knows of a reference is left out by
    the others, and nothing else."""
    batches = [batch_of(step, 67, config.trainer, parallel.dp_rank, 2) for step in range(3)]
    policies = [make_policy(config, parallel, loss_of(loss), checkpoint)]
    for source in ("pass", "rollouts"):
        with patch.object(RunConfig, "reference_source", source):
            policies.append(make_policy(config, parallel, loss_of(loss), checkpoint))
    without, keeps, of_rollouts = policies
    found = []
    for batch in batches:
        keeps.refresh_reference()
        without.refresh_reference()
        found.append(without.train_step(without.score(batch)) == keeps.train_step(keeps.score(batch)))
    ours, theirs = without.state.copy(), keeps.state.copy()
    kept = {name for name in theirs if name.startswith("reference")}
    keeps.refresh_reference()
    rows = []  # as if the reference had sampled them, to the bit
    for row, scored in zip(batches[0].microbatches, keeps.score(batches[0]).microbatches, strict=True):
        known = scored.reference_log_probs  # on the last stage
        rows.append(row if known is None else replace(row, rollout_log_probs=known))
    batch = replace(batches[0], microbatches=tuple(rows))
    of_rollouts.state.load({name: value for name, value in theirs.items() if name not in kept})
    again = [policy.train_step(policy.score(batch)) for policy in (of_rollouts, keeps)]
    return {
        "metrics": all(found),
        "state": ours.keys() == theirs.keys() - kept and all(torch.equal(ours[name], theirs[name]) for name in ours),
        "copies": [policy.has_reference for policy in policies] == [False, True, False] and bool(kept),
        "rollouts": again[0] == again[1],
    }


def infinite(config: RunConfig, parallel: ParallelState, checkpoint: str) -> dict[str, Any]:
    """One GRPO step where a single advantage of a single rank is infinite."""
    policy = make_policy(config, parallel, loss_of("grpo"), checkpoint)
    batch = batch_of(7, policy.shape.vocab_size, config.trainer, parallel.dp_rank)
    if parallel.dp_rank == parallel.dp_size - 1:
        row = batch.microbatches[0]
        row.advantages[row.places.argmax()] = float("inf")
    before = policy.state.copy()
    try:
        policy.train_step(policy.score(batch))
    except NumericsError as error:
        after = policy.state.copy()
        return {"message": str(error), "untouched": all(torch.equal(before[name], after[name]) for name in before)}
    return {"message": "", "untouched": False}


def log_probs(config: RunConfig, parallel: ParallelState, num_valid: int) -> dict[str, Any]:
    """Token log-probs and the LM head on this rank's columns against the whole vocabulary on one rank: the largest
    differences of values and gradients, and what the collectives of the first carried."""
    generator = torch.Generator().manual_seed(5)
    num_tokens, hidden_size, size, here = 9, 16, parallel.tp_size, parallel.tp_rank
    width = -(-num_valid // size)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(width * size, hidden_size, generator=generator)
    targets = torch.randint(0, num_valid, (num_tokens,), generator=generator)
    targets[3] = IGNORED
    weights = torch.randn(2, num_tokens, generator=generator)
    part = slice(here * width, (here + 1) * width)

    def token(columns: slice, **options: Any) -> list[torch.Tensor]:
        logits = (hidden.clone().requires_grad_() @ weight.t())[:, columns]
        values, entropy = token_log_probs(logits, targets, num_valid=num_valid, with_entropy=True, **options)
        assert entropy is not None
        return [values, entropy, *torch.autograd.grad((weights[0] * values + weights[1] * entropy).sum(), logits)]

    def head(columns: slice, **options: Any) -> list[torch.Tensor]:
        x, w = hidden.clone().requires_grad_(), weight[columns].clone().requires_grad_()
        values = lm_head_log_probs(x, w, targets, num_valid=num_valid, chunk_rows=4, **options)
        return [values, *torch.autograd.grad((weights[0] * values).sum(), (x, w))]

    def worst(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True) if a.numel())

    mine: dict[str, Any] = {"vocab_start": part.start, "group": parallel.tp_group}
    whole = slice(0, width * size)
    with patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gathers:
        found = token(part, **mine)
    wanted = token(whole)
    logits = hidden @ weight.t()
    squares = log_square_probs(logits[:, part], num_valid=num_valid, temperature=0.7, **mine)
    of_all = (logits.double()[:, :num_valid] / 0.7).softmax(-1).square().sum(-1).log().float()
    single, once = head(part, coefficients=weights[0], **mine), head(part, **mine)
    full = head(whole)
    return {
        "token": worst(found, [*wanted[:2], wanted[2][:, part]]),
        "squares": worst([squares], [of_all]),
        "single_pass": worst(single, [*full[:2], full[2][part]]),
        "recomputed": worst(once, [*full[:2], full[2][part]]),
        "bytes_a_row": [call.args[1].nbytes / num_tokens for call in gathers.call_args_list],
    }
