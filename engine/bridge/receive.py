"""vLLM's side of a weight sync: a weight-transfer engine that writes each bucket straight into the live parameters and
then digests what the parameters hold. vLLM loads it through the entry point `vllm.general_plugins` in every process.

On a CPU vLLM packs linear weights after loading, which leaves nothing to write into; the load format registered here
keeps them plain (one matmul call instead of a packed one). It receives; it never decides when.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from engine.bridge.channel import BucketManifest, Channel, Rendezvous, join_store
from engine.bridge.digest import tensor_digest
from engine.errors import WeightSyncError

BACKEND = "semion"
PLAIN_FORMAT = "semion_plain"


@dataclass
class OpenInfo(WeightTransferInitInfo):
    """How this engine joins the channel."""

    host: str
    port: int
    rank: int
    world_size: int
    timeout_seconds: float


@dataclass
class SyncInfo(WeightTransferUpdateInfo):
    """The manifests of one whole sync, in sending order: (source, dtype, names, shapes)."""

    buckets: list[tuple[int, str, list[str], list[list[int]]]] = field(default_factory=list)


class Receiver(WeightTransferEngine[OpenInfo, SyncInfo]):
    """Places buckets in the live model and proves it: digests of parameters against digests of what was sent."""

    init_info_cls = OpenInfo
    update_info_cls = SyncInfo
    supports_draft_weight_update = False

    _channel: Channel | None = None

    def init_transfer_engine(self, init_info: OpenInfo) -> None:
        """Joins the channel as member `init_info.rank`."""
        i = init_info
        meeting = Rendezvous(i.host, i.port, i.world_size, i.timeout_seconds)
        self._channel = Channel(join_store(meeting), i.rank, meeting)

    def start_weight_update(self) -> None:
        """Nothing to prepare: parameters keep their layout and are written in place."""

    def finish_weight_update(self) -> None:
        """Nothing to finish: every bucket is placed and verified when it arrives."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives one whole sync. The base class then synchronises an accelerator, which a CPU build lacks."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: SyncInfo) -> None:
        """Receives, places and verifies every bucket; WeightSyncError names the first tensor that differs.

        It is raised after the last bucket: whoever stops receiving makes the sender and the other engines wait.
        """
        assert self._channel is not None, "the channel must be open before a sync"
        first_error: WeightSyncError | None = None
        for source, dtype, names, shapes in update_info.buckets:
            manifest = BucketManifest(source, dtype, tuple(names), tuple(tuple(shape) for shape in shapes))
            buffer = manifest.buffer(self.device)
            self._channel.broadcast(buffer, source)
            tensors, digests = manifest.views(buffer)
            for name, tensor, digest in zip(names, tensors, digests, strict=True):
                try:
                    self._place(name, tensor, digest)
                except WeightSyncError as error:
                    first_error = first_error or error
        if first_error is not None:
            raise first_error

    def _place(self, name: str, tensor: torch.Tensor, digest: torch.Tensor) -> None:
        live = live_tensor(self.model, name, tensor.shape)
        live.copy_(tensor)
        if tensor_digest(live) != digest:
            raise WeightSyncError(f"tensor {name} differs from the trainer's after it was placed: send it again")

    def shutdown(self) -> None:
        """Leaves the channel."""
        self._channel = None


_STACKED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def live_tensor(model: torch.nn.Module, name: str, shape: torch.Size) -> torch.Tensor:
    """The view of vLLM's live parameters that holds the Hugging Face tensor `name` of `shape` (one engine rank).

    vLLM stacks q, k, v and gate, up by rows and pads the vocabulary's rows. WeightSyncError when there is no such place.
    """
    module, _, leaf = name.rpartition(".")
    parent, _, projection = module.rpartition(".")
    stacked, part = _STACKED.get(projection, (projection, 0))
    try:
        owner = model.get_submodule(f"{parent}.{stacked}" if parent else stacked)
        parameter = owner.get_parameter(leaf)
    except AttributeError as error:
        raise WeightSyncError(f"tensor {name} has no place in the engine's model: publish and serve one model") from error
    start = sum(getattr(owner, "output_partition_sizes", [0])[:part])
    view = parameter.data[start : start + shape[0]]
    if view.shape != shape:
        raise WeightSyncError(f"tensor {name} must have shape {tuple(view.shape)} in the engine; found {tuple(shape)}")
    return view


class PlainLoader(DefaultModelLoader):
    """vLLM's own loader, with linear weights left as ordinary tensors on a CPU."""

    def __init__(self, load_config: Any) -> None:
        load_config.load_format = "auto"
        super().__init__(load_config)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Switches packing off in every linear layer (vLLM's per-layer switch), then loads as usual."""
        for module in model.modules():
            if isinstance(module, LinearBase):
                module._cpu_skip_gemm_dispatch = True
        super().load_weights(model, model_config)

    def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The output layer has no such switch: its packed call is replaced by the plain one, which reads `.weight`."""
        model = super().load_model(*args, **kwargs)
        for module in model.modules():
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = torch.nn.functional.linear
        return model


def register() -> None:
    """Makes the receiver and the load format known to this vLLM process; called by vLLM, any number of times."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
        register_model_loader(PLAIN_FORMAT)(PlainLoader)
