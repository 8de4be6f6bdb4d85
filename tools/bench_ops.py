"""The kernels of engine/ops against named peers in the same process, interleaved: medians, ratios, errors and memory, with
versions and processor. Prints a table; --json writes the figures too.

    python -m tools.bench_ops [--device cuda] [--threads 1 2] [--repeats 7] [--cases log_probs policy ...] [--json PATH]

On a machine that others use, look at the ratios of CPU seconds: they forget the time a thread waits for a core. With
--device cuda, never run so far, times are the device's own, between two events, after clocks have risen, with the second-level
cache swept before each; shapes are those that docs/kernels.md names, and kernels of other libraries (tools/bench_peers.py) are
compared where they are installed, with a line for those that are not. A peer that fails costs its own row alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from engine.config.options import Trainer
from engine.megatron.parallel_state import open_parallel_state
from engine.ops import (
    block_digest,
    column_weights,
    grouped_advantages,
    linear,
    lm_head_log_probs,
    packed_attention,
    policy_gradient_loss,
    rms_norm,
    sample_tokens,
    swiglu,
    token_log_probs,
)
from tests import reference_ops
from tools.bench_peers import CROSS_ENTROPIES, OUTPUT_LAYERS, Peer, installed, versions

Work = Callable[[], object]
SHAPES = {  # tokens and vocabulary: Llama 3's, and on a CPU one that fits a cache; on a GPU a row of it, and a shard of eight
    "cpu": ((512, 128256), (8192, 512)),
    "cuda": ((8192, 128256), (8192, 16032)),
}
HEADS = {"cpu": (256, 1024, 128256), "cuda": (8192, 4096, 128256)}  # tokens, hidden, vocabulary
TYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = ["log_probs", "policy", "digest", "lm_head", "attention", "swiglu", "norm", "linear", "sampling"]
DECODED = (1, 4, 8, 16, 32, 64, 128)  # requests that decode at once
LAYER, NUM_LAYERS, WORDS = ((1024, 512), (512, 512), (4096, 512), (512, 2048)), 8, (32000, 512)  # weights of 48 M parameters
SAMPLED = ((32, 32000), (256, 260), (256, 1000))  # requests that decode at once, and vocabulary
WARM_UP_SECONDS, SWEEP_BYTES = 0.3, 256 << 20  # until a GPU's clocks are up; more than any second-level cache


class Figures:
    """Seconds of several peers, run in turn; the first is ours. `device` is where the cases make their tensors, `with_others`
    whether kernels of other libraries are among the peers: on a GPU they are."""

    def __init__(self, repeats: int, device: torch.device) -> None:
        self.repeats, self.device, self.with_others = repeats, device, device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        self.failed: set[str] = set()
        self._started = time.perf_counter()
        if device.type == "cuda":
            self._sweep = torch.empty(SWEEP_BYTES, dtype=torch.uint8, device=device)

    def compare(
        self, name: str, peers: dict[str, Work], prepare: Work = lambda: None, extra: Mapping[str, float] | None = None
    ) -> None:
        """Medians of wall and CPU seconds; `prepare` runs, untimed, before each."""
        seconds: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
        for repeat in range(self.repeats + 1):
            for peer, work in peers.items():
                if peer in self.failed:
                    continue
                try:
                    prepare()
                    found = self._seconds(work)
                    while not repeat and self._is_cold():
                        prepare()
                        self._seconds(work)
                except Exception as error:
                    if peer == "semion":
                        raise
                    self.failed.add(peer)
                    print(f"{name:46} {peer:9} left out: {' '.join(str(error).split())[:120]}", flush=True)
                    continue
                if repeat:  # the first warms up
                    seconds[peer].append(found)
        self.failed.clear()
        seconds = {peer: found for peer, found in seconds.items() if found}
        medians = {p: [statistics.median(column) for column in zip(*s, strict=True)] for p, s in seconds.items()}
        ours = medians["semion"]
        for peer, (wall, cpu) in medians.items():
            row = {"case": name, "peer": peer, "wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}
            row |= {
                "ratio_wall": wall / ours[0],
                "ratio_cpu": cpu / ours[1],
                "threads": torch.get_num_threads(),
                **(extra or {}),
            }
            self.rows.append(row)
            print(
                f"{name:46} {peer:9} {row['wall_ms']:10.2f} ms {row['cpu_ms']:10.2f} CPU ms   "
                f"{row['ratio_wall']:6.2f}x wall {row['ratio_cpu']:6.2f}x CPU  {extra or ''}",
                flush=True,
            )

    def _seconds(self, work: Work) -> tuple[float, float]:
        """Wall and CPU seconds of one call; on a GPU the wall seconds are the device's, from a swept cache."""
        if self.device.type == "cpu":
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            return time.perf_counter() - wall, time.process_time() - cpu
        self._sweep.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cpu = time.process_time()
        before.record()
        work()
        after.record()
        cpu = time.process_time() - cpu
        after.synchronize()
        return before.elapsed_time(after) / 1e3, cpu

    def _is_cold(self) -> bool:
        """Whether a GPU has not worked for long enough to run at full clocks."""
        return self.device.type == "cuda" and time.perf_counter() - self._started < WARM_UP_SECONDS


def log_probs_case(figures: Figures, num_tokens: int, width: int, dtype: str) -> None:
    """Forward, forward with entropy, forward and backward; `read` is one read of the logits' bytes, a sum of int64."""
    torch.manual_seed(0)
    with figures.device:
        base = (3 * torch.randn(num_tokens, width)).to(DTYPES[dtype])
        targets, weights = torch.randint(0, width, (num_tokens,)), torch.randn(num_tokens)
    logits = base.clone().requires_grad_() * 1  # no leaf: ours writes over it

    def refresh() -> None:  # ours and megatron's write over the logits
        logits.data.copy_(base)

    def eager(with_entropy: bool = False) -> torch.Tensor:
        log_p = logits.log_softmax(-1)
        if with_entropy:
            return torch.stack([log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
        return log_p.gather(1, targets[:, None])[:, 0]

    def backward(log_probs: torch.Tensor) -> None:
        torch.autograd.grad((weights * log_probs).sum(), logits)

    exact = reference_ops.token_log_probs(base[:32].double(), targets[:32])[0]

    def error(found: torch.Tensor) -> float:
        return float((found[:32].double() - exact).abs().max())

    name = f"[{num_tokens} x {width}] {dtype}, {torch.get_num_threads()} threads"
    with torch.no_grad():
        errors = {"error": error(token_log_probs(logits, targets)[0]), "eager_error": error(eager())}
        ours = {"semion": lambda: token_log_probs(logits, targets)}
        figures.compare(f"forward {name}", {**ours, "eager": eager, "read": logits.view(torch.int64).sum}, extra=errors)
        ours = {"semion": lambda: token_log_probs(logits, targets, with_entropy=True)}
        figures.compare(f"entropy {name}", {**ours, "eager": lambda: eager(True)})
    peers: dict[str, Work] = {
        "semion": lambda: backward(token_log_probs(logits, targets)[0]),
        "eager": lambda: backward(eager()),
        "megatron": lambda: backward(vocab_parallel_cross_entropy(logits, targets)),
    }
    if figures.with_others:
        peers |= gpu_peers(logits, targets, backward)
        compiled = torch.compile(eager)
        peers["compiled"] = lambda: backward(compiled())
        totals = weights.new_ones(3, num_tokens)
        call = torch.ops.semion.log_prob_backward
        alone: dict[str, Work] = {
            "semion": lambda: call(logits.data, targets, totals, weights, None, 0, width, 1.0, logits.data),
            "copy": lambda: logits.data.copy_(base),
        }
        figures.compare(f"backward {name}", alone, prepare=refresh)
    figures.compare(f"both {name}", peers, prepare=refresh)


def gpu_peers(logits: torch.Tensor, targets: torch.Tensor, backward: Callable[[torch.Tensor], None]) -> dict[str, Work]:
    """The cross entropies of others that are installed, forward and backward; a loss has the other sign, at the same cost."""

    def both(peer: Peer) -> None:
        backward(peer.call(logits, targets))

    return {peer.name: partial(both, peer) for peer in installed(CROSS_ENTROPIES)}


def policy_case(figures: Figures) -> None:
    """64 rollouts in groups of 8, 256 tokens each: advantages, loss, gradient."""
    torch.manual_seed(0)
    with figures.device:
        lengths = torch.full((64,), 256)
        rewards, groups = torch.randint(0, 2, (64,)).float(), torch.arange(0, 65, 8, dtype=torch.int32)
        bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
        log_probs = (-torch.rand(16384)).requires_grad_()
        old, reference = (log_probs.detach() + 0.2 * torch.randn(2, 16384)).unbind()
        targets = torch.where(torch.rand(16384) < 0.1, -100, 3)
    options = {"clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.01}

    def ours() -> None:
        advantages, _ = grouped_advantages(rewards, groups)
        loss, _ = policy_gradient_loss(log_probs, old, reference, advantages, bounds, targets, **options)
        torch.autograd.grad(loss, log_probs)

    def eager() -> None:
        grouped = rewards.view(-1, 8)
        advantages = (grouped - grouped.mean(1, keepdim=True)).view(-1)
        loss, _ = reference_ops.policy_gradient_loss(log_probs, old, reference, advantages, bounds, targets, **options)
        torch.autograd.grad(loss, log_probs)

    inner = 50  # a call takes too little to time alone

    def many(work: Work) -> Work:
        return lambda: [work() for _ in range(inner)]

    name = f"advantages and loss, 16k tokens x {inner}, {torch.get_num_threads()} threads"
    figures.compare(name, {"semion": many(ours), "eager": many(eager)})


def digest_case(figures: Figures, dtype: str) -> None:
    """A block [4096 x 4096] against a plain read of its bytes (a sum of int64), a copy, and the reference."""
    torch.manual_seed(0)
    block = torch.randn(4096, 4096, device=figures.device).to(DTYPES[dtype])
    columns, words, room = column_weights(4096, block.device), block.view(torch.int64), torch.empty_like(block)
    peers: dict[str, Work] = {
        "semion": lambda: block_digest(block, row=0, col=0, seed=1, columns=columns),
        "read": words.sum,
        "copy": lambda: room.copy_(block),
        "plain": lambda: reference_ops.block_digest(block, row=0, col=0, seed=1),
    }
    name = f"digest [4096 x 4096] {dtype}, {torch.get_num_threads()} threads"
    figures.compare(name, peers, extra={"MB": block.nbytes / 1e6})


def attention_case(figures: Figures, length: int, dim: int, dtype: str) -> None:
    """4,096 tokens of sequences of one length, 8 heads over 4, forward and backward, against torch's attention one by one."""
    torch.manual_seed(0)
    shapes = ((4096, 8, dim), (4096, 4, dim), (4096, 4, dim))
    inputs = [torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for shape in shapes]
    bounds, parents = torch.arange(0, 4097, length, dtype=torch.int32), torch.full((4096 // length,), -1)

    def ours() -> object:
        output = packed_attention(inputs[0], inputs[1], inputs[2], bounds, parents, scale=dim**-0.5)
        return torch.autograd.grad(output.sum(), inputs)

    def one_by_one() -> object:
        parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(length, 2) for x in inputs), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        return torch.autograd.grad(torch.cat(outputs, 2).sum(), inputs)

    figures.compare(f"attention, {length} x {4096 // length}, D {dim}, {dtype}", {"semion": ours, "torch": one_by_one})


def swiglu_case(figures: Figures, dtype: str) -> None:
    """[4096, 2 x 2048], forward and backward, against torch's operators."""
    torch.manual_seed(0)
    x = torch.randn(4096, 4096).to(DTYPES[dtype]).requires_grad_()
    works: dict[str, Work] = {
        "semion": lambda: torch.autograd.grad(swiglu(x).sum(), x),
        "torch": lambda: torch.autograd.grad(reference_ops.swiglu(x).sum(), x),
    }
    figures.compare(f"SwiGLU [4096 x 2048] {dtype}", works)


def norm_case(figures: Figures, dtype: str) -> None:
    """[4096, 1024], forward and backward, against torch's own."""
    torch.manual_seed(0)
    x, weight, slope = (torch.randn(size).to(DTYPES[dtype]) for size in ((4096, 1024), (1024,), (4096, 1024)))
    inputs = x.requires_grad_(), weight.requires_grad_()
    works: dict[str, Work] = {
        "semion": lambda: torch.autograd.grad(rms_norm(*inputs, 1e-5), inputs, slope),
        "torch": lambda: torch.autograd.grad(F.rms_norm(inputs[0], (1024,), inputs[1], 1e-5), inputs, slope),
    }
    figures.compare(f"RMSNorm [4096 x 1024] {dtype}", works)


def linear_case(figures: Figures, num_rows: int) -> None:
    """All products of a decoding step of a model of 48 M float32 parameters, whose weights no cache holds, against
    torch's (MKL here) and oneDNN's on the same plain weights."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for _ in range(NUM_LAYERS) for shape in LAYER] + [torch.randn(WORDS)]
    rows = {width: torch.randn(num_rows, width) for width in (512, 2048)}

    def of(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Work:
        return lambda: [product(rows[weight.size(1)], weight) for weight in weights]

    onednn = torch.ops.mkldnn._linear_pointwise
    works = {"semion": of(linear), "torch": of(F.linear), "onednn": of(lambda x, w: onednn(x, w, None, "none", [], ""))}
    with torch.inference_mode():
        figures.compare(f"linear [{num_rows}, ...], {torch.get_num_threads()} threads", works)


def sampling_case(figures: Figures, num_rows: int, width: int) -> None:
    """A token of each row with log-prob and rank, every row with a generator of its own, against vLLM's steps of the same."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.sample.sampler import Sampler

    from engine.inference.cpu_sampler import Seeds

    current_platform.import_kernels()
    torch.manual_seed(0)
    logits, temperatures = 3 * torch.randn(num_rows, width), torch.ones(num_rows)
    generators = {row: torch.Generator().manual_seed(row) for row in range(num_rows)}
    seeds, draw = Seeds(), TopKTopPSampler("raw_logprobs")

    def vllm() -> object:
        log_probs = Sampler.compute_logprobs(logits)
        tokens, _ = draw(Sampler.apply_temperature(logits, temperatures, True), generators, None, None)
        chosen = log_probs.gather(-1, tokens.unsqueeze(-1))
        return tokens, chosen, (log_probs >= chosen).sum(-1)

    works: dict[str, Work] = {
        "semion": lambda: sample_tokens(logits, temperatures, seeds.next(generators, num_rows), raw_log_probs=True),
        "vllm": vllm,
    }
    with torch.inference_mode():
        figures.compare(f"sampling [{num_rows} x {width}], {torch.get_num_threads()} threads", works)


def lm_head_case(figures: Figures, dtype: str) -> None:
    """Hidden states to Llama 3's vocabulary, [256 x 1024] on a CPU and [8192 x 4096] on a GPU: log-probs and both gradients;
    peak of torch's allocations.

    `products` does nothing but the three products, all rows at once, on a GPU in the case's own type, on a CPU, which may have
    no products of half precision, in float32. No way is faster.
    """
    torch.manual_seed(0)
    num_tokens, hidden_size, vocabulary = HEADS[figures.device.type]
    with figures.device:
        hidden = torch.randn(num_tokens, hidden_size).to(DTYPES[dtype]).requires_grad_()
        weight = (0.03 * torch.randn(vocabulary, hidden_size)).to(DTYPES[dtype]).requires_grad_()
        targets, coefficients = torch.randint(0, vocabulary, (num_tokens,)), torch.randn(num_tokens)

    def both(log_probs: torch.Tensor) -> None:
        torch.autograd.grad((coefficients * log_probs).sum(), (hidden, weight))

    def eager() -> None:
        log_p = F.linear(hidden, weight).log_softmax(-1)
        both(log_p.gather(1, targets[:, None])[:, 0])

    on_gpu = figures.device.type == "cuda"
    x, w = (t.detach() if on_gpu else t.detach().float() for t in (hidden, weight))
    logits, slopes = x.new_empty(num_tokens, vocabulary), torch.empty_like(w)

    def products() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w)
        torch.mm(logits.t(), x, out=slopes)

    def head(**options: Any) -> Work:
        return lambda: both(lm_head_log_probs(hidden, weight, targets, **options))

    peers: dict[str, Work] = {
        "semion": head(coefficients=coefficients),
        "semion128" if not on_gpu else "semion1024": head(coefficients=coefficients, chunk_rows=1024 if on_gpu else 128),
        "recompute": head(),
        "eager": eager,
    }
    if figures.with_others:
        peers |= gpu_head_peers(hidden, weight, targets)
    peaks = peak_bytes_of(peers, figures.device)
    gradient = weight.nbytes + hidden.nbytes
    memory = {f"{peer}_MiB_beside_gradients": round((peak - gradient) / 2**20) for peer, peak in peaks.items()}
    name = f"LM head [{num_tokens} x {hidden_size} -> {vocabulary}] {dtype}, {torch.get_num_threads()} threads"
    figures.compare(name, peers | {"products": products}, extra=memory)


def gpu_head_peers(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Work]:
    """The output layers of others that are installed, with the mean over the tokens as loss: all form that one in one pass."""

    def gradients(peer: Peer) -> None:
        torch.autograd.grad(peer.call(hidden, weight, targets), (hidden, weight))

    return {peer.name: partial(gradients, peer) for peer in installed(OUTPUT_LAYERS)}


def cases(names: list[str], device: str) -> list[Callable[[Figures], None]]:
    """What to run of these names on such a device, in order."""
    found: list[Callable[[Figures], None]] = []
    for shape, dtype in product(SHAPES[device], TYPES[device]) if "log_probs" in names else ():
        found.append(partial(log_probs_case, num_tokens=shape[0], width=shape[1], dtype=dtype))
    if "policy" in names:
        found.append(policy_case)
    for dtype in TYPES[device]:
        found += [partial(digest_case, dtype=dtype)] if "digest" in names else []
        found += [partial(lm_head_case, dtype=dtype)] if "lm_head" in names else []
    for dtype in TYPES[device] if device == "cpu" else ():  # kernels of CPUs alone
        lengths = product((64, 512, 4096), (64, 128)) if "attention" in names else ()
        found += [partial(attention_case, length=length, dim=dim, dtype=dtype) for length, dim in lengths]
        found += [partial(swiglu_case, dtype=dtype)] if "swiglu" in names else []
        found += [partial(norm_case, dtype=dtype)] if "norm" in names else []
    for num_rows in DECODED if device == "cpu" and "linear" in names else ():
        found.append(partial(linear_case, num_rows=num_rows))
    for num_rows, width in SAMPLED if device == "cpu" and "sampling" in names else ():
        found.append(partial(sampling_case, num_rows=num_rows, width=width))
    return found


def peak_bytes_of(peers: Mapping[str, Work], device: torch.device) -> dict[str, int]:
    """The peaks of those that run."""
    peaks = {}
    for peer, work in peers.items():
        try:
            peaks[peer] = peak_bytes(work, device)
        except Exception:
            if peer == "semion":
                raise
    return peaks


def peak_bytes(work: Work, device: torch.device) -> int:
    """Largest sum of what torch's allocator had given out during work(), beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def processor() -> str:
    """The processor's own name and what it can do of the vector kinds."""
    text = Path("/proc/cpuinfo").read_text("utf-8")
    lines = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    flags = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in text.split()]
    return f"{lines.get('model name', platform.processor()).strip(': ')} ({', '.join(flags)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="1 and 2 on a CPU, 1 beside a GPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    machine = {
        "processor": processor(),
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
        "python": platform.python_version(),
    }
    if options.device == "cuda":
        machine |= {"GPU": torch.cuda.get_device_name()} | versions()
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n", flush=True)
    figures = Figures(options.repeats, torch.device(options.device))
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        parallel = open_parallel_state(Trainer(), rank=0, world_size=1, store=store, timeout=timedelta(seconds=60))
        for threads in options.threads or ([1] if options.device == "cuda" else [1, 2]):
            torch.set_num_threads(threads)
            for case in cases(options.cases, options.device):
                case(figures)
                if options.json:  # after every case: who ends this early keeps what there is
                    Path(options.json).write_text(json.dumps({"machine": machine, "figures": figures.rows}, indent=1), "utf-8")
        parallel.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
