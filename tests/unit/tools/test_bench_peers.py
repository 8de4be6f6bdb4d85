"""The kernels of other libraries that the benchmark compares ours with on a GPU: every call is made here, on a CPU, against a
stand-in with the signature that the library's own source has, and must give the loss and the gradients of plain PyTorch. Where
the library is there, its source is compared with the stand-in's signature."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from tests.te_cpu import SITE
from tools import bench_ops, bench_peers
from tools.bench_peers import CROSS_ENTROPIES, OUTPUT_LAYERS, Peer

TOKENS, HIDDEN, VOCABULARY = 6, 8, 40


def parallel_cross_entropy(
    inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None, ignore_idx=-100, is_cg_capturable=False,
    *, _input=None,
):  # fmt: skip
    assert inp.dim() == 3 and target.shape == inp.shape[:2] and not reduce_loss and dist_process_group is None
    return F.cross_entropy(inp.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=label_smoothing).view_as(
        target
    )


def liger_cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0,
    lse_square_scale=0.0, softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False,
):  # fmt: skip
    return F.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction)


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
    return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1,
):  # fmt: skip
    return F.cross_entropy(F.linear(input, weight, bias), target, ce_weight, reduction=reduction)


def cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean", inplace_backward=False):
    assert lse_partial is None and inplace_backward
    return F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction)


def chunked_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    return F.cross_entropy(F.linear(x, weight), target, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):
    return F.cross_entropy(F.linear(e, c), targets, ignore_index=ignore_index, reduction=reduction)


STAND_INS: dict[str, tuple[Callable[..., torch.Tensor], ...]] = {  # by the module that a call imports from
    "transformer_engine.pytorch.cross_entropy": (parallel_cross_entropy,),
    "liger_kernel.transformers.functional": (liger_cross_entropy, liger_fused_linear_cross_entropy),
    "quack.cross_entropy": (cross_entropy,),
    "quack.linear_cross_entropy": (chunked_linear_cross_entropy,),
    "cut_cross_entropy": (linear_cross_entropy,),
}
IN_FILE = {"cut_cross_entropy": "cut_cross_entropy.linear_cross_entropy"}  # where a module only hands a name on


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in STAND_INS.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            parent = ".".join(parts[:depth])
            module = types.ModuleType(parent)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, parent, module)
        vars(sys.modules[name]).update({function.__name__: function for function in functions})


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone where megatron-core looks for it; what it fuses is not compiled."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", dist.group.WORLD)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        dist.destroy_process_group()


def drawn(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).requires_grad_()


TARGETS = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))


def names(peers: tuple[Peer, ...]) -> list[str]:
    return [peer.name for peer in peers]


@pytest.mark.parametrize("peer", CROSS_ENTROPIES, ids=names(CROSS_ENTROPIES))
def test_a_cross_entropy_is_each_tokens_loss(peer: Peer, stand_ins: None, one_rank: None) -> None:
    given = drawn(TOKENS, VOCABULARY)
    coefficients = torch.arange(1.0, TOKENS + 1)
    wanted = F.cross_entropy(given, TARGETS, reduction="none")
    (slopes,) = torch.autograd.grad((coefficients * wanted).sum(), given)
    logits = given * 1  # some write over them
    losses = peer.call(logits, TARGETS)
    assert losses.shape == (TOKENS,)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad((coefficients * losses).sum(), logits)
    tolerance = 2**-8 if peer.name == "megatron_fused" else 1e-6  # it rounds gradients to bf16 whatever the type
    torch.testing.assert_close(found, slopes, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("peer", OUTPUT_LAYERS, ids=names(OUTPUT_LAYERS))
def test_an_output_layer_is_the_mean_loss(peer: Peer, stand_ins: None) -> None:
    hidden, weight = drawn(TOKENS, HIDDEN), drawn(VOCABULARY, HIDDEN)
    wanted = F.cross_entropy(hidden @ weight.t(), TARGETS)
    found = peer.call(hidden, weight, TARGETS)
    assert found.shape == ()
    torch.testing.assert_close(found, wanted)
    slopes = torch.autograd.grad(wanted, (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, weight)), slopes)


def test_a_gpus_cases_run_whole(monkeypatch: pytest.MonkeyPatch, stand_ins: None, one_rank: None) -> None:
    """With every peer, the compiled one and the backward alone: a call that crashed would be left out of the rows."""
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: object())
    monkeypatch.setattr(bench_ops, "HEADS", {"cpu": (TOKENS, HIDDEN, VOCABULARY)})
    figures = bench_ops.Figures(1, torch.device("cpu"))
    figures.with_others = True
    bench_ops.log_probs_case(figures, TOKENS, VOCABULARY, "float32")
    bench_ops.lm_head_case(figures, "float32")
    ran = {(row["case"].split()[0], row["peer"]) for row in figures.rows}
    others = {"eager", "megatron", "compiled", *names(CROSS_ENTROPIES)}
    assert {peer for case, peer in ran if case == "both"} == {"semion", *others}
    assert {peer for case, peer in ran if case == "backward"} == {"semion", "copy"}
    assert {peer for case, peer in ran if case == "LM"} >= {"semion", "recompute", "products", *names(OUTPUT_LAYERS)}


def test_what_is_not_installed_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: object() if name == "megatron" else None)
    assert names(tuple(bench_peers.installed(CROSS_ENTROPIES))) == ["megatron_fused"]
    assert bench_peers.installed(OUTPUT_LAYERS) == []
    found = bench_peers.versions()
    assert found.pop("megatron-core")[0].isdigit()
    assert found == dict.fromkeys(("transformer_engine", "liger-kernel", "quack-kernels", "cut-cross-entropy"), "not installed")


def sources() -> list[tuple[Callable[..., Any], Path]]:
    """The stand-ins whose library is there, with its file."""
    found = []
    for name, functions in STAND_INS.items():
        file = Path(*IN_FILE.get(name, name).split(".")).with_suffix(".py")
        place = next((folder / file for folder in (*map(Path, sys.path), SITE) if (folder / file).exists()), None)
        found += [(function, place) for function in functions if place is not None]
    return found


@pytest.mark.parametrize(("stand_in", "file"), [pytest.param(*one, id=one[0].__name__) for one in sources()])
def test_a_stand_in_has_the_signature_of_what_is_installed(stand_in: Callable[..., Any], file: Path) -> None:
    nodes = [
        n for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.FunctionDef) and n.name == stand_in.__name__
    ]
    theirs = [argument.arg for argument in (*nodes[-1].args.args, *nodes[-1].args.kwonlyargs)]
    assert list(inspect.signature(stand_in).parameters) == theirs
