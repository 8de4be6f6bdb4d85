"""Where Transformer Engine is installed, GPU or not: its spec builds with the parameters that the layout table says, and the
local spec and torch's AdamW stay what they are although megatron-core could import others. No forward is run here.

    python -m pytest tests/gpu/test_te_build.py
"""

from datetime import timedelta
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from engine.llama import layout
from engine.llama.hf import LlamaShape
from engine.megatron import cpu_device
from tests.parallel.material import run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        find_spec("transformer_engine") is None, reason="Transformer Engine is not installed: requirements/gpu.txt"
    ),
]
SHAPE = LlamaShape(
    num_layers=4,
    hidden=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_hidden=48,
    vocab_size=67,
    max_positions=1024,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied=False,
)


@pytest.fixture
def topology_of():
    """Megatron's groups as rank 0 of a layout sees them; the other ranks are not there and no collective does anything."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from engine.megatron import topology

    opened: list[topology.Topology] = []

    def make(trainer):
        if opened:
            return opened[0]
        if torch.cuda.is_available():
            device = torch.device("cuda", 0)
        else:
            cpu_device.install()
            device = cpu_device.CPU
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=trainer.world_size)
        opened.append(topology._make_groups(trainer, device, timedelta(seconds=60), 0))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def built(topology_of, trainer_options):
    from engine.megatron import build

    trainer = run_config(trainer_options, {"model": {"dtype": "bfloat16"}}).trainer
    topology = topology_of(trainer)
    config = build.megatron_config(SHAPE, trainer, torch.bfloat16)
    with patch.object(torch.cuda, "is_available", return_value=True):  # on a CPU, TE would not even make its modules
        chunks = build.build_chunks(SHAPE, config, topology)
    return chunks, layout.trainer_layout(trainer)


def homes(model):
    """The packages that the classes of a model's modules come from."""
    return {base.__module__.split(".")[0] for module in model.modules() for base in type(module).__mro__}


@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}])
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_parameters_are_those_of_the_layout(layers, parallel, topology_of):
    from engine.megatron import build

    (model,), spread = built(topology_of, parallel | {"layers": layers})
    found = {name: tuple(parameter.shape) for name, parameter in build.named_parameters(model)}
    assert found == layout.shard_shapes(SHAPE, spread, 0)
    assert spread.spec == layers
    assert ("transformer_engine" in homes(model)) == (layers == "transformer_engine")


def test_both_specs_have_the_same_local_names(topology_of):
    from engine.megatron import build

    (model,), _ = built(topology_of, {"layers": "transformer_engine"})
    names = {layout.local_name(name) for name, _ in build.named_parameters(model)}
    assert names == set(layout.shard_shapes(SHAPE, layout.TrainerLayout(), 0))


@pytest.mark.parametrize("distributed", [False, True])
def test_the_optimizer_is_torchs_although_megatron_would_take_another(distributed, topology_of):
    from megatron.core import optimizer as megatron
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from engine.megatron.optimizer import PolicyOptimizer

    (model,), _ = built(topology_of, {})
    options = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(model.config, options, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    config = run_config({}, {}).optimizer
    made = PolicyOptimizer(config, [chunk], names, dtype=torch.bfloat16, distributed=distributed)
    assert type(made._optimizer.optimizer) is torch.optim.AdamW
    for parameter in model.parameters():
        parameter.main_grad.fill_(1e-3)
    norm, _ = made.apply(0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert norm == pytest.approx(1e-3 * count**0.5, rel=1e-4)
    assert megatron.Adam.__module__.startswith("transformer_engine")  # its own choice, in force again


def optimizer_of(topology_of, options, fill):
    """A PolicyOptimizer of Transformer Engine's AdamW over the distributed optimizer, with made-up moments and weights."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from engine.megatron.optimizer import PolicyOptimizer

    (model,), _ = built(topology_of, {"layers": "transformer_engine", "distributed_optimizer": True})
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(model.config, ddp, model)
    names = {parameter: layout.local_name(name) for name, parameter in model.named_parameters()}
    config = run_config({"distributed_optimizer": True}, {"optimizer": options, "model": {"dtype": "bfloat16"}}).optimizer
    made = PolicyOptimizer(config, [chunk], names, dtype=torch.bfloat16, distributed=True)
    adam = made._optimizer.optimizer
    draw = torch.Generator().manual_seed(4)
    for group in adam.param_groups if fill else ():
        group["step"] = 3
        for parameter in group["params"]:
            adam.initialize_state(parameter, adam.store_param_remainders)
            for value in adam.state[parameter].values():
                value.copy_(torch.randint(-99, 99, value.shape, generator=draw))
    return made


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_state_of_te_adam_is_restored_by_name(moments, topology_of):
    options = {"implementation": "te", "moment_dtype": moments}
    first = optimizer_of(topology_of, options, fill=True)
    state = {name: value.clone() for name, value in first.state().items()}
    second = optimizer_of(topology_of, options, fill=False)
    assert second.state().keys() != state.keys()
    second.load_state(state)
    again = second.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in state)
    kinds = {name: state[f"decoder.layers.0.input_layernorm.weight.{name}"] for name in ("exp_avg", "step")}
    assert kinds["exp_avg"].dtype == getattr(torch, moments)
    assert int(kinds["step"]) == 3
    assert second._optimizer.optimizer.param_groups[0]["step"] == 3
    remainders = "decoder.layers.0.input_layernorm.weight.master_param" in state
    assert remainders == (moments == "bfloat16")  # fp32 moments leave the fp32 weights to megatron-core


def test_delayed_scaling_is_remembered_from_the_start_and_not_moved_by_scoring(topology_of):
    from engine.megatron.build import AMAX_HISTORY
    from engine.megatron.fp8 import Fp8Memory

    (model,), _ = built(topology_of, {"layers": "transformer_engine", "fp8": "delayed"})
    memory = Fp8Memory(model.config, [model])
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert {name.rsplit(".", 2)[0] for name in memory.tensors} == {
        f"0.decoder.layers.{layer}.{linear}" for layer in range(4) for linear in linears
    }
    history = memory.tensors["0.decoder.layers.0.mlp.linear_fc1.scaling_fwd.amax_history"]
    assert history.shape == (AMAX_HISTORY, 3)
    with memory.untouched():
        assert not model.training
        history += 1
    assert model.training
    assert not history.any()
    layer = model.decoder.layers[0].mlp.linear_fc1
    assert layer.fp8_meta["scaling_fwd"].amax_history is history
