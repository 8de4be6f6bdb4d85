"""Measures the constants of the machine at hand: a matrix product, copies, the disk, and with a configuration a real engine's
iterations and a real policy's optimizer steps, each in a process of its own. What follows from the times is worked out in pure
functions (`decoding_constants`, `training_constants`). Its figures of a GPU are unverified.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.load import RunConfig, override
from engine.core.arrays import NO_LOG_PROBS, NO_TOKENS, TokenIds
from engine.core.tensor_files import DIGEST, WRITE_BYTES
from engine.core.types import Sequence
from engine.forecast.calibration import Calibration, Measured
from engine.forecast.constants import Constants
from engine.forecast.speed import Speed, speed_of
from engine.models.base import ModelShape
from engine.models.headers import num_elements
from engine.run.machine import gpu_name, visible_gpus
from engine.run.spec import resolve

SECONDS_EACH = 0.5  # that a copy or a product is repeated for
PRODUCT, COPIED = 1536, 1 << 26  # rows of a square matrix; bytes
WRITTEN = 1 << 28  # bytes
BATCHES, TOKENS, PROMPT = (1, 4, 16, 64), 48, 8  # requests together; tokens of each response; of each prompt
ROWS = ((1, 128), (1, 512), (1, 2048), (4, 128), (4, 512))  # (rows, tokens of each) of an optimizer step
REPEATS = 3  # of which the fastest counts
LONG_SUM = 1 << 22  # numbers of a long sum over two ranks; a short one has SHORT_SUM
SHORT_SUM, SUMS = 1 << 10, 50
ANSWERS = 200  # that are judged


class Decoded(NamedTuple):
    """A batch that an engine decoded."""

    seconds: float
    iterations: int  # tokens of the longest response
    tokens: int  # of all responses
    context: int  # tokens attended to, over all iterations
    prompts: int  # prompt tokens


class Trained(NamedTuple):
    """An optimizer step."""

    seconds: float
    rows: int
    flops: float  # of forward and backward


def calibrate(config: RunConfig | None, folder: Path, say: Callable[[str], None] = lambda text: None) -> Calibration:
    """The machine's constants; those of sampling, training and rewards only with a configuration, whose model it loads.
    `folder`: on whose disk it writes, and removes, 256 MiB."""
    found: dict[str, Measured] = {}
    say("a matrix product, copies, the disk, digests")
    machine, measured = _alone(_machine, config.model.dtype if config else "float32")
    found |= measured
    found["disk_gigabytes_per_second"] = Measured(value=_disk(folder) / 1e9, how=f"{WRITTEN >> 20} MiB written and synced")
    how = f"{DIGEST().name} of {WRITE_BYTES >> 20} MiB at a time, one thread"
    found["digest_gigabytes_per_second"] = Measured(value=_digest() / 1e9, how=how)
    if not visible_gpus():
        say("its cores together, sums over two ranks")
        found |= _cores() | _links()
    if config is not None:
        if "math" in config.data.rewards:
            say("rewards")
            found["verified_per_second"] = Measured(value=_alone(_judged, config), how=f"{ANSWERS} short answers, one worker")
        base = Constants(**{name: one.value for name, one in found.items()})
        shape = resolve(config, digests=False).shape
        say("an engine's iterations")
        found |= decoding_constants(_alone(_decode, config), speed_of(shape, _one_rank(config), base), base)
        say("optimizer steps")
        found |= training_constants(_alone(_train, config), base, shape.num_layers)
    return Calibration(machine=machine, model=config.model.path if config else "", constants=found)


def decoding_constants(batches: Many[Decoded], speed: Speed, constants: Constants) -> dict[str, Measured]:
    """What iterations cost beside the roofline of `speed`, by least squares: each, and each request of one."""
    points = []
    for one in batches:
        mean = one.tokens / one.iterations
        known = one.iterations * max(speed.weights, speed.products * mean) + one.context * speed.context
        points.append((one.iterations, one.tokens, max(0.0, one.seconds - known - one.prompts * speed.prompt)))
    fixed, each = _least_squares([((float(i), float(t)), seconds) for i, t, seconds in points])
    most = max(round(one.tokens / one.iterations) for one in batches)
    how = f"{len(points)} batches of a real engine, up to {most} requests together"
    return {
        "iteration_seconds": Measured(value=fixed, how=how),
        "request_iteration_seconds": Measured(value=each, how=how),
    }


def training_constants(steps: Many[Trained], constants: Constants, num_layers: int) -> dict[str, Measured]:
    """What a step, and each layer of a row's forward, costs whatever its tokens; the share of the peak that the rest has."""
    step, row, flop = _least_squares([((1.0, float(one.rows), one.flops), one.seconds) for one in steps])
    how = f"optimizer steps of a real policy on {len(steps)} sets of rows"
    found = {
        "step_seconds": Measured(value=step, how=how),
        "layer_row_seconds": Measured(value=row / (3 * num_layers), how=how),
    }
    if flop > 0:
        share = 1 / (flop * constants.peak_teraflops * 1e12)
        found["train_peak_share"] = Measured(value=min(1.0, share), how=how)
        if share > 1:  # training is faster than the one product was, as on a busy machine
            found["peak_teraflops"] = Measured(value=share * constants.peak_teraflops, how=how)
    return found


def _least_squares(points: Many[tuple[tuple[float, ...], float]]) -> list[float]:
    """Factors, none below 0, of the least squares of the relative error. One that would be below 0 is left out."""
    import numpy as np

    rows = np.array([[x / seconds for x in xs] for xs, seconds in points if seconds > 0])
    used = list(range(len(points[0][0])))
    while used and len(rows):
        scale = np.abs(rows[:, used]).max(axis=0)
        factors, *_ = np.linalg.lstsq(rows[:, used] / scale, np.ones(len(rows)), rcond=None)
        if (factors >= 0).all():
            found = [0.0] * len(points[0][0])
            for place, factor, size in zip(used, factors, scale, strict=True):
                found[place] = float(factor / size)
            return found
        used.pop(int(factors.argmin()))
    return [0.0] * len(points[0][0])


def _alone(function: Callable[[Any], Any], argument: Any) -> Any:
    """What a function returns in a process of its own, which is gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def _machine(dtype: str) -> tuple[str, dict[str, Measured]]:
    """(the machine's name, peak and memory of its first device)."""
    import platform

    import torch

    on_gpu = torch.cuda.is_available()
    device, kind = ("cuda" if on_gpu else "cpu"), getattr(torch, dtype)
    if not on_gpu:
        torch.set_num_threads(1)
    size = PRODUCT * (4 if on_gpu else 1)
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    source = torch.ones(COPIED * (16 if on_gpu else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fastest(work: Callable[[], Any]) -> float:
        best, end = float("inf"), time.perf_counter() + SECONDS_EACH
        while time.perf_counter() < end:
            started = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    peak = 2 * size**3 / fastest(lambda: left @ right) / 1e12
    copied = 2 * source.numel() / fastest(lambda: target.copy_(source)) / 1e9
    name = gpu_name() or f"{platform.processor() or platform.machine()}, one thread"
    return name, {
        "peak_teraflops": Measured(value=peak, how=f"a product of {size} x {size} in {dtype}"),
        "memory_gigabytes_per_second": Measured(value=copied, how=f"a copy of {source.numel() >> 20} MiB, read and written"),
    }


def _cores() -> dict[str, Measured]:
    """How many times as fast all cores together are as one is alone, by matrix products in a process for each: less than
    their number where two of them share a core's units."""
    count = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool_of = list(pool.map(_products, [0.0] * count))  # starts all of them
        alone = max(pool.submit(_products, SECONDS_EACH).result() for _ in range(REPEATS))
        together = max(sum(pool.map(_products, [SECONDS_EACH] * count)) for _ in range(REPEATS))
    assert len(pool_of) == count
    value = min(float(count), max(1.0, together / alone))
    return {"cores": Measured(value=value, how=f"matrix products in {count} processes together, over one alone")}


def _products(seconds: float) -> float:
    """Small matrix products for so long, by a second of this process's own time."""
    import torch

    torch.set_num_threads(1)
    left = torch.randn(256, 256)
    done, until, began = 0, time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < until:
        left = (left @ left).clamp(-1, 1)
        done += 1
    return done / max(time.process_time() - began, 1e-9)


def _links() -> dict[str, Measured]:
    """Sums and messages between two processes of this machine, over gloo."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        ranks = [pool.submit(_rank, (rank, f"{folder}/store")) for rank in range(2)]
        short, long, hop = (min(times) for times in zip(*(rank.result(timeout=120) for rank in ranks), strict=True))
    rate = 4 * LONG_SUM / max(long - short, 1e-9) / 1e9  # a sum over two ranks moves its own size
    return {
        "sum_seconds": Measured(value=short, how=f"a sum of {SHORT_SUM} numbers over two processes (gloo)"),
        "nvlink_gigabytes_per_second": Measured(value=rate, how=f"a sum of {LONG_SUM} numbers over two processes (gloo)"),
        "hop_seconds": Measured(value=hop, how="a message from one process to another (gloo)"),
    }


def _rank(where: tuple[int, str]) -> tuple[float, float, float]:
    """Seconds of (a short sum, a long sum, a message) over two ranks, of which this is one."""
    import torch
    import torch.distributed as dist

    rank, store = where
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    short, long, message = torch.ones(SHORT_SUM), torch.ones(LONG_SUM), torch.ones(SHORT_SUM)

    def timed(work: Callable[[], Any], times: int) -> float:
        best = float("inf")
        for _ in range(REPEATS):
            dist.barrier()
            started = time.perf_counter()
            for _ in range(times):
                work()
            best = min(best, (time.perf_counter() - started) / times)
        return best

    def there_and_back() -> None:
        for sender in range(2):
            dist.send(message, 1 - rank) if rank == sender else dist.recv(message, 1 - rank)

    found = (
        timed(lambda: dist.all_reduce(short), SUMS),
        timed(lambda: dist.all_reduce(long), 2),
        timed(there_and_back, SUMS) / 2,
    )
    dist.destroy_process_group()
    return found


def _judged(config: RunConfig) -> float:
    """Answers a second that one worker judges, once it is up; short ones, right and wrong."""
    from engine.core.types import Completion, Prompt
    from engine.rewards.base import answer_of
    from engine.rewards.math.reward import MathReward

    reward = MathReward(config.rewards.model_copy(update={"workers": 1}))
    prompts = [Prompt(f"p{i}", NO_TOKENS, f"What is {i} + 7?", str(i + 7), "", "") for i in range(ANSWERS)]
    said = [
        Completion(one.id, 0, 0, 0, NO_TOKENS, NO_LOG_PROBS, f"It is ${i + 7 + i % 2}$.", "stop")
        for i, one in enumerate(prompts)
    ]
    answers = [answer_of(prompt, one, place) for place, (prompt, one) in enumerate(zip(prompts, said, strict=True))]
    try:
        reward.score(answers[:10])
        started = time.perf_counter()
        reward.score(answers)
        return ANSWERS / (time.perf_counter() - started)
    finally:
        reward.close()


def _disk(folder: Path) -> float:
    """Bytes a second that a file takes until it is on the disk."""
    block = os.urandom(1 << 22)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN / (time.perf_counter() - started)


def _digest() -> float:
    """Bytes a second that one thread hashes as a checkpoint's files are, block by block; the fastest block's."""
    block, digest, best, until = bytes(WRITE_BYTES), DIGEST(), float("inf"), time.perf_counter() + SECONDS_EACH
    while time.perf_counter() < until or best == float("inf"):
        started = time.perf_counter()
        digest.update(block)
        best = min(best, time.perf_counter() - started)
    return WRITE_BYTES / best


def _one_rank(config: RunConfig) -> RunConfig:
    """The configuration on one trainer rank and one engine of one rank."""
    return override(
        config,
        {
            "trainer.tensor_parallel": 1,
            "trainer.pipeline_parallel": 1,
            "trainer.virtual_pipeline": 1,
            "trainer.first_stage_layers": None,
            "trainer.last_stage_layers": None,
            "trainer.data_parallel": 1,
            "trainer.sequence_parallel": False,
            "trainer.overlap_tensor_parallel": False,
            "trainer.fuse_gradient_accumulation": False,  # what it spares is counted, and taken off what constants say
            "inference.engines": 1,
            "inference.tensor_parallel": 1,
            "inference.placement": "disaggregated",
            "cluster.nodes": 1,
        },
    )


def _decode(config: RunConfig) -> list[Decoded]:
    """Batches of several sizes on a real engine; the first one, which warms up, is not counted."""
    from engine.inference.sampling import SampleRequest
    from engine.inference.vllm_engine import VllmEngine

    spec = resolve(_one_rank(config), digests=False)
    assert spec.kv_cache is not None
    engine = VllmEngine(spec.config, 0, spec.kv_cache)
    draw = random.Random(0)
    found = []
    sizes = [size for size in BATCHES if size <= spec.config.inference.max_concurrent]
    most = min(TOKENS, spec.config.inference.max_model_tokens - PROMPT)
    for number, size in enumerate([sizes[-1], *sizes]):
        requests = [
            SampleRequest(
                f"calibrate:{number}:{i}",
                f"p{i}",
                0,
                i,
                TokenIds.of(draw.randrange(spec.shape.vocab_size) for _ in range(PROMPT)),
                1.0,
                1.0,
                most,
            )
            for i in range(size)
        ]
        engine.submit(requests, 0)
        completions, usage = engine.collect([request.request_id for request in requests])
        lengths = [len(completion.token_ids) for completion in completions if completion is not None]  # all are done
        context = sum(PROMPT * length + length * (length - 1) // 2 for length in lengths)
        found.append(Decoded(usage["seconds"], max(lengths), sum(lengths), context, PROMPT * size))
    return found[1:]


def _train(config: RunConfig) -> list[Trained]:
    """Optimizer steps on several sets of rows with a real policy, the fastest of REPEATS each."""
    import torch
    import torch.distributed as dist

    from engine.algorithms.nll import NllLoss
    from engine.megatron.packing import make_batch
    from engine.megatron.parallel_state import open_parallel_state
    from engine.megatron.policy import Policy

    spec = resolve(_one_rank(config), digests=False)
    trainer, timeout = spec.config.trainer, timedelta(seconds=spec.config.trainer.timeout_seconds)
    torch.set_num_threads(1)
    parallel = open_parallel_state(trainer, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    policy = Policy(spec.config, parallel, NllLoss(), spec.config.model.path, spec.shape, spec.trainer, copies=())
    draw = random.Random(0)
    found = []
    for rows, tokens in [ROWS[0], *ROWS]:
        if tokens > min(trainer.microbatch_tokens, spec.shape.max_positions):
            continue
        options = trainer.model_copy(update={"microbatch_tokens": max(tokens, trainer.row_multiple)})
        ids = TokenIds.of(draw.randrange(spec.shape.vocab_size) for _ in range(tokens))
        sequences = [Sequence(ids[: tokens // 4], ids[tokens // 4 :]) for _ in range(rows)]
        best = float("inf")
        for step in range(REPEATS):
            batch = make_batch(sequences, step=step, num_prompts=rows, trainer=options, dp_rank=0)
            started = time.perf_counter()
            policy.train_step(batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        found.append(Trained(best, rows, rows * _flops(spec.shape, tokens)))
    parallel.close()
    return found[1:]


def _flops(shape: ModelShape, tokens: int) -> float:
    """Of forward and backward of a row of one sequence."""
    embedding = 0 if shape.tied else shape.vocab_size * shape.hidden
    return 6 * (num_elements(shape) - embedding) * tokens + 6 * shape.num_layers * shape.num_heads * shape.head_dim * tokens**2
