"""Our DPO, GRPO and CISPO, with DPO's variants and GRPO's corrections, against TRL's own loss functions, losses and gradients
by log-prob: golden_trl.json was written by TRL 1.16.0 (tools/golden_trl.py) in float64 on made-up log-probs, whose ratios
lie on both sides of the clip.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.algorithms.registry import make_loss
from tests.builders import algorithm_options
from tests.rollouts import make_sequence
from tests.unit.algorithms.steps import LAYOUTS, Step

GOLDEN = json.loads(Path(__file__).with_name("golden_trl.json").read_text(encoding="utf-8"))
NUM_SEQUENCES = len(GOLDEN["policy"])
CLOSE = 2e-6  # relative or absolute: ours is float32


def golden_step(paired):
    """TRL's inputs as a step: pairs (0, 1), (2, 3), ... for DPO, advantages for GRPO."""
    step = Step(0, num_pairs=0)
    for i, (rollout, advantage) in enumerate(zip(GOLDEN["rollout"], GOLDEN["advantages"], strict=True)):
        group, chosen = (i // 2, i % 2 == 0) if paired else (-1, False)
        prompt = (i + 1, 9)
        step.sequences.append(make_sequence(prompt, tuple(range(len(rollout))), tuple(rollout), advantage, group, chosen))
    step.policy, step.reference = GOLDEN["policy"], GOLDEN["reference"]
    step.entropy = [[0.0] * len(row) for row in step.policy]
    return step


def assert_equal(loss, gradients, golden, scale):
    """TRL's numbers times `scale` are ours."""
    assert loss == pytest.approx(golden["loss"] * scale, rel=CLOSE, abs=CLOSE)
    for mine, theirs in zip(gradients, golden["gradients"], strict=True):
        assert mine == pytest.approx([value * scale for value in theirs], rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize("golden", GOLDEN["dpo"], ids=lambda golden: f"beta={golden['beta']}")
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_dpo_is_trls_sigmoid_loss(golden, layout):
    """Its mean over pairs is `reduction = "pairs"`."""
    objective = make_loss(algorithm_options({"loss": "dpo", "beta": golden["beta"], "reduction": "pairs"}))
    loss, _, gradients, _ = golden_step(paired=True).run(objective, **layout)
    assert_equal(loss, gradients, golden, 1.0)


@pytest.mark.parametrize("golden", GOLDEN["grpo"], ids=lambda golden: f"{golden['loss_type']}-{golden['kl_weight']}")
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_grpo_is_trls_clipped_loss_with_k3(golden, layout):
    """What TRL's loss types divide by: "dr_grpo" responses times their longest possible length; "luspo" responses;
    "grpo" each response by its length, then the responses; "bnpo" all tokens. Ours divides by prompts, here one."""
    options: dict[str, tuple[dict[str, Any], int]] = {
        "dr_grpo": ({}, NUM_SEQUENCES * GOLDEN["max_completion_length"]),
        "luspo": ({}, NUM_SEQUENCES),
        "grpo": ({"normalize_length": True}, NUM_SEQUENCES),
        "bnpo": ({"reduction": "tokens"}, 1),
    }
    ours, scale = options[golden["loss_type"]]
    algorithm = algorithm_options({"loss": "grpo", "clip_ratio": GOLDEN["epsilon"], "kl_weight": golden["kl_weight"], **ours})
    loss, _, gradients, _ = golden_step(paired=False).run(make_loss(algorithm), num_prompts=1, **layout)
    assert_equal(loss, gradients, golden, scale)


VARIANTS: dict[str, dict[str, Any]] = {  # by TRL's loss type; aot of one pair is cDPO
    "ipo": {"preference_loss": "ipo", "average_log_probs": True},
    "sigmoid_norm": {"average_log_probs": True},
    "aot": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("golden", GOLDEN["dpo_variants"], ids=lambda golden: f"{golden['loss_type']}-{golden['beta']}")
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_variants_of_dpo_are_trls(golden, layout):
    options = {"loss": "dpo", "beta": golden["beta"], "reduction": "pairs", **VARIANTS[golden["loss_type"]]}
    assert golden["label_smoothing"] == options.get("label_smoothing", 0.0)
    loss, _, gradients, _ = golden_step(paired=True).run(make_loss(algorithm_options(options)), **layout)
    assert_equal(loss, gradients, golden, 1.0)


@pytest.mark.parametrize("golden", GOLDEN["wpo"], ids=lambda golden: f"{golden['beta']}")
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_weighted_pairs_are_trls(golden, layout):
    """TRL: use_weighting."""
    step = golden_step(paired=True)
    step.squares = GOLDEN["squares"]
    options = {"loss": "dpo", "beta": golden["beta"], "reduction": "pairs", "weight_pairs": True}
    loss, _, gradients, _ = step.run(make_loss(algorithm_options(options)), **layout)
    assert_equal(loss, gradients, golden, 1.0)


@pytest.mark.parametrize("golden", GOLDEN["gspo"], ids=lambda golden: f"{golden['kl_weight']}")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_grpo_with_the_geometric_mean_is_trls_gspo(golden, layout):
    """TRL: importance_sampling_level = "sequence" with loss_type = "grpo"."""
    options = {"ratio_level": "geometric", "normalize_length": True, "clip_ratio": GOLDEN["epsilon_of_responses"]}
    algorithm = algorithm_options({"loss": "grpo", "kl_weight": golden["kl_weight"], **options})
    loss, sums, gradients, _ = golden_step(paired=False).run(make_loss(algorithm), num_prompts=1, **layout)
    assert_equal(loss, gradients, golden, NUM_SEQUENCES)
    assert 0 < sums["clipped_share"] < sum(map(len, GOLDEN["policy"]))


@pytest.mark.parametrize("golden", GOLDEN["cispo"], ids=lambda golden: f"{golden['kl_weight']}")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_cispo_is_trls(golden, layout):
    """Its sum over tokens is divided by all of the batch."""
    algorithm = {"loss": "cispo", "kl_weight": golden["kl_weight"], "weight_high": 1.2, "reduction": "tokens"}
    loss, _, gradients, _ = golden_step(paired=False).run(make_loss(algorithm_options(algorithm)), **layout)
    assert_equal(loss, gradients, golden, 1.0)


@pytest.mark.parametrize(
    "golden", GOLDEN["corrected"], ids=lambda g: f"{g['mode']}-{g['clip_min']}-{g['clip_max']}-{g['kl_weight']}"
)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_corrections_are_trls(golden, layout):
    """TRL: vllm_importance_sampling_mode, with one update a batch; its sequences' ratios are products."""
    level, kind = golden["mode"].split("_")
    bounds = {"correction_low": golden["clip_min"], "correction_high": golden["clip_max"]}
    options = {"correction": kind, "correction_level": level, "kl_weight": golden["kl_weight"], **bounds}
    made = make_loss(algorithm_options({"loss": "grpo", **options}))
    loss, sums, gradients, _ = golden_step(paired=False).run(made, num_prompts=1, **layout)
    assert_equal(loss, gradients, golden, NUM_SEQUENCES)
    assert 0 < sums["outside_share"] < sum(map(len, GOLDEN["policy"]))


def test_the_golden_ratios_lie_inside_and_on_both_sides_of_the_clip():
    gaps = [p - q for row, old in zip(GOLDEN["policy"], GOLDEN["rollout"], strict=True) for p, q in zip(row, old, strict=True)]
    assert min(gaps) < -0.25 and max(gaps) > 0.2 and any(abs(gap) < 0.1 for gap in gaps)
    assert {len(row) for row in GOLDEN["policy"]} >= {1, GOLDEN["max_completion_length"]}
