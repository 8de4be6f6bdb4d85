"""vLLM's side of a weight sync: our weight-transfer engine, which every worker of an engine runs. vLLM loads it through its
plugin entry point. It decides nothing about versions.

Where live parameters keep their layout (a GPU without quantization, and a CPU with the load format `semion_plain`) slices
go straight into them. With FP8 weights slices of a layer's matrix are put together beside it in the model's dtype, proven, and
quantized into place. Where vLLM repacks weights after loading, full tensors go through its layerwise reload; what the repacked
weights then hold cannot be compared with what was sent, so there the digests cover what arrived.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform

from engine.bridge.exchange import Receiver, Shards
from engine.bridge.terms import SyncTerms
from engine.bridge.transports.base import Deadline, Rendezvous, Transport, TransportError
from engine.bridge.transports.registry import open_transport
from engine.bridge.transports.rendezvous import join_store
from engine.core.errors import SemionError, UndeliveredError, WeightSyncError
from engine.core.lifetimes import die_with_parent
from engine.inference import cpu_layers, fp8, head
from engine.inference.plain_loader import PLAIN_FORMAT, PlainLoader
from engine.inference.process import OURS
from engine.inference.sleep import release_pages
from engine.models import sharding as layout
from engine.models.reward_head import ATHENE
from engine.observe.profiling.recorder import capture_here
from engine.ops.fp8 import HELD_BYTES

BACKEND = "semion"


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing is known before the first sync."""


@dataclass
class SyncCall(WeightTransferUpdateInfo):
    """One version to receive: `terms` as JSON with the digest of their plan, and where the members of `epoch` meet."""

    engine: int
    seconds: float
    terms: str
    plan_digest: str
    host: str
    port: int
    epoch: int


class Inbox(WeightTransferEngine[NoInfo, SyncCall]):
    """One worker's end of the channel, and its receiver under the present terms."""

    init_info_cls = NoInfo
    update_info_cls = SyncCall
    supports_draft_weight_update = False

    _transport: Transport | None = None
    _receiver: Receiver | None = None
    _terms: SyncTerms | None = None
    _planned = ""  # digest of the receiver's plan
    _met: tuple[int, str, int] | None = None  # port, plan and epoch

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        """The channel opens at the first sync."""

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def finish_weight_update(self) -> None:
        """Nothing to finish: a version is placed and verified when `update_weights` returns."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives one version. The base class then synchronises an accelerator, which a CPU build lacks."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: SyncCall) -> None:
        """Receives, places and verifies one version. After any failure the channel is closed, so that the others fail too;
        the next call must name a new epoch. WeightSyncError says what did not come or differs."""
        call, deadline, done = update_info, Deadline(update_info.seconds), False
        try:
            if self._met != (call.port, call.plan_digest, call.epoch):
                self._open(call)
            assert self._transport is not None and self._receiver is not None and self._terms is not None
            with self._shards(self._terms) as shards:
                self._receiver.receive(shards, self._transport, deadline)
            done = True
        except TransportError as error:
            raise UndeliveredError(str(error)) from error
        finally:
            if not done:
                self.shutdown()

    def _open(self, call: SyncCall) -> None:
        self.shutdown()
        if call.plan_digest != self._planned:
            self._prepare(call)
        assert self._receiver is not None and self._terms is not None
        meeting = Rendezvous(call.host, call.port, self._receiver.num_members, call.seconds, call.epoch)
        store = join_store(call.host, call.port, self._receiver.num_members, call.seconds)
        self._transport = open_transport(self._terms.transport, store, self._receiver.member, meeting)
        self._met = (call.port, call.plan_digest, call.epoch)

    def _prepare(self, call: SyncCall) -> None:
        """Computes the plan and checks that it is the trainer's and that the parameters are those it writes to."""
        terms = SyncTerms.from_json(call.terms)
        plan = terms.plan()
        if plan.digest != call.plan_digest:
            raise WeightSyncError(
                f"the plan must be the trainer's, {call.plan_digest[:12]}; found {plan.digest[:12]}: run one version of "
                f"semion on both sides"
            )
        if not terms.engine.whole:
            shards = LiveShards(self.model, terms.torch_dtype)
            _check_parameters(shards, layout.shard_shapes(terms.shape, terms.engine, self._tp_rank), terms.torch_dtype)
        member = plan.member(call.engine, self._tp_rank)
        self._receiver = Receiver(plan, member, terms.torch_dtype, self.device)
        self._terms, self._planned = terms, call.plan_digest

    @contextmanager
    def _shards(self, terms: SyncTerms) -> Iterator[Shards]:
        if not terms.engine.whole:
            live = LiveShards(self.model, terms.torch_dtype)
            yield live
            live.require_rounded()
            return
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        yield ReloadedShards(self.model, layout.tensors(terms.shape), terms.torch_dtype, self.device)
        finalize_layerwise_reload(self.model, self.model_config)

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.25 wants the trainer's side here; later versions do not. It is bridge.publish."""
        raise NotImplementedError("weights are sent by engine.bridge.sender")

    @property
    def _tp_rank(self) -> int:
        return int(self.parallel_config.rank % self.parallel_config.tensor_parallel_size)

    def shutdown(self) -> None:
        """Leaves the channel."""
        if self._transport is not None:
            self._transport.close()
        self._transport = self._met = None


class LiveShards:
    """vLLM's own parameters, written in place; one in FP8 is held beside it, in the trainer's dtype, until it is whole."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self._parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        self._layers, self._dtype = fp8.quantized_layers(model), dtype
        self._held: dict[str, torch.Tensor] = {}
        self._proof = fp8.RoundingProof()

    def __getitem__(self, parameter: str) -> torch.Tensor:
        if parameter not in self._layers:
            return self._parameters[parameter]
        if parameter not in self._held:
            self._held[parameter] = torch.empty_like(self._parameters[parameter], dtype=self._dtype)
        return self._held[parameter]

    def form(self, parameter: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Sizes and type of what is to be written; None of a parameter that there is not."""
        if parameter not in self._parameters:
            return None
        stored = self._parameters[parameter]
        return tuple(stored.shape), self._dtype if parameter in self._layers else stored.dtype

    def may_begin(self, parameter: str) -> bool:
        """What is in place has room; of what is held beside it, so much at a time."""
        held = sum(tensor.nbytes for tensor in self._held.values())
        return parameter not in self._layers or parameter in self._held or held < HELD_BYTES

    def complete(self, parameter: str) -> None:
        """It is where it belongs; what is to be in FP8 goes there."""
        if parameter not in self._layers:
            return
        held, layer = self._held.pop(parameter), self._layers[parameter]
        fp8.quantize(layer, held)
        self._proof.add(layer, held, f"engine parameter {parameter}")

    def require_rounded(self) -> None:
        """WeightSyncError where what went to FP8 is not what it was rounded from. It waits for the device, once."""
        self._proof.require()


class ReloadedShards:
    """Full tensors, each held until it is whole and then given to vLLM's loader."""

    def __init__(self, model: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._shapes, self._dtype, self._device = model, shapes, dtype, device
        self._held: dict[str, torch.Tensor] = {}

    def __getitem__(self, parameter: str) -> torch.Tensor:
        if parameter not in self._held:
            self._held[parameter] = torch.empty(self._shapes[parameter], dtype=self._dtype, device=self._device)
        return self._held[parameter]

    def may_begin(self, parameter: str) -> bool:
        """Always: vLLM holds whole layers beside it in any case."""
        return True

    def complete(self, parameter: str) -> None:
        """Hands it over; vLLM repacks a layer when it has all of it."""
        self._model.load_weights([(parameter, self._held.pop(parameter))])


def _check_parameters(shards: LiveShards, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """WeightSyncError where the engine's parameters are not those of the layout that slices are written into."""
    for name, shape in shapes.items():
        if (found := shards.form(name)) != (shape, dtype):
            raise WeightSyncError(
                f"engine parameter {name} must be {shape} {dtype} to be written in place; found {found}: publish "
                f"and serve one model, or set inference.packed_weights"
            )


class SyncWorker:
    """What our engine adds to a vLLM worker (its worker_extension_cls)."""

    def semion_receive(self: Any, call: dict[str, Any]) -> tuple[str, bool, str]:
        """Receives one version. (nothing, or why it failed; whether that is an echo of a failure elsewhere; digest of what is
        in FP8 then). It never raises: vLLM would leave the other workers' answers in its queue and take them for those of the
        next call."""
        try:
            self.start_weight_update()
            self.update_weights(call)
            self.finish_weight_update()
            return "", False, fp8.digest_of(self.model_runner.get_model())
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            return why, isinstance(error, SemionError) and error.echo, ""

    def semion_capture(self: Any, on: bool) -> None:
        """Begins or ends what Nsight Systems captures of this worker."""
        capture_here(on)

    def semion_head_dtype(self: Any) -> str:
        """The type that the output layer multiplies in, as model.dtype names types; of a layer that has none of its own "the
        model's"."""
        processor = self.model_runner.get_model().logits_processor
        dtype = getattr(processor, "head_dtype", None)
        return "the model's" if dtype is None else str(dtype).removeprefix("torch.")

    def semion_decode(self: Any) -> None:
        """Has a worker on a CPU compute the layers of few tokens, and draw tokens, by our kernels."""
        from engine.inference import cpu_decoder, cpu_sampler  # here, for they name parts of vLLM that a GPU does without

        cpu_decoder.replace(self.model_runner.get_model())
        self.model_runner.sampler = cpu_sampler.replaced(self.model_runner.sampler)

    def semion_runs(self: Any) -> dict[str, str]:
        """What the worker runs: the module of vLLM's model runner, of which there are two, its attention, and on a CPU its
        sampler and what computes the layers of few tokens."""
        model = self.model_runner.get_model()
        attention = {layer.attn_backend.get_name() for layer in model.modules() if hasattr(layer, "attn_backend")}
        ours = {}
        if self.device.type == "cpu":
            from engine.inference import cpu_decoder

            ours = {"sampler": type(self.model_runner.sampler).__name__, "layers": cpu_decoder.told(model)}
        return ours | {
            "model_runner": type(self.model_runner).__module__.removeprefix("vllm.v1.worker."),
            "attention": ", ".join(sorted(attention)),
        }

    def semion_quantized(self: Any) -> tuple[str, str]:
        """Once, after the start: proves what was rounded to FP8 when it was loaded. (nothing, or why it is not what it must be;
        its digest, empty where nothing was rounded). It never raises, as `semion_receive`."""
        try:
            model = self.model_runner.get_model()
            fp8.require_loaded(model)
            return "", fp8.digest_of(model)
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__, ""

    def semion_release(self: Any) -> None:
        """Gives the pages of weights and KV cache back to the machine on a CPU, where vLLM's sleep does nothing. Their
        addresses stay, as after its sleep on a GPU, and read as zeros until they are written."""
        if self.device.type == "cpu":
            for tensor in (*self.model_runner.model.parameters(), *self.model_runner.kv_caches):
                release_pages(tensor)


def register() -> None:
    """Makes the inbox, the load format, the quantization, the float32 output layer, a CPU's layers and Athene's model known to
    this vLLM process; called by vLLM, any number of times, in each worker before it loads anything. A worker of an engine of
    ours ends with the engine: not even a stopped one keeps its memory from the engine that follows."""
    ours, parent = OURS in os.environ, multiprocessing.parent_process()
    if ours and parent is not None:  # spawned, as vLLM spawns where CUDA is initialised and in an actor of Ray
        die_with_parent(parent.pid)
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, Inbox)
        register_model_loader(PLAIN_FORMAT)(PlainLoader)
        fp8.register()
    if ours:
        head.register()
        if current_platform.is_cpu():
            cpu_layers.register()
    if ATHENE not in ModelRegistry.models:  # a worker of a tensor-parallel reward engine knows it by this alone
        ModelRegistry.register_model(ATHENE, f"engine.inference.athene:{ATHENE}")
