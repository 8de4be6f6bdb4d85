"""What the kernels' benchmark promises without a GPU: peers on the tensors' own device, and a broken one that costs its row."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import reference_ops
from tools import bench_ops


def test_the_digests_peer_stays_on_its_device():
    """It mixed the devices of weights and bits, which ended the benchmark on a GPU before the LM head."""
    with FakeTensorMode():
        found = reference_ops.block_digest(torch.empty(64, 64, device="cuda", dtype=torch.bfloat16), row=0, col=0, seed=1)
    assert found.device.type == "cuda"


def test_a_peer_that_fails_costs_its_own_row(capsys):
    figures = bench_ops.Figures(2, torch.device("cpu"))

    def broken():
        raise ImportError("no module named peer")

    figures.compare("case", {"semion": lambda: None, "peer": broken, "other": lambda: None})
    figures.compare("next", {"semion": lambda: None, "peer": lambda: None})
    assert [(row["case"], row["peer"]) for row in figures.rows] == [
        ("case", "semion"),
        ("case", "other"),
        ("next", "semion"),
        ("next", "peer"),
    ]
    assert "left out: no module named peer" in capsys.readouterr().out
    with pytest.raises(ImportError):
        figures.compare("ours", {"semion": broken})


def test_a_gpu_runs_the_shapes_that_documents_name():
    """A row of Llama 3.1 8B in bf16, its LM head, and one shard of eight; every case once, a CPU's own on CPUs alone."""
    assert (8192, 128256) in bench_ops.SHAPES["cuda"]
    assert bench_ops.HEADS["cuda"] == (8192, 4096, 128256)
    for device, count in (("cpu", 2 * 2 + 1 + 2 * 2 + 2 * (3 * 2 + 2) + 7 + 3), ("cuda", 2 * 3 + 1 + 2 * 3)):
        assert len(bench_ops.cases(bench_ops.CASES, device)) == count
