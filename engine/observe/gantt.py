"""Bars as SVG text: who does what when, and what fills something up. They know nothing of runs, and write no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from engine.observe.charts import COLOURS, ticks

WIDTH, LEFT, RIGHT, TOP, ROW = 900, 140, 14, 34, 26  # pixels
LETTER = 6.6  # pixels that a letter takes, about
PALETTE = tuple(colour for colour in COLOURS if colour != "#000000")


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of an axis."""

    start: float
    end: float
    kind: str  # which a colour stands for
    label: str = ""  # on it, where there is room
    about: str = ""  # what a browser tells under the pointer, before the numbers


@dataclass(frozen=True, slots=True)
class Lane:
    """A row of bars."""

    name: str
    bars: tuple[Bar, ...]


def lanes(title: str, unit: str, rows: Sequence[Lane], *, limit: float | None = None) -> str:
    """An SVG document with a row for each lane, from the first bar's start to the last one's end. `limit`: a line across."""
    bars = [bar for row in rows for bar in row.bars]
    low = min((bar.start for bar in bars), default=0.0)
    high = max([*(bar.end for bar in bars), *([limit] if limit is not None else [])], default=1.0)
    high = high if high > low else low + 1.0
    kinds = list(dict.fromkeys(bar.kind for bar in bars))
    legend, rows_of_legend = _legend(kinds)
    bottom = TOP + ROW * len(rows)
    height = bottom + 30 + 16 * rows_of_legend

    def across(x: float) -> float:
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="11" role="img" aria-label="{escape(title)}">',
        f'<rect class="paper" width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(8, 16, title, weight="bold"),
    ]
    for value in ticks(0.0, high - low):
        x = across(low + value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#e5e5e5"/>')
        parts.append(_text(x, bottom + 14, f"{value:g} {unit}", anchor="middle"))
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        parts.append(_text(LEFT - 8, y + 15, row.name, anchor="end"))
        parts += [_bar(bar, across(bar.start), across(bar.end), y, unit, _fill(kinds.index(bar.kind))) for bar in row.bars]
    if limit is not None:
        x = across(limit)
        parts.append(
            f'<path class="axis" d="M{x:.1f} {TOP - 8}V{bottom}" stroke="#555555" stroke-dasharray="4 3" fill="none"/>'
        )
    return "\n".join([*parts, *_placed(legend, bottom + 34), "</svg>"]) + "\n"


def _fill(number: int) -> str:
    """The colour of a kind, paler once all have been used."""
    again = number // len(PALETTE)
    return f'fill="{PALETTE[number % len(PALETTE)]}"' + (f' fill-opacity="{0.5 / again:.2f}"' if again else "")


def _bar(bar: Bar, left: float, right: float, y: float, unit: str, colour: str) -> str:
    width = max(0.6, right - left)
    told = f"{bar.about or bar.label or bar.kind}: {bar.end - bar.start:.4g} {unit}, from {bar.start:.4g} to {bar.end:.4g}"
    drawn = f'<rect x="{left:.1f}" y="{y:.1f}" width="{max(0.6, width - 0.6):.1f}" height="{ROW - 6}" {colour}/>'
    if bar.label and width > LETTER * len(bar.label) + 6:
        at = f'x="{(left + right) / 2:.1f}" y="{y + 14:.1f}" text-anchor="middle"'
        drawn += f'<text class="on" {at} fill="#ffffff">{escape(bar.label)}</text>'
    return f"<g><title>{escape(told)}</title>{drawn}</g>"


def _legend(kinds: Sequence[str]) -> tuple[list[tuple[float, int, str, str]], int]:
    """((across, row, colour, kind) of each, rows)."""
    found, x, row = [], float(LEFT), 0
    for number, kind in enumerate(kinds):
        width = 34 + LETTER * len(kind)
        if x > LEFT and x + width > WIDTH:
            x, row = float(LEFT), row + 1
        found.append((x, row, _fill(number), kind))
        x += width
    return found, row + 1


def _placed(legend: Sequence[tuple[float, int, str, str]], top: float) -> list[str]:
    parts = []
    for x, row, colour, kind in legend:
        y = top + 16 * row
        parts.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="12" height="10" {colour}/>')
        parts.append(_text(x + 17, y, kind))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#222222">{escape(text)}</text>'
