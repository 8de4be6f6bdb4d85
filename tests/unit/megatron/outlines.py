"""Drawn outlines."""

from __future__ import annotations

from hypothesis import strategies as st

from engine.megatron.outlines import Costs, Outline


@st.composite
def outline_lists(draw: st.DrawFn) -> list[Outline]:
    """Prompts of some samples each, which a group couples or not."""
    made: list[Outline] = []
    for prompt in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 300))
        for _ in range(draw(st.integers(1, 9))):
            group = prompt if draw(st.booleans()) else -1
            made.append(Outline(len(made), length, draw(st.integers(1, 3000)), group, prompt))
    return made


COSTS = st.builds(Costs, st.booleans(), st.sampled_from((0.0, 1 / 61_000, 0.02)))
