"""What kind of reward model a folder holds, told by its head tensor and checked before anything is loaded: a Llama with one
number instead of next-token logits. It loads no weights but the head's and tokenizes nothing.

Sequence classification: `score.weight`, read at the last token. Athene-RM's form (Frick et al., 2024): `v_head.weight`, read
at a CLS token that its tokenizer puts behind the conversation. The class name in config.json says nothing reliable (Athene's
is no class that anybody ships), so it is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.core.errors import ConfigError
from engine.models.base import ModelShape
from engine.models.config_file import read_shape
from engine.models.hf import HfCheckpoint

OPTION = "reward_model.path"
ATHENE = "AtheneForSequenceClassification"  # the architecture that engine/inference/athene.py has for vLLM
FAMILY = "llama"  # the one that the reward engine can serve with a head
HEADS: dict[str, Literal["classification", "athene"]] = {"score.weight": "classification", "v_head.weight": "athene"}


@dataclass(frozen=True, slots=True)
class RewardHead:
    """The reward model in a folder."""

    form: Literal["classification", "athene"]
    shape: ModelShape


def read_reward_head(path: str | Path) -> RewardHead:
    """The form of the reward model in `path`. ConfigError when it is no Llama with one known head that gives one number,
    CheckpointError when a file is missing or unreadable."""
    shape, checkpoint = read_shape(path, OPTION, FAMILY), HfCheckpoint(path, OPTION)
    found = [name for name in HEADS if name in checkpoint.names()]
    if len(found) != 1:
        raise ConfigError(
            f"{OPTION} must hold a reward model, which has one of the tensors {' and '.join(HEADS)}; found "
            f"{' and '.join(found) or 'neither'} in {path}: name the folder of a reward model"
        )
    sizes = list(checkpoint.header(checkpoint.files[found[0]])[found[0]][0])
    if sizes != [1, shape.hidden]:
        raise ConfigError(
            f"{OPTION} must give one number (num_labels = 1): {found[0]} must be {[1, shape.hidden]}; found {sizes} in {path}: "
            f"use a reward model with one output"
        )
    return RewardHead(HEADS[found[0]], shape)
