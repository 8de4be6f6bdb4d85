"""What the operators claim about memory, run by the tests in a fresh process whose address space may grow by so many bytes
and no further: in an old one a free list could serve what is denied. Blocks over 32 MB never come from a free list there.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from engine.ops import lm_head_log_probs, token_log_probs


def fits(work: Callable[[], object], num_bytes: float) -> bool:
    """Whether work() gets by with num_bytes more than the process has."""
    found = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(found[1]) + int(num_bytes), hard))
    try:
        work()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return True


def token_log_probs_take_nothing_of_row_length() -> None:
    """Forward and backward over 49 MB of bf16 logits need less than 4 MB more."""
    logits = torch.randn(192, 128256).bfloat16().requires_grad_() * 1  # no leaf: the operator writes over it
    targets = torch.randint(0, 128256, (192,))

    def work(rows: int) -> None:
        x = logits if rows == 192 else logits[:rows].detach().clone().requires_grad_() * 1
        log_probs, entropy = token_log_probs(x, targets[:rows], with_entropy=True)
        assert entropy is not None
        torch.autograd.grad((log_probs + entropy).sum(), x)

    work(1)  # threads and autograd take theirs once
    assert fits(lambda: work(192), 4e6)
    assert not fits(lambda: logits.detach().clone(), 40e6), "the bound must refuse a tensor of row length"


def lm_head_never_holds_all_logits(single_pass: bool) -> None:
    """1024 × 32000 logits are 131 MB; with 64 rows at a time 40 MB are enough, 8 of them the weight's gradient."""
    hidden, weight = torch.randn(1024, 64, requires_grad=True), torch.randn(32000, 64, requires_grad=True)
    targets = torch.randint(0, 32000, (1024,))

    def work(rows: int) -> None:
        coefficients = torch.ones(rows) if single_pass else None
        found = lm_head_log_probs(hidden[:rows], weight, targets[:rows], coefficients=coefficients, chunk_rows=64)
        torch.autograd.grad(0.5 * found.sum(), (hidden, weight))

    work(1)
    assert fits(lambda: work(1024), 40e6)
    assert not fits(lambda: hidden @ weight.t(), 100e6), "the bound must refuse all logits"


CLAIMS = {
    "token_log_probs": token_log_probs_take_nothing_of_row_length,
    "lm_head_single_pass": lambda: lm_head_never_holds_all_logits(True),
    "lm_head_recomputed": lambda: lm_head_never_holds_all_logits(False),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    CLAIMS[sys.argv[1]]()
