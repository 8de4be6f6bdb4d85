"""What a model family is, as data: its tensors, what they are called in a trainer and in an engine, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["first", "layer", "last"]


@dataclass(frozen=True, slots=True)
class Row:
    """One Hugging Face tensor; `{}` stands for the layer's number. Rows of one parameter are fused in it, in order."""

    name: str
    rows: Literal["vocabulary", "heads", "kv_heads", "ffn", "hidden"]
    cols: Literal["hidden", "heads", "ffn", "one"]
    cut: Literal["vocabulary", "heads", "rows", "columns", "whole"]  # over tensor-parallel ranks
    place: Place  # the pipeline stage that owns it
    trainer: str  # megatron-core's parameter, local spec
    engine: str  # vLLM's parameter
