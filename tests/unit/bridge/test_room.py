"""How many bytes of matrices an engine with FP8 weights holds beside them at a weight sync: what the real receiver begins, on
plans of 8B and 70B whose messages arrive at once, against what the memory estimate says. Tensors have no memory here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.bridge.exchange import Receiver
from engine.bridge.plan import plan
from engine.bridge.transports.base import Deadline
from engine.capacity.memory import Channel, estimate
from engine.config.load import load_config, override
from engine.inference import fp8
from engine.inference.receiver import LiveShards
from engine.models.config_file import read_shape
from engine.models.sharding import EngineLayout, layer_matrices, shard_shapes, trainer_layout
from engine.ops.fp8 import FP8
from tests.builders import spec

META = torch.device("meta")


class Arrived:
    """A message that is there."""

    def wait(self, deadline: Deadline) -> None:
        """It is."""


class Instant:
    """A transport whose messages arrive at once, so many under way."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def receive(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Arrived:
        return Arrived()

    def send(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Arrived:
        return Arrived()


class Counted(LiveShards):
    """The receiver's own shards, without quantizing; `most` is the bytes that were held at once."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], quantized: set[str]) -> None:
        self._parameters = {
            name: torch.empty(size, dtype=FP8 if name in quantized else torch.bfloat16, device=META)
            for name, size in shapes.items()
        }
        self._layers: dict[str, Any] = dict.fromkeys(quantized)
        self._dtype, self._held, self._proof, self.most = torch.bfloat16, {}, fp8.RoundingProof(), 0

    def __getitem__(self, parameter: str) -> torch.Tensor:
        found = super().__getitem__(parameter)
        self.most = max(self.most, sum(tensor.nbytes for tensor in self._held.values()))
        return found


@pytest.mark.parametrize(
    ("model", "tp", "pp", "dp", "engine_tp"), [("8b", 1, 1, 4, 1), ("8b", 1, 4, 1, 1), ("8b", 2, 2, 1, 2), ("70b", 4, 4, 2, 4)]
)
def test_a_receiver_holds_no_more_than_the_estimate_says(
    monkeypatch: pytest.MonkeyPatch, model: str, tp: int, pp: int, dp: int, engine_tp: int
) -> None:
    monkeypatch.setattr(fp8, "quantize", lambda layer, weight: None)
    monkeypatch.setattr(fp8.RoundingProof, "add", lambda self, layer, weight, name: None)
    monkeypatch.setattr(Receiver, "_verify", lambda *arguments: None)
    shape = read_shape(f"configs/models/llama-3.1-{model}")
    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "data_parallel": dp}
    config = override(
        load_config("configs/scale/llama-3.1-8b-4x4.toml"),
        {f"trainer.{name}": size for name, size in sizes.items()}
        | {"trainer.overlap_gradients": False}
        | {"trainer.sequence_parallel": tp > 1, "inference.tensor_parallel": engine_tp, "inference.quantization": "fp8"},
    )
    target = EngineLayout(engine_tp)
    made = plan(shape, 2, trainer_layout(config.trainer), dp, target, ((0,),), config.sync.bucket_mebibytes << 20)
    shapes = shard_shapes(shape, target, 0)
    quantized = {name for name, size in shapes.items() if ".layers." in name and len(size) == 2}
    assert len(quantized) == shape.num_layers * len(layer_matrices(shape, target))
    largest = max(2 * math.prod(shapes[name]) for name in quantized)
    said = estimate(spec(config, shape), Channel()).devices[1].components["engine: FP8 staging"]
    receiver = Receiver(made, made.member(0, 0), torch.bfloat16, META)
    for depth in (2, 64):  # NCCL's and CUDA IPC's
        shards = Counted(shapes, quantized)
        receiver.receive(shards, Instant(depth), Deadline(60.0))  # type: ignore[arg-type]
        assert not shards._held, "all were completed"
        print(f"{model}: held {shards.most / 2**30:.2f} GiB of {said / 2**30:.2f} GiB")
        assert largest <= shards.most <= said - (256 << 20), "less what rounding takes"
