"""A trainer and a real vLLM engine on one GPU, taking turns: asleep the engine gives its memory back, and a sync over CUDA IPC
wakes it with the trainer's weights, lent where they are contiguous on both sides. The engine is a process of its own, without
Ray. Never run on a GPU so far: no machine with one was at hand. On a CPU, nightly, the same code runs over shared memory, and
only what is free on the card is not looked at.

    python -m pytest tests/gpu/test_colocated_gpu.py
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.bridge.host_group import HostGroup
from engine.bridge.setup import open_publisher
from engine.config.load import RunConfig, load_config
from engine.core.arrays import TokenIds
from engine.core.errors import InferenceError, SemionError
from engine.inference.pool import Pool
from engine.inference.sampling import SampleRequest
from engine.models import sharding as layout
from engine.models.config_file import read_shape
from engine.run.spec import assemble, resolve

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu if ON_GPU else pytest.mark.nightly,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
MIB, KV_CACHE, HOST = 1 << 20, 512, "127.0.0.1"
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 259,
    "tie_word_embeddings": False,
}
CONFIG = """
[run]
directory = "{folder}/run"
steps = 2
[model]
path = "{folder}"
dtype = "bfloat16"
[data]
train = "unused.jsonl"
max_prompt_tokens = 64
[sampling]
max_tokens = 8
[trainer]
microbatch_tokens = 256
[inference]
placement = "colocated"
max_model_tokens = 256
max_concurrent = 16
kv_cache = "{kv_cache} MiB"
"""
DRAW = random.Random(5)
ROWS = [[DRAW.randrange(SIZES["vocab_size"]) for _ in range(DRAW.randrange(5, 60))] for _ in range(6)]


def engine_process(pipe: Connection, config_json: str) -> None:
    """The engine, answering one call after another."""
    from engine.inference.vllm_engine import VllmEngine

    config = RunConfig.model_validate_json(config_json)
    cache = resolve(config, digests=False).kv_cache
    assert cache is not None
    engine = VllmEngine(config, 0, cache)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((getattr(engine, method)(*arguments), None))
        except SemionError as error:
            pipe.send((None, error))


class Handle:
    """An EngineHandle of that process; one call at a time."""

    def __init__(self, config: RunConfig) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=engine_process, args=(theirs, config.model_dump_json()), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """See EngineHandle."""
        self._pipe.send((method, arguments))
        return SimpleNamespace(result=self._result)

    def restart(self) -> None:
        """Not here."""
        raise AssertionError("the engine was lost")

    def _result(self, timeout_seconds: float) -> Any:
        if not self._pipe.poll(timeout_seconds):
            raise TimeoutError
        value, error = self._pipe.recv()
        if error is not None:
            raise error
        return value


class World:
    """One trainer rank with the weights of any model, the engine, and the bridge between them."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.handle = Handle(config)
        self.pool = Pool([self.handle], 300.0)
        self.shape, self.device = read_shape(config.model.path), device
        trainer = layout.trainer_layout(config.trainer)
        self._slices = layout.shard_slices(self.shape, trainer, 0)
        self.parameters = {
            name: torch.zeros(shape, dtype=torch.bfloat16, device=device)
            for name, shape in layout.shard_shapes(self.shape, trainer, 0).items()
        }
        alone = HostGroup(None, 0, 1, patience_seconds=60.0)
        place: Any = SimpleNamespace(rank=0, world_size=1, dp_size=1, device=device, host=alone)
        policy: Any = SimpleNamespace(shape=self.shape, parameters=self.parameters)
        self.publisher = open_publisher(assemble(config, self.shape), policy, place, HOST, self.pool)

    def hold(self, model: LlamaForCausalLM) -> None:
        """Gives the trainer this model's weights."""
        tensors = model.state_dict()
        for p in self._slices:
            source = layout.matrix_slice(tensors[p.name], p.row, p.col, p.rows, p.cols)
            layout.matrix_slice(self.parameters[p.parameter], p.shard_row, p.shard_col, p.rows, p.cols).copy_(source)


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).eval()


@torch.no_grad()
def expected(model: LlamaForCausalLM) -> list[list[float]]:
    """The log-probs that transformers gives, in float32 of the bf16 weights."""
    exact, found = model.float(), []
    for row in ROWS:
        ids = torch.tensor([row])
        log_probs = exact(ids).logits[0, :-1].log_softmax(-1)
        found.append(log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def gap(found: list[list[float]], wanted: list[list[float]]) -> float:
    """Mean absolute difference a token."""
    pairs = [pair for xs, ys in zip(found, wanted, strict=True) for pair in zip(xs, ys, strict=True)]
    return math.fsum(abs(x - y) for x, y in pairs) / len(pairs)


def free_mebibytes() -> float:
    """On the GPU, whoever has the rest; 0 on a CPU."""
    if not ON_GPU:
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0] / MIB


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("colocated")
    model_of(0).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    file = folder / "run.toml"
    file.write_text(CONFIG.format(folder=folder, kv_cache=KV_CACHE))
    store = dist.FileStore(str(Path(folder) / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1)
    made = World(load_config(file), torch.device("cuda", 0) if ON_GPU else torch.device("cpu"))
    yield made
    made.handle.process.kill()
    dist.destroy_process_group()


def test_asleep_the_engine_gives_its_memory_back_and_a_sync_wakes_it_with_the_trainers_weights(world: World) -> None:
    """Twice, with other weights each time: the log-probs are those of the new weights, and far from those before."""
    num_mebibytes = sum(p.nbytes for p in world.parameters.values()) / MIB
    before = expected(model_of(0))
    for version in (1, 2):
        model = model_of(version)
        world.hold(model)
        awake = free_mebibytes()
        world.publisher.sleep()
        asleep = free_mebibytes()
        assert not ON_GPU or asleep - awake > 0.9 * (KV_CACHE + num_mebibytes)
        with pytest.raises(InferenceError, match="the engines sleep"):
            assert world.pool.version
        request = SampleRequest("r", "p", 0, 1, TokenIds.of([1]), 1.0, 1.0, 1)
        with pytest.raises(InferenceError, match="it sleeps until the next weight sync"):
            world.handle.call("submit", [request], version - 1).result(60)
        report = world.publisher.publish(version)
        assert (report.attempts, world.pool.version) == (1, version)
        assert abs(free_mebibytes() - awake) < 256, "awake it has what it had"
        (found,) = world.pool.log_probs(ROWS)
        after = expected(model)
        assert gap(found, after) < 0.02 < 0.2 < gap(found, before)
        before = after


def test_parameters_are_read_where_they_lie(world: World) -> None:
    """Every storage of a parameter that is sent is one that the engine has mapped; the digests' is not."""
    world.publisher.publish(3)
    transport: Any = world.publisher._transport
    held = {tensor.untyped_storage().data_ptr() for tensor in world.parameters.values()}
    assert len(held & transport._regions.keys()) > 0, "no parameter was read where it lies"
    assert len(transport._regions) <= len(held) + 2, "parameters, and two slots of staging memory"
