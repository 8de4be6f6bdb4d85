"""A loss like OAPL's and a reward like IFEval's, each a file that the engine knows nothing of, in one real run over two
data-parallel ranks: trained, interrupted and resumed bit for bit, and refused by name where one of the files has
changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.load import RunConfig
from tests.e2e.test_commands import rollouts, rows, semion_apart, tensors, untimed, written

pytestmark = pytest.mark.timeout(1800)

LOSS = Path(__file__).resolve().parents[1] / "own_loss.py"
REWARD = '''
"""Whether a completion follows the instructions of its row, as IFEval counts them."""
from engine.rewards.base import reward

CHECKS = {
    "max_words": lambda text, n: len(text.split()) <= n,
    "max_characters": lambda text, n: len(text) <= n,
    "ends_with": lambda text, n: text.endswith(n),
}

@reward(verifiable=True)
def follows(completion, row):
    return {each["type"]: float(CHECKS[each["type"]](completion, each["n"])) for each in row["instructions"]}
'''


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of a user's with a loss, a reward, and rows with constraints of their own."""
    folder = tmp_path / "user"
    folder.mkdir()
    shutil.copy(LOSS, folder / "losses.py")
    (folder / "rewards.py").write_text(REWARD)
    constraints = [
        [{"type": "max_words", "n": 1 + i % 3}, {"type": "max_characters", "n": 3 + i}, {"type": "ends_with", "n": "$"}]
        for i in range(8)
    ]
    lines = [json.dumps({"problem": f"{i}+{i}+1", "instructions": found[: 1 + i % 3]}) for i, found in enumerate(constraints)]
    (folder / "instructions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_loss_and_a_reward_from_outside_train_and_resume(
    run_config: Callable[..., RunConfig], outside: Path, tmp_path: Path
) -> None:
    reward = f"{outside}/rewards.py:follows"
    mix = f'data.mix=[{{train = "{outside}/instructions.jsonl", template = "{{problem}}", prompts_per_step = 2, ' + (
        f'reward = "{reward}"}}]'
    )
    own = [f"algorithm.loss={outside}/losses.py:ReferenceRegression", "algorithm.temperature=0.5", mix]
    layout = ["trainer.data_parallel=2", "trainer.microbatch_tokens=96"]
    regime = ["sync.sync_interval=2", "sync.reference=follow", "checkpoint.every=2"]
    whole = run_config(*own, *layout, *regime, directory="whole")
    semion_apart("train", written(whole, tmp_path))
    metrics, ledger = rows(whole, "metrics.jsonl"), rollouts(whole)
    assert {row["groups"] for row in metrics} == {whole.data.prompts_per_step + 2}
    assert all(0 < row["residual_mean"] <= row["residual_max"] for row in metrics)
    judged = [row for row in ledger if "reward_parts" in row]
    assert len(judged) == 4 * 2 * 6, "two prompts a step, six samples each"
    assert all(row["reward"] == sum(row["reward_parts"].values()) for row in judged)
    assert {len(row["reward_parts"]) for row in judged} == {1, 2, 3}, "each row has constraints of its own"
    parted = run_config(*own, *layout, *regime, directory="parted")
    file = written(parted, tmp_path)
    semion_apart("train", file, "run.steps=2")
    changed = outside / "rewards.py"
    changed.write_text(REWARD.replace("<=", "<"))
    assert reward in semion_apart("train", file, "--resume", "auto", expect=4)
    changed.write_text(REWARD)
    (outside / "losses.py").write_text(LOSS.read_text().replace("squares.mean()", "squares.sum()"))
    assert "algorithm.loss" in semion_apart("train", file, "--resume", "auto", expect=4)
    shutil.copy(LOSS, outside / "losses.py")
    semion_apart("train", file, "--resume", "auto")
    assert untimed(rows(parted, "metrics.jsonl")) == untimed(metrics)
    assert rollouts(parted) == ledger
    assert tensors(parted) == tensors(whole)
