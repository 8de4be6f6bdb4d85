"""tools/golden_check.py on the runs that other tests start: losses, gradient norms and what else depends on log-probs,
recomputed in float64 from the ledger and the weights on disk by code that shares nothing with the engine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.config.load import RunConfig
from tests.e2e.test_commands import rows
from tools.golden_check import Comparison, check, main

pytestmark = pytest.mark.timeout(1800)


def agreed(config: RunConfig, *steps: int) -> dict[str, list[float]]:
    """The recomputed figures of these steps by name, once all are within their bounds of what the run wrote down."""
    found: list[Comparison] = check(config.run_directory)
    assert [one for one in found if not one.agrees] == []
    assert [one.step for one in found if one.name == "loss"] == list(steps)
    names = dict.fromkeys(one.name for one in found)
    return {name: [one.recomputed for one in found if one.name == name] for name in names}


def test_dpo_with_nll_and_entropy(semi_online: tuple[RunConfig, str]) -> None:
    """Tensor-parallel 2, two engines; at step 2 the policy has left the reference."""
    figures = agreed(semi_online[0], 0, 2)
    assert figures["margin_mean"][0] == 0 and abs(figures["margin_mean"][1]) > 1e-4
    assert min(figures["pairs"]) >= 1 and min(figures["entropy_mean"]) > 0.1


def test_group_dpo_with_stale_grpo(offline: RunConfig) -> None:
    """Pipeline-parallel 2, two sources, spare prompts; at step 2 the policy has left its rollouts and the reference."""
    figures = agreed(offline, 0, 2)
    assert abs(figures["ratio_mean"][1] - 1) > 1e-5 and figures["kl_mean"][1] > 1e-5
    assert abs(figures["margin_mean"][1]) > 1e-4 and min(figures["pairs"]) > 1


def test_grpo_over_tensor_and_sequence_parallel_ranks(stopped: tuple[RunConfig, str]) -> None:
    figures = agreed(stopped[0], 0, 3)
    assert figures["kl_mean"][0] == 0 and figures["kl_mean"][1] > 1e-5
    assert max(figures["rollout log-probs"]) < 1e-4, "the engine serves the trainer's weights"


def test_rollouts_of_another_temperature(online: RunConfig) -> None:
    """Sampler, policy and reference are all of the distribution that was sampled, at temperature 0.7."""
    figures = agreed(online, 0, 1, 2)
    assert figures["ratio_mean"] == pytest.approx([1, 1, 1], abs=1e-4), "fresh rollouts are the policy's own"


def test_a_wrong_record_is_found(stopped: tuple[RunConfig, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stopped[0].run_directory, copy)
    first, *others = rows(stopped[0], "metrics.jsonl")
    (copy / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    assert main([str(copy)]) == 0
    (copy / "metrics.jsonl").write_text(json.dumps(first | {"loss": first["loss"] + 1e-5}) + "\n")
    assert main([str(copy)]) == 1
    assert "more than 4e-07" in capsys.readouterr().out
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others[:2]))
    assert main([str(copy)]) == 2
    assert "the weights of no step are on disk" in capsys.readouterr().err
