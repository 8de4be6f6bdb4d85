"""Every option is documented: a text, allowed values, and a unit where it is a number; `semion options` prints them."""

import re
from typing import Any

import pytest

from engine.cli import main
from engine.config.options import LOSSES, AlgorithmOptions, Options
from engine.config.reference import is_number, sections, units

TABLES: dict[str, Any] = {name: table.annotation for name, table in Options.model_fields.items()}
TABLES |= {"algorithm": AlgorithmOptions} | {loss: LOSSES.load(loss).Options for loss in LOSSES.names}
FIELDS = {f"{section}.{name}": field for section, table in TABLES.items() for name, field in table.model_fields.items()}
EVERY = [option for section in sections() for option in section.options]


@pytest.mark.parametrize("name", FIELDS)
def test_a_number_has_a_unit_and_nothing_else_has_one(name):
    field = FIELDS[name]
    if name.endswith("data.mix"):
        return
    assert bool(units(field)) == is_number(field.annotation), f"{name}: give it a Unit, or PURE"


def test_every_option_has_a_text_and_values():
    for option in EVERY:
        name = f"{option.section}.{option.name}"
        assert len(option.text.split()) >= 3, f"{name} must say what it is to somebody who has never seen it"
        assert "see section" not in option.text
        assert option.values, name


def test_a_number_that_is_bounded_says_so_and_words_are_listed():
    shown = {f"{option.section}.{option.name}": option for option in EVERY}
    assert shown["sync.sync_interval"].allowed == 'integer > 0 or "never", "auto", optimizer steps'
    assert shown["evaluation.top_p"].allowed == "number, > 0, <= 1, of 1"
    assert shown["profile.ranks"].allowed == "list of integer >= 0, rank numbers"
    assert shown["trainer.layers"].allowed == '"auto", "local", "transformer_engine"'
    assert (shown["model.path"].default, shown["data.held_out"].default) == ("required", "null")
    for option in EVERY:
        if option.unit and option.name not in ("reward_weights", "weights"):
            assert re.search(r"[<>]", option.values), f"{option.section}.{option.name} is a number without a bound"


def test_options_are_printed_by_section_and_by_name(capsys):
    assert main(["options"]) == 0
    assert "[trainer] Layout of the policy" in capsys.readouterr().out
    assert main(["options", "algorithm", "optimizer.eps"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "algorithm.kl_weight: of the KL to the reference" in printed and "[algorithm] with loss = 'grpo'" in printed
    assert "optimizer.eps: AdamW's epsilon" in printed and "number, > 0, no unit; default 0.0001" in printed
    assert "optimizer.beta1" not in printed


def test_a_name_that_is_none_is_answered_with_the_nearest(capsys):
    assert main(["options", "trainer.tensor_paralel"]) == 2
    assert "did you mean trainer.tensor_parallel?" in capsys.readouterr().err
