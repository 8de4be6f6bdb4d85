"""Which library does what in the trainer: refused where it is missing, megatron-core's own choice replaced and put back. What
the libraries compute is asked in tests/gpu."""

import importlib
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mixed_precision
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config.options import Optimizer, Trainer
from engine.core.errors import ConfigError
from engine.megatron.libraries import check_libraries, chosen_kernels, l2_norm
from engine.megatron.torch_adam import TorchAdam
from tests.unit.ops.counted import Counted

WANTED = {
    "trainer.layers": (Trainer(layers="transformer_engine"), Optimizer(), "transformer_engine"),
    "optimizer.implementation = 'te'": (Trainer(), Optimizer(implementation="te"), "transformer_engine"),
    "optimizer.implementation = 'apex'": (Trainer(), Optimizer(implementation="apex"), "amp_C"),
    "optimizer.offload_share": (Trainer(), Optimizer(offload_share=0.5), "transformer_engine"),
}
MODULES = ("transformer_engine", "amp_C")


def place(monkeypatch, name, **members):
    """An importable module of that name; what it computes is asked on a GPU."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def place_te(monkeypatch, **kernels):
    """Transformer Engine's optimizers; returns our class upon its FusedAdam, which goes with it."""
    package = place(monkeypatch, "transformer_engine.pytorch")
    place(monkeypatch, "transformer_engine", pytorch=package)
    package.optimizers = place(monkeypatch, "transformer_engine.pytorch.optimizers", **kernels)
    monkeypatch.setitem(sys.modules, "engine.megatron.te_adam", None)  # so that what is imported here is put away again
    del sys.modules["engine.megatron.te_adam"]
    return importlib.import_module("engine.megatron.te_adam").TeAdam


def choices():
    return (
        (megatron.Adam, megatron.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam),
        (mixed_precision.multi_tensor_applier, mixed_precision.multi_tensor_scale_impl),
        (clip_grads.multi_tensor_applier, clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl),
    )


def test_plain_options_need_no_library():
    check_libraries(Trainer(), Optimizer())
    check_libraries(Trainer(fuse_gradient_accumulation=True), Optimizer())


@pytest.mark.parametrize("option", WANTED)
def test_a_missing_library_is_named_with_the_option_and_how_to_get_it(option, monkeypatch):
    trainer, optimizer, module = WANTED[option]
    monkeypatch.setattr("engine.megatron.libraries.find_spec", lambda name: None)
    fix = r"found no module .*(requirements/gpu.txt|APEX_CUDA_EXT=1), or (use|set it)"
    with pytest.raises(ConfigError, match=fix) as caught:
        check_libraries(trainer, optimizer)
    assert str(caught.value).startswith(option)
    assert f"module {module}" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", WANTED)
def test_a_library_without_a_gpu_is_refused(option, monkeypatch):
    trainer, optimizer, _ = WANTED[option]
    for name in MODULES:
        place(monkeypatch, name)
    with pytest.raises(ConfigError, match=r"needs a GPU; torch found none: .*, or (use|set it)") as caught:
        check_libraries(trainer, optimizer)
    assert str(caught.value).startswith(option)


def test_fp8_on_a_gpu_that_is_too_old_is_refused(monkeypatch):
    place(monkeypatch, "transformer_engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    trainer = Trainer(layers="transformer_engine", fp8="blockwise")
    with pytest.raises(ConfigError, match=r"trainer.fp8 needs a GPU of compute capability 9.0 or more; found 8.9: run on one"):
        check_libraries(trainer, Optimizer())
    check_libraries(trainer.model_copy(update={"fp8": "none"}), Optimizer())


@pytest.mark.parametrize("implementation", ["te", "apex"])
def test_the_chosen_kernels_are_megatrons_while_entered(implementation, monkeypatch):
    names = ("FusedAdam", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale")
    kernels = {name: object() for name in names} | {"FusedAdam": type("FusedAdam", (), {})}
    if implementation == "te":
        kernels["FusedAdam"] = place_te(monkeypatch, **kernels)
    else:
        place(monkeypatch, "apex")
        for name in ("apex.multi_tensor_apply", "apex.optimizers", "amp_C"):
            place(monkeypatch, name, **kernels)
    adam, apply, norm, scale = (kernels[name] for name in names)
    before = choices()
    with chosen_kernels(implementation):
        assert choices() == ((adam, False, adam), (apply, scale), (apply, norm, scale))
        with chosen_kernels("torch"):
            assert megatron.Adam is distrib_optimizer.Adam is TorchAdam
            assert not megatron.USING_PYTORCH_OPTIMIZER, "it takes torch's own by itself, not fused"
            assert clip_grads.l2_norm_impl is l2_norm
    assert choices() == before


def test_an_error_inside_puts_megatrons_choice_back():
    before = choices()
    with pytest.raises(RuntimeError), chosen_kernels("torch"):
        raise RuntimeError
    assert choices() == before


class Quantized:
    """What Transformer Engine's FP8 tensor shows of itself: bytes, their transpose, and who made them."""

    def __init__(self):
        self._data, self._scale_inv = torch.zeros(2, dtype=torch.uint8), torch.ones(1)
        self._transpose: torch.Tensor | None = torch.zeros(2, dtype=torch.uint8)
        self._quantizer, self.scale, self.usages = self, torch.ones(1), {}

    def set_usage(self, **usages):
        self.usages |= usages

    def update_usage(self, columnwise_usage):
        self._transpose = self._transpose if columnwise_usage else None


class FusedAdam:
    """Transformer Engine's in outline: a moment of zeros becomes bytes that are no number."""

    def __init__(self):
        self.state: dict[str, dict[str, Any]] = {"weight": {}}

    def _initialize_state(self, param, state_name, zero_buffer, store_param_remainders=False):
        self.state[param][state_name] = torch.zeros(2, dtype=torch.int16) if store_param_remainders else Quantized()

    def _apply_scale(self, state_name, unscaled, scaled, scale):
        scale.copy_(unscaled.abs().max() / 448)
        scaled._quantizer.scale.copy_(1 / scale)
        scaled._data.copy_(torch.full((2,), 127) if scale == 0 else (unscaled / scale).to(torch.uint8))


def test_fp8_moments_are_one_byte_and_zero_where_gradients_were(monkeypatch):
    names = ("multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale")
    adam = place_te(monkeypatch, FusedAdam=FusedAdam, **dict.fromkeys(names))()
    adam._initialize_state("weight", "exp_avg", True)
    adam._initialize_state("weight", "master_param", True, True)
    moment = adam.state["weight"]["exp_avg"]
    assert moment._transpose is None
    assert moment.usages == {"columnwise": False}
    adam._apply_scale("exp_avg", torch.tensor([224.0, 448.0]), moment, torch.ones(1))
    assert moment._data.tolist() == [224, 448 % 256]
    adam._apply_scale("exp_avg", torch.zeros(2), moment, torch.ones(1))
    assert moment._data.tolist() == [0, 0]


class OnGpu(torch.Tensor):
    """A tensor of a GPU, by pretence."""

    is_cpu = False


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16, torch.float64)], ids=str
)
def test_the_norm_of_a_gpu_is_megatrons_own(dtypes):
    """Of gradients in float32 to its rounding; of others more exact, since megatron-core rounds each norm to their type."""
    draw = torch.Generator().manual_seed(3)
    tensors = [torch.randn(size, generator=draw).to(dtype) for size in (1, 7, 1000, 0, 33) for dtype in dtypes]
    exact = torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()
    found, _ = l2_norm(65536, torch.zeros(1), [[tensor.as_subclass(OnGpu) for tensor in tensors]], False)
    assert found.shape == (1,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double().as_subclass(torch.Tensor), exact.view(1), rtol=1e-6, atol=0)
    if dtypes == (torch.float32,):
        theirs = torch.norm(torch.tensor([torch.norm(tensor) for tensor in tensors]))
        torch.testing.assert_close(found.as_subclass(torch.Tensor), theirs.view(1), rtol=2e-7, atol=0)


def test_the_norm_on_a_cpu_is_left_to_megatron(monkeypatch):
    """To the bit, since it is that function which computes it."""
    monkeypatch.setattr("megatron.core.utils.local_multi_tensor_l2_norm", lambda *given: given)
    tensors = [torch.ones(3), torch.ones(2)]
    given: Any = l2_norm(65536, torch.zeros(1), [tensors], False)
    assert given[2] == [tensors]


def test_the_host_waits_for_no_norm_of_a_gpu():
    """Of 195 tensors, as many as megatron-core has of Llama 3.1 8B; its own function reads 195 numbers back, and writes one."""
    with FakeTensorMode(), Counted() as count:
        tensors = [torch.empty(5 + index, device="cuda") for index in range(195)]
        norm, _ = l2_norm(65536, torch.empty(1), [tensors], False)
    assert norm.device.type == "cuda" and norm.shape == (1,)
    assert not count.host_waits and not count.copies
    assert count.launches["aten::_foreach_norm"] == 1
