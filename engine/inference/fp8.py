"""FP8 weights of an engine (inference.quantization = 'fp8'), as a quantization of vLLM's that it looks up by name: the layers'
matrices as e4m3 bytes with one float32 scale a row, multiplied with activations of one scale a token. A sync writes the
trainer's weights in model.dtype beside them, proves that they are the trainer's bits, and quantizes them into place.

On a GPU the product is vLLM's FP8 kernel (unverified on a GPU); on a CPU the same bytes are multiplied in float32.
Embedding, output layer and norms stay in model.dtype.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from vllm import _custom_ops as kernels
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from engine.bridge.checksum import BlockDigests, ShardDigest
from engine.bridge.shard_plan import ShardOffset
from engine.core.errors import WeightSyncError
from engine.ops import column_weights
from engine.ops.fp8 import FP8, num_strayed, rounded_rows

FP8_QUANTIZATION = "semion_fp8"
OLDEST_GPU = 89  # compute capability of the first with FP8 products: Ada, and Hopper after it


class Fp8Config(QuantizationConfig):
    """Which layers are quantized: all that share matrices over tensor-parallel ranks, but for embedding and output layer."""

    def get_name(self) -> str:
        """As vLLM looks it up."""
        return FP8_QUANTIZATION

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Of activations; in float32 FP8 would save nothing that the products could use."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU."""
        return OLDEST_GPU

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the model's files are not quantized."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Fp8Config:
        """Nothing of a file is asked."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Fp8Linear | None:
        """Of a layer; None: it stays as it is."""
        return Fp8Linear() if isinstance(layer, LinearBase) else None


class Fp8Linear(LinearMethodBase):  # type: ignore[misc]
    """What a layer multiplies with. It is loaded in model.dtype and quantized when it has all of its weight."""

    create_weights: ClassVar[Any] = UnquantizedLinearMethod.create_weights

    def __init__(self) -> None:
        self._quantize_tokens = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        self.strayed: torch.Tensor | None = None  # of what was loaded, until `require_loaded` has read it

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantizes what was loaded, once, and looks at it; later weights come by `quantize`. vLLM tells a layer when it is
        loaded and nobody when all are, so `require_loaded` is to be called."""
        loaded = layer.weight.data
        if loaded.dtype == FP8:
            return
        layer.weight = torch.nn.Parameter(torch.empty_like(loaded, dtype=FP8), requires_grad=False)
        scale = torch.empty(loaded.size(0), 1, dtype=torch.float32, device=loaded.device)
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        quantize(layer, loaded)
        self.strayed = num_strayed(loaded, layer.weight.data, layer.weight_scale.data)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., columns] times the weight [rows, columns], in x's dtype."""
        tokens, token_scale = self._quantize_tokens(x.reshape(-1, x.size(-1)))
        if x.is_cpu:
            product = tokens.float() @ layer.weight.float().t() * token_scale * layer.weight_scale.t()
            out = (product if bias is None else product + bias).to(x.dtype)
        else:
            out = kernels.cutlass_scaled_mm(tokens, layer.weight.t(), token_scale, layer.weight_scale, x.dtype, bias)
        return out.view(*x.shape[:-1], out.size(-1))


def quantize(layer: Any, weight: torch.Tensor) -> None:
    """Writes a layer's weight [rows, columns], in another dtype, into its FP8 bytes and scales, where they lie."""
    for rows, quantized, scale in rounded_rows(weight):
        layer.weight.data[rows].copy_(quantized)
        layer.weight_scale.data[rows].copy_(scale)


class RoundingProof:
    """Whether layers' bytes and scales are what their weights were rounded to. It is computed on the device, matrix by matrix,
    and read once for all of them: a host that read each would keep a GPU without work as often."""

    def __init__(self) -> None:
        self._strayed: dict[str, torch.Tensor] = {}

    def add(self, layer: Any, weight: torch.Tensor, name: str) -> None:
        """Looks at one layer, without waiting; its weight [rows, columns] is not needed any longer."""
        self._strayed[name] = num_strayed(weight, layer.weight.data, layer.weight_scale.data)

    def add_loaded(self, method: Fp8Linear, name: str) -> None:
        """Takes over what a layer found as it was loaded."""
        assert method.strayed is not None, f"{name} is proven once after it was loaded"
        self._strayed[name], method.strayed = method.strayed, None

    def require(self) -> None:
        """Waits for all that were added. WeightSyncError names the first that is not within half an FP8 step of its weights."""
        if not self._strayed:
            return
        counts = torch.stack(list(self._strayed.values())).cpu().tolist()  # the one wait
        wrong = {name: count for name, count in zip(self._strayed, counts, strict=True) if count}
        self._strayed.clear()
        if wrong:
            name, count = next(iter(wrong.items()))
            more = f" (and in {len(wrong) - 1} more matrices)" if len(wrong) > 1 else ""
            raise WeightSyncError(
                f"{name} must be within half an FP8 step of its weights in every engine; found {count} elements that are not, "
                f"or are not finite{more}: look at the weights, or set inference.quantization = 'none'"
            )


def quantized_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers whose weights are in FP8, by the names of these parameters."""
    named = model.named_modules()
    return {f"{name}.weight": layer for name, layer in named if isinstance(getattr(layer, "quant_method", None), Fp8Linear)}


def require_loaded(model: torch.nn.Module) -> None:
    """Once, after vLLM has loaded a model. WeightSyncError where what an engine multiplies with is not what its files' weights
    were rounded to. It waits for the device, once for all matrices."""
    proof = RoundingProof()
    for name, layer in quantized_layers(model).items():
        proof.add_loaded(layer.quant_method, f"engine parameter {name}, loaded from the model's files,")
    proof.require()


@torch.no_grad()
def digest_of(model: torch.nn.Module) -> str:
    """Of the bytes and scales that this worker multiplies with, in hexadecimal; empty where nothing is in FP8. Engines that
    took the same weights have the same."""
    layers = quantized_layers(model)
    if not layers:
        return ""
    matrices = {name: layer.weight.data for name, layer in layers.items()}
    scales = {f"{name}_scale": layer.weight_scale.data for name, layer in layers.items()}
    widest = max(tensor.size(1) for tensor in matrices.values())
    # Everything stays where it is, so that all of it may wait to be digested together
    digests = BlockDigests(column_weights(widest, next(iter(matrices.values())).device), at_once_bytes=math.inf)
    total = ShardDigest((*matrices, *scales), digests)
    for held in (matrices, scales):
        for name, tensor in held.items():
            total.add(name, digests.put(ShardOffset(name, 0, 0), tensor))
        digests.flush()  # bytes and scales have elements of two sizes, and one call takes one
    return f"{int(total.sums().sum()) % 2**64:016x}"


def register() -> None:
    """Makes the quantization known to this vLLM process, any number of times."""
    if FP8_QUANTIZATION not in QUANTIZATION_METHODS:
        register_quantization_config(FP8_QUANTIZATION)(Fp8Config)
