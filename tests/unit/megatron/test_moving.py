"""How often the host waits for a GPU while it trains, counted without one: a step of the policy runs on fake tensors of a GPU,
and every copy from the host's memory and everything that asks the device for a value is counted. Only megatron-core's schedule
and the layers are replaced by the plainest ones.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from engine.algorithms.base import Loss
from engine.algorithms.registry import make_loss
from engine.config.options import Trainer
from engine.megatron import policy as policies
from engine.megatron import spread
from engine.megatron.moving import Rows
from engine.megatron.packing import make_batch
from engine.megatron.policy import Policy
from engine.megatron.reference import Reference
from engine.megatron.target_log_probs import TargetLogProbs
from engine.ops import to_device
from tests import builders
from tests.builders import algorithm_options
from tests.rollouts import make_sequence
from tests.unit.algorithms.steps import Step
from tests.unit.ops.counted import Counted

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
VOCABULARY, HIDDEN = 64, 8
needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch's CPU build refuses a copy to a GPU, also of fake tensors"
)
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo"},
    "group_dpo": {"loss": "group_dpo", "alpha": 0.01},
    "grpo": {"loss": "grpo", "kl_weight": 0.1},
    "grpo by length": {"loss": "grpo", "kl_weight": 0.1, "normalize_length": True},
    "gspo": {"loss": "grpo", "kl_weight": 0.1, "ratio_level": "geometric"},
    "truncated": {"loss": "grpo", "kl_weight": 0.0, "correction": "truncate", "correction_high": 2.0},
    "cispo": {"loss": "cispo"},
    "oapl": {"loss": "oapl"},
}


def batch_of(num_rows, *, microbatch_tokens=60):
    """Rows of three samples each, which share a prompt: a pair, and one more of another group."""
    made = []
    for row in range(num_rows):
        for sample in range(3):
            advantage, group = float(sample) - 1, row if sample < 2 else -1
            values = {"share_of_group": 1 / 3}
            tokens = range(1, 6 + sample)
            made.append(
                make_sequence((row + 1,) * 20, tokens, [-1.0] * len(tokens), advantage, group, sample == 0, values=values)
            )
    trainer = Trainer(microbatch_tokens=microbatch_tokens)
    batch = make_batch(made, step=0, num_prompts=num_rows, trainer=trainer, dp_rank=0)
    assert len(batch.microbatches) == num_rows and all((row.parents >= 0).any() for row in batch.microbatches)
    return batch


@torch.no_grad()
def backward(loss):
    """torch's backward, node after node: torch's own asks for the streams of a GPU that there is not."""
    order, seen = [], set()

    def visit(node):
        if node is not None and node not in seen:
            seen.add(node)
            for other, _ in node.next_functions:
                visit(other)
            order.append(node)

    visit(loss.grad_fn)
    known: dict[Any, list[Any]] = {node: [None] * max(1, len(node._input_metadata)) for node in order}
    known[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(order):
        if not node.next_functions or all(gradient is None for gradient in known[node]):
            continue
        found = node.apply(*known[node]) if hasattr(node, "apply") else node(*known[node])
        functions = [function for function in node.next_functions if function[0] is not None]
        gradients = [gradient for gradient in (found if isinstance(found, tuple) else (found,)) if gradient is not None]
        for (other, place), gradient in zip(functions, gradients, strict=True):
            before = known[other][place]
            known[other][place] = gradient if before is None else before + gradient
    return sum(gradient is not None for node in order if not node.next_functions for gradient in known[node])


def schedule(*, forward_step_func, data_iterator, model, num_microbatches, forward_only, **_):
    """megatron-core's schedule of one stage."""
    collected = []
    for _row in range(num_microbatches):
        output, finish = forward_step_func(data_iterator, model)
        loss, _, kept = finish(output)
        if not forward_only:
            assert backward(loss) == 2, "the embedding and the output layer"
        collected.append(kept)
    return collected


def policy_of(loss, device, *, headless=False):
    """A policy without megatron-core, whose model is an embedding and an output layer."""
    policy: Any = object.__new__(Policy)
    embedding = torch.zeros(VOCABULARY, HIDDEN, device=device, requires_grad=True)
    weight = torch.zeros(VOCABULARY, HIDDEN, device=device, requires_grad=True)

    def model(token_ids, position_ids, mask, *, packed_seq_params):
        hidden = torch.nn.functional.embedding(token_ids[0], embedding).index_select(0, packed_seq_params.target_positions)
        return (hidden if headless else hidden @ weight.t()).unsqueeze(0)

    policy.parallel = SimpleNamespace(device=device, is_last_stage=True)
    policy.loss, policy._rows, policy._chunks = loss, Rows(device), [model]
    config = builders.config("run", trainer={"fused_lm_head": headless, "fuse_gradient_accumulation": False})
    policy._target_log_probs = TargetLogProbs(config, weight, VOCABULARY, 0, None)
    policy._own, policy._reference_source = {}, "pass"
    policy._reference = Reference(policy._own, device, on_host=False, mix=1.0)
    policy._rows_together = policy._row_multiple = 1
    policy._fp8 = SimpleNamespace(untouched=nullcontext)
    return policy


@pytest.fixture
def no_schedule(monkeypatch):
    monkeypatch.setattr(policies, "get_forward_backward_func", lambda: schedule)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def counted_step(name, num_rows, *, headless=False):
    """Scores with the reference and trains: a step of `num_rows` rows, on fake tensors of a GPU."""
    batch = batch_of(num_rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = policy_of(make_loss(algorithm_options(LOSSES[name])), GPU, headless=headless)
        with Counted() as count:
            parts = policy._backward(policy.score(batch))
    assert len(parts) == num_rows and parts[0].device == GPU
    return count


@needs_cuda_build
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_costs_one_copy_that_nobody_waits_for(no_schedule, name):
    """Whichever passes a step has. Before, a pass made 15 copies of a row, 19 where prompts are shared, and the loss one or two
    more; and the host waited for each of them."""
    for num_rows in (1, 3):
        count = counted_step(name, num_rows)
        assert not count.host_waits
        assert count.copies == {"queued": num_rows}


@needs_cuda_build
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_fused_output_layer_waits_for_nothing_either(no_schedule, name):
    """With coefficients known beforehand and without."""
    count = counted_step(name, 2, headless=True)
    assert not count.host_waits
    assert count.copies == {"queued": 2}


@needs_cuda_build
def test_a_row_is_copied_again_when_nobody_held_it_any_more():
    rows, given = None, batch_of(1).microbatches[0]
    with FakeTensorMode(allow_non_fake_inputs=True), Counted() as count:
        rows = Rows(GPU)
        first, _ = rows(given)
        again, _ = rows(replace(given, reference_log_probs=given.rollout_log_probs))
    assert count.copies == {"queued": 1}, "what was made of a row, with a column of its own for another, is known"
    assert again.token_ids is first.token_ids and again.reference_log_probs is first.rollout_log_probs
    assert {column.untyped_storage()._cdata for column in (first.token_ids, first.pairs, first.chosen)} == {
        first.split.untyped_storage()._cdata
    }
    assert len(rows._columns) == 16
    del given
    assert not len(rows._columns) and not len(rows._layouts)


def test_a_row_on_a_cpu_is_itself():
    (given,) = batch_of(1).microbatches
    moved, row = Rows(CPU)(given)
    assert moved is given
    assert row.cu_seqlens_q is given.cu_seqlens and row.shared is not None


def test_what_is_copied_together_keeps_its_values(monkeypatch):
    """Of any type and shape, also without elements, aligned, and what is on the device already is left alone."""
    tensors = [
        torch.arange(7),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.tensor([True, False, True]),
        torch.randn(3, 5),
        torch.tensor(2.5),
        torch.arange(6, dtype=torch.int32)[::2],
        torch.randn(4, dtype=torch.bfloat16),
    ]
    empty = torch.empty

    def on_cpu(*sizes, **options):
        return empty(*sizes, dtype=options["dtype"])

    monkeypatch.setattr(torch, "empty", on_cpu)
    found = to_device(tensors, torch.device("meta"))  # a device that is no CPU, whose memory is the host's here
    for one, wanted in zip(found, tensors, strict=True):
        assert one.dtype == wanted.dtype and torch.equal(one, wanted) and one is not wanted
        assert one.data_ptr() % 64 == found[0].data_ptr() % 64 or not one.numel()
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1
    assert all(one is wanted for one, wanted in zip(to_device(tensors, CPU), tensors, strict=True))


@needs_cuda_build
def test_groups_over_several_ranks_cost_one_copy(monkeypatch):
    """Beside the sizes of the ranks' parts, for which the host waits once, and what the loss asks."""
    rows = [replace(row, split=row.groups >= 0) for row in batch_of(2).microbatches]

    class Known(Loss):
        def precompute_split_groups(self, microbatches, log_probs):
            return [replace(row, split_gradients=own) for row, own in zip(microbatches, log_probs, strict=True)]

    def gathered(own, device, group):
        return [(own.row.groups.numel(), own.encode())]

    held = spread._Held.of(rows)
    monkeypatch.setattr(spread._Held, "of", lambda rows: held)
    monkeypatch.setattr(spread, "_gathered", gathered)
    monkeypatch.setattr(spread.dist, "get_rank", lambda group: 0)
    alone: Any = None  # in place of a process group
    with FakeTensorMode(allow_non_fake_inputs=True):
        log_probs = [torch.zeros(row.targets.numel(), device=GPU) for row in rows]
        rows = [replace(row, reference_log_probs=own) for row, own in zip(rows, log_probs, strict=True)]
        with Counted() as count:
            found = spread.precompute_spread_groups(Known(), rows, log_probs, GPU, alone)
    gradients = [row.split_gradients for row in found if row.split_gradients is not None]
    assert [gradient.shape for gradient in gradients] == [row.targets.shape for row in rows]
    assert all(row.token_ids.is_cpu for row in found), "so that the next pass knows them again"
    assert not count.host_waits and count.copies == {"queued": 1}


class Asked(TorchFunctionMode):
    """What the host asks a tensor's values for; on a GPU it would wait each time."""

    ASKS = (
        torch.Tensor.tolist,
        torch.Tensor.item,
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.nonzero,
        torch.nonzero,
        torch.masked_select,
        torch.Tensor.masked_select,
        torch.equal,
    )

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) else ()
        masks = [x for x in (indices if isinstance(indices, tuple) else (indices,)) if isinstance(x, torch.Tensor)]
        if func in self.ASKS or any(mask.dtype == torch.bool for mask in masks):
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


OWN_LOSS = """
from engine.algorithms.group import GroupLoss
from engine.core.metrics import Metric

class Own(GroupLoss):
    metrics = (Metric("longest", "", reduce="max"),)

    def group_loss(self, group):
        return (group.sums(group.log_probs) * group.advantages).sum(), {"longest": group.num_tokens.max()}
"""


def test_a_loss_over_groups_asks_twice_a_row_however_many_groups_it_has(tmp_path):
    """Where its sequences are, and whether the losses are finite; before, once or more a segment and a group."""
    (tmp_path / "own.py").write_text(OWN_LOSS)
    loss = make_loss(algorithm_options({"loss": f"{tmp_path}/own.py:Own"}))
    for num_groups in (1, 5):
        step = Step(3, num_pairs=num_groups)
        batch = make_batch(step.sequences, step=0, num_prompts=7, trainer=Trainer(), dp_rank=0)
        (row,) = batch.microbatches
        log_probs = torch.zeros(row.targets.numel(), requires_grad=True)
        with Asked() as asked:
            value, _ = loss(log_probs, row, batch)
            value.backward()
        assert asked.found == {"tolist": 1, "__bool__": 1}


def test_groups_split_over_rows_ask_once_a_step():
    """DPO over groups in several rows: who is with whom."""
    loss = make_loss(algorithm_options({"loss": "group_dpo"}))
    rows = [replace(row, split=row.groups >= 0) for row in batch_of(3).microbatches]
    rows = [replace(row, reference_log_probs=row.rollout_log_probs) for row in rows]
    log_probs = [torch.zeros(row.targets.numel()) for row in rows]
    with Asked() as asked:
        loss.precompute_split_groups(rows, log_probs)
    assert asked.found == {"tolist": 1}
