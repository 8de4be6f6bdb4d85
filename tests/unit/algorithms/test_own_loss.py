"""A loss, an advantage and a pairing that a user brings in one file: values and gradients against float64 whatever the layout
in rows and ranks, and what breaks a promise is refused by the user's own name.
"""

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.algorithms.group import GROUPS
from engine.algorithms.registry import identities, make_algorithm, make_loss
from engine.config.load import override
from engine.core.errors import ConfigError, NumericsError
from engine.core.registry import identity
from tests.builders import algorithm_options, config
from tests.unit.algorithms.steps import LAYOUTS, Step
from tests.unit.rollouts.test_rollouts import group

OWN_LOSS = Path(__file__).resolve().parents[2] / "own_loss.py"
CLOSE = 2e-5  # relative or absolute: fp32 sums of some dozens of terms of order 1
NUM_PROMPTS = 7
HEAD = "import torch\nfrom engine.algorithms.group import GroupLoss, GroupOptions\nfrom engine.core.metrics import Metric\n"


def step_of(sizes, seed=3):
    """Groups of these sizes with random rewards, and the length of each response attached."""
    step, draw = Step(seed, num_pairs=0), random.Random(seed)
    for index, size in enumerate(sizes):
        for _ in range(size):
            step.add(index, False, draw.uniform(-1, 1))
    step.sequences = [
        replace(s, reward=draw.uniform(-1, 1), values={"length": float(len(s.completion_ids))}) for s in step.sequences
    ]
    return step


def regression(step, beta, anchor):
    """(loss, gradients, squares of the residuals by group) in float64 by autograd."""
    leaves = [torch.tensor(tokens, dtype=torch.float64, requires_grad=True) for tokens in step.policy]
    loss, squares = torch.zeros((), dtype=torch.float64), []
    for index in sorted({s.group for s in step.sequences}):
        members = [i for i, s in enumerate(step.sequences) if s.group == index]
        rewards = torch.tensor([step.sequences[i].reward for i in members], dtype=torch.float64)
        value = beta * (rewards / beta).exp().mean().log()
        gains = torch.stack([leaves[i].sum() - math.fsum(anchor[i]) for i in members])
        squares.append((beta * gains - (rewards - value)).square())
        loss = loss + squares[-1].mean()
    loss.backward()
    return loss.item(), [leaf.grad.tolist() if leaf.grad is not None else [] for leaf in leaves], squares


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["prompts", "pairs", "tokens"])
@pytest.mark.parametrize("name", ["Regression", "ReferenceRegression"])
def test_a_loss_from_outside_the_tree_is_its_formula(layout, reduction, name):
    """Groups of one to five, in one row, in several, on several ranks, and split over rows."""
    step, beta = step_of([5, 1, 2, 3]), 0.7
    options = algorithm_options({"loss": f"{OWN_LOSS}:{name}", "temperature": beta, "reduction": reduction})
    loss_function = make_loss(options)
    assert loss_function.needs_reference is (name == "ReferenceRegression")
    loss, metrics, gradients, _ = step.run(loss_function, num_prompts=NUM_PROMPTS, **layout)
    anchor = step.reference if loss_function.needs_reference else [s.rollout_log_probs for s in step.sequences]
    wanted, slopes, squares = regression(step, beta, anchor)
    divisor = {"prompts": NUM_PROMPTS, "pairs": 4, "tokens": step.num_tokens}[reduction]
    assert loss == pytest.approx(wanted / divisor, rel=CLOSE)
    for mine, theirs in zip(gradients, slopes, strict=True):
        assert mine == pytest.approx([value / divisor for value in theirs], rel=CLOSE, abs=CLOSE)
    assert metrics == pytest.approx(
        {
            "groups": 4,
            **step.mismatch(),
            "residual_mean": sum(float(values.mean().detach()) for values in squares),
            "residual_max": max(float(values.max().detach()) for values in squares),
        },
        rel=CLOSE,
    )


def test_a_step_without_groups_has_loss_0_and_no_largest_residual():
    loss, metrics, *_ = Step(0, num_pairs=0).run(make_loss(algorithm_options({"loss": f"{OWN_LOSS}:Regression"})))
    assert loss == 0
    assert metrics.pop("residual_max") == -math.inf
    assert set(metrics.values()) == {0.0}


def test_the_documents_example_is_the_same_loss(tmp_path):
    """Run as it stands there."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "algorithms.md").read_text("utf-8")
    file = tmp_path / "example.py"
    file.write_text(text.split("## One of your own")[1].split("```python\n")[1].split("```")[0])
    step = step_of([3, 2])
    example = make_loss(algorithm_options({"loss": f"{file}:Regression", "beta": 0.7}))
    known = make_loss(algorithm_options({"loss": f"{OWN_LOSS}:Regression", "temperature": 0.7}))
    for layout in LAYOUTS:
        loss, metrics, gradients, _ = step.run(example, **layout)
        wanted, sums, slopes, _ = step.run(known, **layout)
        assert loss == pytest.approx(wanted, rel=CLOSE)
        assert metrics["residual_mean"] == pytest.approx(sums["residual_mean"], rel=CLOSE)
        assert [g[0] for g in gradients] == pytest.approx([g[0] for g in slopes], rel=CLOSE, abs=CLOSE)


def test_the_loss_that_contributing_walks_through_does_what_it_says(tmp_path):
    """CISPO: the gradient of a token is minus its advantage times its clipped importance weight."""
    text = (Path(__file__).resolve().parents[3] / "CONTRIBUTING.md").read_text("utf-8")
    file = tmp_path / "cispo.py"
    file.write_text(text.split("## Add a loss")[1].split("```python\n")[1].split("```")[0])
    step = step_of([3, 2])
    made = make_loss(algorithm_options({"loss": f"{file}:Cispo", "ceiling": 1.01, "reduction": "tokens"}))
    for layout in LAYOUTS:
        _, metrics, gradients, _ = step.run(made, **layout)
        weights = 0.0
        for sequence, now, found in zip(step.sequences, step.policy, gradients, strict=True):
            clipped = [min(1.01, math.exp(a - b)) for a, b in zip(now, sequence.rollout_log_probs, strict=True)]
            wanted = [-sequence.advantage * weight / step.num_tokens for weight in clipped]
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-8)
            weights += sum(clipped)
        assert metrics["weight_mean"] == pytest.approx(weights, rel=1e-5)  # the sum: the policy divides it


def own(tmp_path, body, name="mine.py"):
    """A file of the user's with this class or function; its path."""
    file = tmp_path / name
    file.write_text(HEAD + body)
    return file


def test_a_group_is_in_the_order_of_its_rollouts_also_where_it_is_split(tmp_path):
    """Weights by place: rows are filled first fit, which puts a later sequence into an earlier row."""
    file = own(
        tmp_path,
        "class Ordered(GroupLoss):\n"
        "    def group_loss(self, group):\n"
        "        places = torch.arange(1.0, 1.0 + len(group.rewards))\n"
        "        return (places * group.sums(group.log_probs)).sum()\n",
    )
    step = step_of([6, 3])
    for layout in LAYOUTS:
        _, _, gradients, _ = step.run(make_loss(algorithm_options({"loss": f"{file}:Ordered"})), num_prompts=1, **layout)
        wanted = [float(place) for size in (6, 3) for place in range(1, size + 1)]
        assert [gradient[0] for gradient in gradients] == pytest.approx(wanted)


BROKEN = [
    ("return (group.sums(group.log_probs)).log().sum()", "must return a finite loss; found nan"),
    ("return group.sums(group.log_probs)", r"must return a scalar tensor for a group; found shape \[2\]"),
    ("return 1.0", "must return a scalar tensor for a group; found 1.0"),
    ("return group.rewards.mean()", "must return a loss with a gradient; found none for group"),
    ("return group.sums(group.log_probs).mean().detach()", "must return a loss with a gradient"),
    (
        "return group.sums(group.log_probs).mean(), {'unknown': torch.zeros(())}",
        "must return a value for each metric that it declares; found unknown, declared are none",
    ),
]


@pytest.mark.parametrize(("body", "words"), BROKEN)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=["whole", "split"])
def test_a_loss_that_breaks_a_promise_is_refused_by_its_name(tmp_path, body, words, layout):
    file = own(tmp_path, f"class Mine(GroupLoss):\n    def group_loss(self, group):\n        {body}\n")
    loss_function = make_loss(algorithm_options({"loss": f"{file}:Mine"}))
    with pytest.raises(NumericsError, match=rf"algorithm\.loss = '.*mine\.py:Mine' {words}"):
        step_of([2, 2]).run(loss_function, **layout)


def test_a_declared_metric_must_be_returned_and_be_a_scalar(tmp_path):
    body = (
        "class Mine(GroupLoss):\n    metrics = (Metric('size', 'of it', reduce='sum'),)\n"
        "    def group_loss(self, group):\n        loss = group.sums(group.log_probs).mean()\n        return loss{}\n"
    )
    bare = own(tmp_path, body.format(""), "bare.py")
    with pytest.raises(NumericsError, match=r"bare\.py:Mine' .* found none, declared are size"):
        step_of([2]).run(make_loss(algorithm_options({"loss": f"{bare}:Mine"})))
    wide = own(tmp_path, body.format(", {'size': group.rewards}"), "wide.py")
    with pytest.raises(NumericsError, match=r"wide\.py:Mine': metric size must be a scalar; found shape \[2\]"):
        step_of([2]).run(make_loss(algorithm_options({"loss": f"{wide}:Mine"})))


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("Metric('size', 'of it')", "reduce = 'sum', 'mean' or 'max' .* found 'size' with 'last'"),
        (f"Metric('{GROUPS.name}', 'mine', reduce='sum')", "names of its own; found 'groups'"),
        ("Metric('size', 'of it', reduce='mean', per='prompts')", "divide the mean size by one of groups, .* per = 'prompts'"),
    ],
)
def test_a_metric_that_cannot_be_put_together_is_refused_by_name(tmp_path, declared, words):
    file = own(tmp_path, f"class Mine(GroupLoss):\n    metrics = ({declared},)\n    def group_loss(self, group): ...\n")
    with pytest.raises(ConfigError, match=rf"mine\.py:Mine' must .*{words}"):
        make_loss(algorithm_options({"loss": f"{file}:Mine"}))


def test_a_group_becomes_its_judged_rollouts_with_rewards_and_attached_values():
    algorithm = make_algorithm(algorithm_options({"loss": f"{OWN_LOSS}:Regression"}))
    made, has_signal = algorithm.sequences(group([3, 1, 2], 0, ["ok", "timeout", "ok"]), 5, 0)
    assert has_signal
    assert [(s.reward, s.advantage, s.group, s.values) for s in made] == [
        (3.0, 0.5, 5, {"length": 1.0}),
        (2.0, -0.5, 5, {"length": 3.0}),
    ]
    assert algorithm.sequences(group([0, 0], 0, ["timeout", "died"]), 0, 0) == ([], False)


def test_attached_values_must_be_one_a_rollout(tmp_path):
    body = "class Mine(GroupLoss):\n    def group_loss(self, group): ...\n"
    body += "    def values(self, group):\n        return {'quality': [1.0]}\n"
    file = own(tmp_path, body)
    algorithm = make_algorithm(algorithm_options({"loss": f"{file}:Mine"}))
    with pytest.raises(NumericsError, match=r"mine\.py:Mine' must attach one finite value of 'quality' to each of 2"):
        algorithm.sequences(group([0, 1]), 0, 0)


@pytest.mark.parametrize("loss", ["grpo", "group_dpo", f"{OWN_LOSS}:Regression"])
def test_an_advantage_of_the_users_own_is_used_and_checked(tmp_path, loss):
    file = own(
        tmp_path,
        "def halves(rewards):\n    return [reward / 2 for reward in rewards]\n"
        "def short(rewards):\n    return rewards[1:]\n"
        "def infinite(rewards):\n    return [float('inf') for _ in rewards]\n"
        "def nothing(rewards):\n    return None\n",
    )

    def sequences(name, rewards=(1.0, 0.0, 3.0)):
        options = {"loss": loss, "normalize_advantages": f"{file}:{name}"}
        return make_algorithm(algorithm_options(options)).sequences(group(list(rewards)), 0, 0)[0]

    assert [s.advantage for s in sequences("halves")] == [0.5, 0.0, 1.5]
    for name, found in (("short", r"\[0\.0, 3\.0\]"), ("infinite", "inf"), ("nothing", "None")):
        rule = rf"algorithm\.normalize_advantages = '.*mine\.py:{name}' must return one finite number for each of 3 rewards"
        with pytest.raises(NumericsError, match=rf"{rule}; found .*{found}"):
            sequences(name)


def test_a_pairing_of_the_users_own_is_used_and_checked(tmp_path):
    file = own(
        tmp_path,
        "import dataclasses\n"
        "def ends(group, draw):\n    return group.judged[0], group.judged[-1]\n"
        "def drawn(group, draw):\n    return draw.sample(group.judged, 2)\n"
        "def none(group, draw):\n    return None\n"
        "def twice(group, draw):\n    return group.judged[0], group.judged[0]\n"
        "def one(group, draw):\n    return group.judged[0]\n"
        "def foreign(group, draw):\n    return group.judged[0], dataclasses.replace(group.judged[1])\n",
    )

    def sequences(name, step=0):
        algorithm = make_algorithm(algorithm_options({"loss": "dpo", "pairing": f"{file}:{name}"}))
        return algorithm.sequences(replace(group([0, 1, 1, 0]), step=step), 0, 0)

    made, has_signal = sequences("ends")
    assert [(len(s.completion_ids), s.chosen) for s in made] == [(1, True), (4, False)]
    assert has_signal
    assert sequences("none") == ([], False)
    drawn = [[len(s.completion_ids) for s in sequences("drawn", step)[0]] for step in range(9)]
    assert drawn == [[len(s.completion_ids) for s in sequences("drawn", step)[0]] for step in range(9)], "a seeded draw"
    assert len({tuple(pair) for pair in drawn}) > 1
    for name in ("twice", "one", "foreign"):
        with pytest.raises(NumericsError, match=rf"algorithm\.pairing = '.*mine\.py:{name}' must return \(chosen, rejected\)"):
            sequences(name)


def test_identities_are_digests_of_the_users_files_alone(tmp_path):
    assert identities(algorithm_options({"loss": "group_dpo"})) == {}
    file = own(tmp_path, "def halves(rewards):\n    return rewards\n")
    options = algorithm_options({"loss": f"{OWN_LOSS}:Regression", "normalize_advantages": f"{file}:halves"})
    assert identities(options) == {
        "algorithm.loss": identity(f"{OWN_LOSS}:Regression", "algorithm.loss"),
        "algorithm.normalize_advantages": identity(f"{file}:halves", "algorithm.normalize_advantages"),
    }
    before = identities(options)
    file.write_text(file.read_text() + "# changed\n")
    assert identities(options).items() ^ before.items()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("class Mine(GroupLoss):\n    pass\n", r"must have a method group_loss\(self, group\); found none"),
        ("class Mine(GroupLoss):\n    def group_loss(self):\n        pass\n", r"found group_loss\(self\)"),
        ("class Mine(GroupLoss):\n    async def group_loss(self, group):\n        pass\n", r"found async group_loss"),
        ("class Mine(GroupLoss):\n    def group_loss(self, group):\n        yield 1\n", r"found generator group_loss"),
        ("class Mine(GroupLoss):\n    metrics = ('a',)\n    def group_loss(self, group): ...\n", "as Metric; found 'a'"),
        ("import sys\nsys.exit(0)\n", r"with SystemExit\(0\) \(.*mine\.py, line \d+\)"),
    ],
)
def test_a_class_that_cannot_be_a_loss_is_refused_before_it_is_used(tmp_path, body, said):
    with pytest.raises(ConfigError, match=rf"algorithm\.loss.*{said}"):
        make_loss(algorithm_options({"loss": f"{own(tmp_path, body)}:Mine"}))


def test_what_a_users_own_raises_is_told_with_its_name_and_line(tmp_path):
    file = own(tmp_path, "class Mine(GroupLoss):\n    def group_loss(self, group):\n        return {}['gone']\n")
    made = make_loss(algorithm_options({"loss": f"{file}:Mine"}))
    with pytest.raises(NumericsError, match=r"algorithm\.loss = .*:Mine' failed with KeyError: 'gone' \(.*mine\.py, line"):
        step_of([3, 2]).run(made)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("normalize_advantages", "three", "must name an ordinary function; found .* which is 3"),
        ("normalize_advantages", "two", r"must name a function of \(rewards\); found .*: missing"),
        ("pairing", "one", r"must name a function of \(group, draw\); found .*: too many"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(tmp_path, option, value, said):
    body = "three = 3\ndef two(rewards, more): pass\ndef one(group): pass\n"
    loss = "dpo" if option == "pairing" else "grpo"
    with pytest.raises(ConfigError, match=said):
        override(config(), {"algorithm.loss": loss, f"algorithm.{option}": f"{own(tmp_path, body)}:{value}"})


def test_an_algorithm_without_its_methods_is_refused_by_name(tmp_path):
    file = own(tmp_path, "from engine.algorithms.base import Algorithm\nclass Mine(Algorithm):\n    pass\n")
    with pytest.raises(ConfigError, match=r"mine\.py:Mine' must have the methods .* found no sequences and no __call__"):
        make_loss(algorithm_options({"loss": f"{file}:Mine"}))
    assert "found no sequences and no __call__" in broken({"loss": f"{file}:Mine"})


LOSS = "class Mine(GroupLoss):\n    def group_loss(self, group): ...\n"
OPTIONS = "from engine.algorithms.group import GroupOptions\nfrom engine.config.options import AlgorithmOptions\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            f"{LOSS}    Options = dict\n",
            r"must have Options that extend GroupOptions, since it extends GroupLoss; found",
        ),
        (f"{OPTIONS}{LOSS}    Options = AlgorithmOptions\n", "must have Options that extend GroupOptions"),
        (
            f"{OPTIONS}class Other(GroupOptions):\n    loss: int = 3\n{LOSS}    Options = Other\n",
            "must leave the option `loss` of its Options as it is",
        ),
        (
            "from engine.algorithms.group_dpo import GroupDpo\nfrom engine.algorithms.dpo import DpoOptions\n"
            "class Mine(GroupDpo):\n    Options = DpoOptions\n",
            "must have Options that extend GroupDpoOptions",
        ),
        (
            f"{LOSS}    @classmethod\n    def broken_rules(cls, config):\n        1 / 0\n",
            r"ZeroDivisionError.*mine\.py, line \d+",
        ),
        (
            f"{LOSS}    @classmethod\n    def broken_rules(cls, config):\n        return 'x'\n",
            "a list of sentences .* found",
        ),
        (f"{LOSS}    def __init__(self, *a, **k):\n        {{}}['gone']\n", r"KeyError: 'gone' \(.*mine\.py, line \d+\): mend"),
    ],
)
def test_what_a_users_class_says_of_itself_is_checked_before_a_run(tmp_path, body, said):
    assert re.search(rf"algorithm\.loss = '.*mine\.py:Mine' .*{said}", broken({"loss": f"{own(tmp_path, body)}:Mine"}))


def broken(algorithm: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        override(config(), algorithm=algorithm)
    return str(raised.value)


def test_attached_values_have_the_same_names_in_every_group(tmp_path):
    body = f"{LOSS}    def values(self, group):\n"
    body += "        return {name: [0.0] * len(group.judged) for name in ('ab' if group.judged[0].score.value else 'a')}\n"
    algorithm = make_algorithm(algorithm_options({"loss": f"{own(tmp_path, body)}:Mine"}))
    algorithm.sequences(group([0, 1]), 0, 0)
    with pytest.raises(
        NumericsError, match=r"must attach values of the same names to every group; found a, b for .* and a bef"
    ):
        algorithm.sequences(group([1, 1]), 1, 0)


def test_what_values_raises_is_told_by_name_and_line(tmp_path):
    file = own(tmp_path, f"{LOSS}    def values(self, group):\n        return 1 / 0\n")
    with pytest.raises(NumericsError, match=r"mine\.py:Mine' failed with ZeroDivisionError: .* \(.*mine\.py, line \d+\)"):
        make_algorithm(algorithm_options({"loss": f"{file}:Mine"})).sequences(group([0, 1]), 0, 0)
