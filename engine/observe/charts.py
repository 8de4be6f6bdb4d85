"""Line charts as SVG text, complete in themselves: axes, ticks, legend, error bars, smoothed lines over many points, marks on
the axis, and values that a browser shows under the pointer. They know nothing of runs or metrics, and write no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, PLOT_HEIGHT = 560, 220  # pixels; the legend adds to the height
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 40
MOST_POINTS = 400  # of a line; more are averaged in equal blocks
MOST_SPOTS = 120  # points of a line that tell their value
SMOOTHED_FROM = 30  # points; a line of so many gets smoothed ones over it
# class of a smoothed line: a mean of how large a part of all points; the second one is drawn where a page's style shows it
SMOOTHED = {"smooth": 1 / 30, "smoother": 1 / 8}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")  # told apart by all eyes
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2")


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a step; `error` is half the length of its error bar."""

    x: float
    y: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    label: str
    points: tuple[Point, ...]
    colour: int = 0  # of COLOURS, and round again
    dash: int = 0  # of DASHES
    smooth: bool = True  # whether many points get a smoothed line over them


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a place on the axis."""

    x: float
    text: str
    loss: bool = False  # something was lost there, rather than found
    colour: int = 0  # of COLOURS


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    x_label: str = "step",
    *,
    marks: Sequence[Mark] = (),
    about: str = "",
) -> str:
    """An SVG document; `lines` may be empty or have no points. Every value must be finite. `about`: what a browser tells of the
    title under the pointer."""
    shown = [replace(line, points=_thinned(line.points)) for line in lines if line.points]
    points = [point for line in shown for point in line.points]
    left, right = _range([point.x for point in points], margin=0.0)
    low, high = _range([point.y + sign * point.error for point in points for sign in (-1, 1)], margin=0.05)
    legend, legend_height = _legend(shown)
    height = PLOT_HEIGHT + legend_height

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return across, PLOT_HEIGHT - BOTTOM - (y - low) / (high - low) * (PLOT_HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="11" role="img" aria-label="{escape(title)}">',
        f'<rect class="paper" width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _titled(about, _text(LEFT, 16, f"{title} ({unit})" if unit else title, weight="bold")),
        _text((LEFT + WIDTH - RIGHT) / 2, PLOT_HEIGHT - 6, x_label, anchor="middle"),
    ]
    for value in ticks(low, high):
        _, y = place(left, value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", anchor="end"))
    for value in (tick for tick in ticks(left, right) if x_label != "step" or tick == round(tick)):
        x, y = place(value, low)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + 4:.1f}" stroke="#555555"/>')
        parts.append(_text(x, y + 16, f"{value:g}", anchor="middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{PLOT_HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#555555"/>')
    for mark in marks:
        if left <= mark.x <= right and shown:
            parts.append(_mark(mark, place(mark.x, low)[0]))
    for line in shown:
        ends = ((place(p.x, p.y - p.error)[1], place(p.x, p.y + p.error)[1]) for p in line.points)
        places = [(*place(p.x, p.y), *end) for p, end in zip(line.points, ends, strict=True)]
        parts += _curve(line, places)
        parts += _spots(line, places, x_label)
    return "\n".join([*parts, *legend, "</svg>"]) + "\n"


def _curve(line: Line, places: Sequence[tuple[float, float, float, float]]) -> list[str]:
    """A curve through (x, y, lower end, upper end of the error bar) in pixels; a dot for each point where they are few."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in places)
    smoothed = line.smooth and len(places) >= SMOOTHED_FROM
    pale = ' class="raw" stroke-opacity="0.3"' if smoothed else ""
    parts = [f'<path d="M{path}" fill="none" stroke-width="1.5"{pale} {_stroke(line)}/>']
    for kind, share in SMOOTHED.items() if smoothed else ():
        middle = "L".join(f"{x:.1f} {y:.1f}" for x, y in _smooth(places, share))
        hidden = "" if kind == "smooth" else ' display="none"'
        parts.append(f'<path class="{kind}" d="M{middle}" fill="none" stroke-width="2"{hidden} {_stroke(line)}/>')
    colour = COLOURS[line.colour % len(COLOURS)]
    for x, y, lower, upper in places:
        if lower != upper:
            bar = f"M{x:.1f} {lower:.1f}V{upper:.1f}M{x - 3:.1f} {lower:.1f}h6M{x - 3:.1f} {upper:.1f}h6"
            parts.append(f'<path d="{bar}" stroke="{colour}" fill="none"/>')
        if len(places) < SMOOTHED_FROM or (not line.smooth and len(places) <= 40):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>')
    return parts


def _smooth(places: Sequence[tuple[float, float, float, float]], share: float) -> list[tuple[float, float]]:
    """The mean height of each place and its neighbours, as many on either side: of a share of all places."""
    sums = [0.0]
    for _, y, *_ in places:
        sums.append(sums[-1] + y)
    made, reach = [], max(1, round(len(places) * share / 2))
    for index, (x, *_) in enumerate(places):
        around = min(reach, index, len(places) - 1 - index)
        first, last = index - around, index + around + 1
        made.append((x, (sums[last] - sums[first]) / (last - first)))
    return made


def _spots(line: Line, places: Sequence[tuple[float, float, float, float]], x_label: str) -> list[str]:
    """Squares that nobody sees, over points of the line; a browser shows their titles under the pointer."""
    every = -(-len(places) // MOST_SPOTS)
    made = []
    for point, (x, y, *_) in list(zip(line.points, places, strict=True))[::every]:
        told = f"{line.label}, {x_label} {point.x:.6g}: {point.y:.5g}" + (f" ± {point.error:.3g}" if point.error else "")
        spot = f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill-opacity="0"/>'
        made.append(f"<g><title>{escape(told)}</title>{spot}</g>")
    return made


def _mark(mark: Mark, x: float) -> str:
    """A line from top to bottom with a triangle on the axis, which stands on its head for a loss."""
    bottom, colour = PLOT_HEIGHT - BOTTOM, COLOURS[mark.colour % len(COLOURS)]
    corner = (
        f"M{x - 5:.1f} {bottom - 8}h10L{x:.1f} {bottom}z" if mark.loss else f"M{x - 5:.1f} {bottom}h10L{x:.1f} {bottom - 8}z"
    )
    line = f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{colour}" stroke-opacity="0.6" stroke-dasharray="1 3" fill="none"/>'
    return _titled(mark.text, f'{line}<path class="mark" d="{corner}" fill="{colour}"/>')


def _titled(text: str, parts: str) -> str:
    """Elements of which a browser tells this under the pointer."""
    return f"<g><title>{escape(text)}</title>{parts}</g>" if text else parts


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """(its elements below the plot, its height in pixels)."""
    parts, x, y = [], LEFT, PLOT_HEIGHT + 12
    for line in lines:
        width = 42 + round(6.3 * len(line.label))  # about what the letters take
        if x > LEFT and x + width > WIDTH:
            x, y = LEFT, y + 16
        parts.append(f'<path d="M{x} {y - 4}h22" stroke-width="2" fill="none" {_stroke(line)}/>')
        parts.append(_text(x + 27, y, line.label))
        x += width
    return parts, y - PLOT_HEIGHT + 8 if lines else 0


def _stroke(line: Line) -> str:
    dash = DASHES[line.dash % len(DASHES)]
    return f'stroke="{COLOURS[line.colour % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#222222">{escape(text)}</text>'


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """What an axis spans: all values with a margin (a share of their range), and never nothing."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - max(0.5, abs(low) * 0.1), high + max(0.5, abs(high) * 0.1)
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers within an axis: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _thinned(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """At most MOST_POINTS of them: the means of equally many neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size == 1:
        return points
    blocks = (points[first : first + size] for first in range(0, len(points), size))
    return tuple(Point(_mean(p.x for p in b), _mean(p.y for p in b), _mean(p.error for p in b)) for b in blocks)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)
