"""FP8 weights of an engine: vLLM's layer with our product against float64 of the same bytes, and what a weight sync does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from engine.bridge import checksum
from engine.core.errors import WeightSyncError
from engine.inference import fp8
from engine.inference.receiver import LiveShards
from engine.ops import block_digest
from engine.ops.fp8 import FP8, num_strayed
from tests.unit.ops.counted import Counted

ROWS, COLUMNS = 24, 32


@pytest.fixture
def method() -> fp8.Fp8Linear:
    with set_current_vllm_config(VllmConfig()):
        return fp8.Fp8Linear()


def drawn(*sizes: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def loaded(method: fp8.Fp8Linear, weight: torch.Tensor) -> Any:
    """A model of one layer with this weight, as vLLM has loaded and processed it; beside it a norm that stays as it is."""
    model = torch.nn.Module()
    model.layer = layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    layer.quant_method = method
    model.norm = torch.nn.Module()
    model.norm.weight = torch.nn.Parameter(drawn(COLUMNS), requires_grad=False)
    method.process_weights_after_loading(layer)
    return model


def dequantized(layer: Any) -> torch.Tensor:
    return layer.weight.double() * layer.weight_scale.double()


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_rounded_weights_and_tokens(method: fp8.Fp8Linear, bias: bool) -> None:
    layer = loaded(method, drawn(ROWS, COLUMNS)).layer
    assert layer.weight.dtype == FP8 and layer.weight_scale.shape == (ROWS, 1)
    tokens, added = drawn(2, 5, COLUMNS, seed=2), drawn(ROWS, seed=3) if bias else None
    scale = tokens.double().abs().amax(-1, keepdim=True) / 448
    rounded = (tokens.double() / scale).float().to(FP8).double() * scale
    expected = rounded @ dequantized(layer).t() + (added.double() if added is not None else 0)
    found = method.apply(layer, tokens, added)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 5, ROWS)
    assert torch.allclose(found.double(), expected, rtol=2**-8, atol=1e-2)
    unrounded = tokens.double() @ drawn(ROWS, COLUMNS).double().t() + (added.double() if added is not None else 0)
    assert 1e-3 < float((found.double() - unrounded).norm() / unrounded.norm()) < 0.1, "it rounds, and not by much"


def test_a_sync_writes_bfloat16_beside_and_fp8_into_place(method: fp8.Fp8Linear) -> None:
    model, fresh = loaded(method, drawn(ROWS, COLUMNS)), drawn(ROWS, COLUMNS, seed=7)
    places = model.layer.weight.data_ptr(), model.layer.weight_scale.data_ptr()
    shards = LiveShards(model, torch.bfloat16)
    assert shards.form("layer.weight") == ((ROWS, COLUMNS), torch.bfloat16)
    assert shards.form("norm.weight") == ((COLUMNS,), torch.bfloat16) and shards.form("other") is None
    before = fp8.digest_of(model)
    shards["layer.weight"][:10].copy_(fresh[:10])
    shards["layer.weight"][10:].copy_(fresh[10:])
    assert fp8.digest_of(model) == before, "nothing is in place before it is whole"
    shards.complete("layer.weight")
    shards["norm.weight"].copy_(drawn(COLUMNS, seed=8))
    shards.complete("norm.weight")
    assert places == (model.layer.weight.data_ptr(), model.layer.weight_scale.data_ptr())
    assert torch.equal(model.norm.weight, drawn(COLUMNS, seed=8))
    assert fp8.digest_of(model) == fp8.digest_of(loaded(method, fresh)) != before, "as an engine that loads them has it"
    assert torch.allclose(dequantized(model.layer), fresh.double(), rtol=2**-4, atol=float(fresh.abs().max()) / 448 * 2**-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_end_the_sync_by_name(method: fp8.Fp8Linear, value: float) -> None:
    shards = LiveShards(loaded(method, drawn(ROWS, COLUMNS)), torch.bfloat16)
    shards["layer.weight"].copy_(drawn(ROWS, COLUMNS))
    shards["layer.weight"][3, 4] = value
    shards.complete("layer.weight")
    with pytest.raises(WeightSyncError, match=r"layer\.weight must be within half an FP8 step.*look at the weights"):
        shards.require_rounded()


def test_a_place_that_does_not_take_the_weights_is_found(method: fp8.Fp8Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = LiveShards(loaded(method, drawn(ROWS, COLUMNS)), torch.bfloat16)
    shards["layer.weight"].copy_(drawn(ROWS, COLUMNS, seed=7))
    monkeypatch.setattr(fp8, "quantize", lambda layer, weight: None)
    shards.complete("layer.weight")
    with pytest.raises(WeightSyncError, match="must be within half an FP8 step"):
        shards.require_rounded()


def test_the_proof_of_a_sync_is_read_once(method: fp8.Fp8Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a host wait for its GPU: rounding matrices and looking at them reads nothing back, and all are read in one
    list. On a CPU, where a list is read without an operator, so it is counted by itself."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(loaded(method, drawn(ROWS, COLUMNS, seed=i)).layer for i in range(7))
    shards, lists, to_list = LiveShards(model, torch.bfloat16), list[int](), torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> Any:
        lists.append(tensor.numel())
        return to_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    with Counted() as counts:
        for i in range(7):
            shards[f"layers.{i}.weight"].copy_(drawn(ROWS, COLUMNS, seed=20 + i))
            shards.complete(f"layers.{i}.weight")
        assert lists == [] and counts.launches["aten::sum"] == 7
        for _ in range(2):  # nothing is left to prove the second time
            shards.require_rounded()
            assert lists == [7]
    assert not counts.host_waits
    with Counted() as counts:
        assert int(num_strayed(drawn(2, 8), drawn(2, 8, seed=2, dtype=FP8), torch.ones(2, 1))) > 0
    assert counts.host_waits == {"aten::_local_scalar_dense": 1}, "a number read by itself is seen"


def test_the_proof_of_a_start_is_read_once(method: fp8.Fp8Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a matrix reads nothing back; all of them are read in one list. A second proof of the same is refused."""
    lists, to_list, model = list[int](), torch.Tensor.tolist, torch.nn.Module()

    def noted(tensor: torch.Tensor) -> Any:
        lists.append(tensor.numel())
        return to_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    with Counted() as counts, set_current_vllm_config(VllmConfig()):
        model.layers = torch.nn.ModuleList(loaded(fp8.Fp8Linear(), drawn(ROWS, COLUMNS, seed=i)).layer for i in range(7))
        assert lists == [] and counts.launches["aten::sum"] == 7
        fp8.require_loaded(model)
        assert lists == [7]
    assert not counts.host_waits
    with pytest.raises(AssertionError, match="once"):
        fp8.require_loaded(model)


def test_what_was_loaded_wrong_ends_the_start_by_name(method: fp8.Fp8Linear) -> None:
    weight = drawn(ROWS, COLUMNS)
    weight[3, 4] = float("nan")
    model = loaded(method, weight)
    with pytest.raises(WeightSyncError, match=r"parameter layer\.weight, loaded from the model's files, must be .* found 32 "):
        fp8.require_loaded(model)


def test_a_worker_answers_what_was_loaded_wrong_and_does_not_raise(method: fp8.Fp8Linear) -> None:
    """As it answers a sync: vLLM would take the other workers' answers for those of the next call."""
    from engine.inference.receiver import SyncWorker

    weight = drawn(ROWS, COLUMNS)
    with set_current_vllm_config(VllmConfig()):
        right = loaded(fp8.Fp8Linear(), weight.clone())
        wrong = loaded(fp8.Fp8Linear(), weight.fill_(float("nan")))
    why, digest = SyncWorker.semion_quantized(SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: right)))
    assert why == "" and digest
    why, digest = SyncWorker.semion_quantized(SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: wrong)))
    assert why.startswith("engine parameter layer.weight, loaded from the model's files, must be ") and digest == ""


def test_of_several_matrices_the_first_that_is_wrong_is_named(method: fp8.Fp8Linear) -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(loaded(method, drawn(ROWS, COLUMNS, seed=i)).layer for i in range(3))
    shards = LiveShards(model, torch.bfloat16)
    for i in range(3):
        shards[f"layers.{i}.weight"].copy_(drawn(ROWS, COLUMNS, seed=20 + i))
        if i:
            shards[f"layers.{i}.weight"][i, :i] = float("nan")
        shards.complete(f"layers.{i}.weight")
    with pytest.raises(WeightSyncError, match=r"layers\.1\.weight must .* found 32 elements .* \(and in 1 more matrices\)"):
        shards.require_rounded()


def test_a_digest_of_all_layers_is_two_calls(method: fp8.Fp8Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of all bytes and one of all scales, which on a GPU are a launch for every 48 of them; each digest is its own."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(loaded(method, drawn(ROWS, COLUMNS + 8 * i, seed=i)).layer for i in range(5))
    digested, block_digests = [], checksum.block_digests

    def count(blocks: Any, **places: Any) -> torch.Tensor:
        digested.append([block.dtype for block in blocks])
        return block_digests(blocks, **places)

    monkeypatch.setattr(checksum, "block_digests", count)
    found = fp8.digest_of(model)
    assert digested == [[FP8] * 5, [torch.float32] * 5]
    alone = torch.zeros((), dtype=torch.int64)
    for name, layer in fp8.quantized_layers(model).items():
        for kind, tensor in ((name, layer.weight.data), (f"{name}_scale", layer.weight_scale.data)):
            alone += block_digest(tensor, row=0, col=0, seed=checksum._seed(kind)).sum()
    assert found == f"{int(alone) % 2**64:016x}"


def test_a_digest_tells_bytes_scales_and_their_places_apart(method: fp8.Fp8Linear) -> None:
    model = loaded(method, drawn(ROWS, COLUMNS))
    found = {fp8.digest_of(model)}
    model.layer.weight.data.view(torch.uint8)[5, 6] ^= 1
    found.add(fp8.digest_of(model))
    model.layer.weight_scale.data[7] *= 1.001
    found.add(fp8.digest_of(model))
    model.layer.weight_scale.data = model.layer.weight_scale.data.roll(1, 0)
    found.add(fp8.digest_of(model))
    assert len(found) == 4
    assert fp8.digest_of(model.norm) == "", "where nothing is in FP8 there is nothing to tell"
