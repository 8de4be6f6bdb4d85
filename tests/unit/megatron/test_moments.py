"""The optimizer's state under the names of parameters: back bit for bit, from one library's AdamW to another's, and refused
where it belongs to another layout. Fused AdamW is a stand-in here; tests/gpu has the real ones."""

from types import SimpleNamespace

import pytest
import torch

from engine.core.errors import CheckpointError
from engine.megatron.moments import KINDS, Slot
from engine.megatron.optimizer import PolicyOptimizer


class Fused:
    """What Transformer Engine's AdamW shows of itself: one step count a group; moments in `dtype`, uint8 for FP8."""

    def __init__(self, key, dtype=torch.float32):
        self.param_groups, self.state, self.dtype = [{"params": [key]}], {}, dtype

    def _initialize_state(self, key, moment, zero_buffer, remainders):
        assert zero_buffer
        dtype = torch.int16 if remainders else self.dtype
        data = torch.zeros_like(key, dtype=dtype)
        quantized = SimpleNamespace(_data=data, _scale_inv=torch.zeros(1))
        self.state[key][moment] = quantized if dtype is torch.uint8 else data


def torch_slot(num_steps, main=None):
    key = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    adam = torch.optim.AdamW([key], lr=0.1)
    for _ in range(num_steps):
        key.grad = torch.ones_like(key) / 3
        adam.step()
    return Slot("a.weight", adam, key, main)


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.equal(found[kind], value) and found[kind].dtype == value.dtype for kind, value in wanted.items()
    )


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_state_comes_back_and_the_next_step_is_the_same(num_steps):
    first, second = torch_slot(num_steps), torch_slot(1)
    second.restore({kind: value.clone() for kind, value in first.tensors().items()})
    second.key.data.copy_(first.key.data)
    assert equal(second.tensors(), first.tensors())
    assert set(first.tensors()) == ({"exp_avg", "exp_avg_sq", "step"} if num_steps else set())
    for slot in (first, second):
        slot.key.grad = torch.full_like(slot.key, 0.5)
        slot.owner.step()
    assert torch.equal(first.key, second.key)


def test_torchs_state_goes_to_a_fused_adamw_and_back():
    first = torch_slot(3, main=torch.randn(2, 3))
    key = torch.zeros(2, 3)
    fused = Slot("a.weight", Fused(key), key, torch.zeros(2, 3))
    fused.restore(first.tensors())
    assert fused.owner.param_groups[0]["step"] == 3
    assert equal(fused.tensors(), first.tensors())
    back = torch_slot(1, main=torch.zeros(2, 3))
    back.restore(fused.tensors())
    assert equal(back.tensors(), first.tensors())
    fused.restore(torch_slot(0, main=torch.ones(2, 3)).tensors())
    assert "step" not in fused.owner.param_groups[0]
    assert fused.owner.state == {}


def test_fp8_moments_and_remainders_keep_their_bytes():
    key, other = torch.zeros(2, 3), torch.zeros(2, 3)
    first, second = (Slot("a.weight", Fused(one, torch.uint8), one, None) for one in (key, other))
    saved = {
        "exp_avg.data": torch.randint(0, 255, (2, 3), dtype=torch.uint8),
        "exp_avg.scale_inv": torch.tensor([0.25]),
        "master_param": torch.randint(-99, 99, (2, 3), dtype=torch.int16),
        "step": torch.tensor(4.0),
    }
    first.restore(saved)
    assert equal(first.tensors(), saved)
    second.restore(first.tensors())
    assert equal(second.tensors(), saved)
    assert set(saved) <= set(KINDS)


def test_another_shape_or_missing_fp32_weights_are_refused():
    slot = torch_slot(1)
    with pytest.raises(CheckpointError, match=r"a.weight.exp_avg must be \[2, 3\].*found \[3, 2\]: resume with"):
        slot.restore({"exp_avg": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match=r"a.weight.main must not be there"):
        slot.restore({"main": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=r"a.weight.main must be there"):
        torch_slot(1, main=torch.zeros(2, 3)).restore({})


def test_a_tensor_of_another_ranks_part_is_refused():
    optimizer = PolicyOptimizer.__new__(PolicyOptimizer)
    optimizer._slots = [torch_slot(1)]
    optimizer._num_steps, optimizer._away = 0, False
    optimizer._optimizer = SimpleNamespace(chained_optimizers=[])
    state = optimizer.state()
    optimizer.load_state(state)
    state["a.weight[0:3].exp_avg"] = state.pop("a.weight.exp_avg")
    with pytest.raises(CheckpointError, match=r"a.weight\[0:3\].exp_avg must belong to a parameter of this rank"):
        optimizer.load_state(state)
