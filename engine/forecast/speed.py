"""How fast an engine works, by the model's sizes, the configuration and the machine's constants: seconds of its iterations, of
a prompt's tokens, and of rounding its weights at a sync. What it has to do is batching.py's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.capacity.kv_cache import item_bytes, kv_bytes_per_token
from engine.config.load import RunConfig
from engine.forecast.constants import Constants
from engine.models.base import ModelShape
from engine.models.headers import num_elements
from engine.models.sharding import EngineLayout, layer_matrices

ROUNDED_BYTES = 130  # read and written of each element that a weight sync rounds to FP8 and proves, most of them float32


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of an engine's work. One iteration decodes one token of each running request."""

    fixed: float  # an iteration, whatever it decodes
    request: float  # an iteration for each request, beside its products
    weights: float  # an iteration reads the weights ...
    products: float  # ... while it multiplies them for each request; the longer of both counts
    context: float  # an iteration for each token that the requests attend to
    prompt: float  # a token of a prompt

    def iterations(self, count: int, batch: int, context: int) -> float:
        """So many iterations of a batch that holds `context` tokens at first, and grows by one each an iteration."""
        each = self.fixed + self.request * batch + max(self.weights, self.products * batch)
        return count * each + self.context * (count * context + batch * count * (count - 1) / 2)


def speed_of(shape: ModelShape, config: RunConfig, constants: Constants) -> Speed:
    """An engine's speed by the model's sizes, its tensor parallelism and the constants."""
    c, tp = constants, config.inference.tensor_parallel
    matrices = num_elements(shape) - (0 if shape.tied else shape.vocab_size * shape.hidden)  # the embedding is only looked up
    head = shape.vocab_size * shape.hidden
    item = item_bytes(config.model.dtype)
    stored, faster = (1, c.fp8_factor) if config.inference.quantization == "fp8" else (item, 1.0)  # of the layers' matrices
    products = 2 * ((matrices - head) / faster + head) / tp
    bandwidth = c.memory_gigabytes_per_second * 1e9 * c.decode_memory_share
    peak = c.peak_teraflops * 1e12
    together = 2 * shape.num_layers * c.collective_seconds if tp > 1 else 0.0
    return Speed(
        fixed=c.iteration_seconds + together,
        request=c.request_iteration_seconds,
        weights=((matrices - head) * stored + head * item) / tp / bandwidth,
        products=products / (peak * c.decode_peak_share),
        context=kv_bytes_per_token(shape, tp, config.inference.stored_dtype or config.model.dtype) / bandwidth,
        prompt=products / (peak * c.prefill_peak_share),
    )


def quantizing_seconds(shape: ModelShape, config: RunConfig, constants: Constants) -> float:
    """What a weight sync takes to round an engine's matrices to FP8, by the passes over them that engine/ops/fp8.py makes."""
    if config.inference.quantization == "none":
        return 0.0
    elements = shape.num_layers * sum(map(math.prod, layer_matrices(shape, EngineLayout(config.inference.tensor_parallel))))
    return ROUNDED_BYTES * elements / (constants.memory_gigabytes_per_second * 1e9)
