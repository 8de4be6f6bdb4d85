"""The CUDA kernels as a library for this processor: compiles the .cu files with the thread by thread machine of simt.h,
keeps the library in build/ under a digest of its sources, and gives the launchers' arguments their ctypes. No tests.
"""

import ctypes
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ELEMENTS = [torch.float32, torch.bfloat16, torch.float16]  # in the order of the launchers' numbers
pointer, i32, i64, u64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float


def digest(*parts: str) -> str:
    """Of the kernels' sources and whatever else decides the result."""
    total = hashlib.sha256("\0".join(parts).encode())
    for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cu"), *HERE.glob("simt*.*")]):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


class LogProbRows(ctypes.Structure):
    _fields_ = [
        ("logits", pointer), ("row_stride", i64), ("targets", pointer), ("num_rows", i64), ("vocab_start", i64),
        ("lowest_id", i64), ("end_id", i64), ("temperature", ctypes.c_double), ("element", i32), ("num_columns", i32),
        ("num_valid", i32), ("every_row", i32),
    ]  # fmt: skip


class LogProbGradient(ctypes.Structure):
    _fields_ = [
        ("totals", pointer), ("grad_log_prob", pointer), ("grad_entropy", pointer), ("out", pointer), ("row_stride", i64),
    ]  # fmt: skip


class PolicyGradientRow(ctypes.Structure):
    _fields_ = [
        ("log_probs", pointer), ("old_log_probs", pointer), ("reference_log_probs", pointer), ("advantages", pointer),
        ("cu_seqlens", pointer), ("targets", pointer), ("num_tokens", i32), ("num_sequences", i32), ("clip_low", f32),
        ("clip_high", f32), ("dual_clip", f32), ("kl_weight", f32),
    ]  # fmt: skip


class DigestBlock(ctypes.Structure):
    _fields_ = [
        ("block", pointer), ("row_stride", i64), ("columns", pointer), ("num_rows", i64), ("num_columns", i64), ("row", i64),
        ("seed", u64),
    ]  # fmt: skip


def compiled() -> Path:
    """The kernels as a library for this processor."""
    compiler = os.environ.get("CXX", "c++")
    flags = [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-DSEMION_SIMT",
        "-Icsrc",
        "-Itests/unit/ops",
    ]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    library = ROOT / "build/simt" / f"kernels-{digest(compiler, *flags)}.so"
    if library.exists():
        return library
    work = library.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True)

    def build(source):
        target = work / f"{source.stem}.o"
        command = [compiler, "-x", "c++", *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, cwd=ROOT)
        return str(target)

    sources = [*sorted(ROOT.glob("csrc/**/*_kernel.cu")), HERE / "simt_driver.cpp"]
    with ThreadPoolExecutor(2) as threads:
        objects = list(threads.map(build, sources))
    subprocess.run([compiler, "-shared", *objects, "-o", str(work / "whole.so")], check=True)
    os.replace(work / "whole.so", library)  # whole or not at all, whoever else builds it now
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    return library


def load():
    """The launchers, on a machine that runs the threads of a block one after another."""
    library = ctypes.CDLL(str(compiled()))
    library.simt_from_float16.restype = f32
    library.semion_policy_gradient_workspace.restype = i64
    library.simt_to_float16.restype = library.simt_to_bfloat16.restype = ctypes.c_uint16
    for name in ("simt_to_float16", "simt_to_bfloat16"):
        getattr(library, name).argtypes = [f32]
    return library


def at(tensor):
    """A tensor as a pointer argument; the caller keeps the tensor."""
    return pointer(None if tensor is None else tensor.data_ptr())


def in_both_orders(kernels, work):
    """work() with the threads of a block running forwards; running backwards it must give the same bits."""
    first = work()
    kernels.simt_set_backwards(1)
    second = work()
    kernels.simt_set_backwards(0)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), "threads do not wait"
    return first
