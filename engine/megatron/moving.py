"""Packed rows on their way to the trainer's device. A row is copied once, in one copy for which the host does not wait, and
stays there for all passes of its step: with the reference's weights, without gradient, with gradient, and every chunk of a
pipeline. It lays out no row and runs no model.

What stays are some 36 bytes a token, until nobody holds the row on the host any more: 38 MB of a million tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from engine.core.types import Microbatch
from engine.megatron.attention import Layout, Row, layout_of, row_of
from engine.ops import to_device


class Rows:
    """The rows of a step on the device. It knows a column by the tensor itself, so that a row which another one was made from,
    with log-probs beside its columns, is copied no second time; what nobody holds any more is forgotten."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._columns: Any = WeakTensorKeyDictionary()  # of the host -> the same on the device
        self._layouts: Any = WeakTensorKeyDictionary()  # cu_seqlens of the host -> its row's Layout, on the device

    def __call__(self, given: Microbatch) -> tuple[Microbatch, Row]:
        """A row, whose segments are on the host, on the device, and what layers are told of it."""
        if self._device.type == "cpu":
            return given, row_of(given, layout_of(given))
        layout: Layout | None = self._layouts.get(given.cu_seqlens)
        known = layout is not None
        if layout is None:
            layout = layout_of(given)
        missing = {id(column): column for column in _columns(given) if column.is_cpu and column not in self._columns}
        places = [] if known or layout.shared is None else layout.shared.tensors()
        moved = to_device([*missing.values(), *places], self._device)
        for column, there in zip(missing.values(), moved, strict=False):
            self._columns[column] = there
        if not known:
            if layout.shared is not None:
                layout = replace(layout, shared=layout.shared.of(moved[len(missing) :]))
            self._layouts[given.cu_seqlens] = layout
        microbatch = self._on_device(given)
        return microbatch, row_of(microbatch, layout)

    def _on_device(self, given: Microbatch) -> Microbatch:
        def there(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: there(inner) for name, inner in value.items()}
            return self._columns[value] if value is not None and value.is_cpu else value

        return Microbatch(**{field.name: there(getattr(given, field.name)) for field in fields(given)})


def with_scores(given: Microbatch, found: Microbatch) -> Microbatch:
    """A row as it was given, with what scoring has filled in `found`, the same row on the device."""
    return replace(
        given,
        reference_log_probs=found.reference_log_probs,
        log_square_probs=found.log_square_probs,
        split_gradients=found.split_gradients,
        split_loss=found.split_loss,
        split_metrics=found.split_metrics,
    )


def _columns(row: Microbatch) -> Iterator[torch.Tensor]:
    """Every tensor of a row."""
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, dict):
            yield from value.values()
        elif value is not None:
            yield value
