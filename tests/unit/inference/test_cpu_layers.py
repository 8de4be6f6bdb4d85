"""An engine's layers on a CPU: vLLM makes ours where its models ask for its own, and they are the definition."""

from __future__ import annotations

import pytest
import torch

from engine.inference.process import OURS
from tests import reference_ops


@pytest.fixture
def layers(monkeypatch):
    """vLLM's norm and activation as its models make them."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    from engine.inference import receiver

    monkeypatch.setenv(OURS, "1")
    receiver.register()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        return RMSNorm(48, eps=1e-6), SiluAndMul()


def test_they_are_the_trainer_s_kernels(layers):
    from engine.inference.cpu_layers import KernelRMSNorm, KernelSiluAndMul

    norm, activation = layers
    assert isinstance(norm, KernelRMSNorm) and isinstance(activation, KernelSiluAndMul)
    torch.manual_seed(0)
    x, residual, both = torch.randn(7, 48), torch.randn(7, 48), torch.randn(7, 96)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), reference_ops.rms_norm(x, norm.weight, 1e-6))
        normed, total = norm(x, residual)
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(normed, reference_ops.rms_norm(total, norm.weight, 1e-6))
        heads = torch.randn(7, 2, 96)[..., 20:68]  # of a wider row
        torch.testing.assert_close(norm(heads), reference_ops.rms_norm(heads, norm.weight, 1e-6))
        torch.testing.assert_close(activation(heads), reference_ops.swiglu(heads))
        torch.testing.assert_close(activation(both), reference_ops.swiglu(both))
