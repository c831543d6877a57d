"""Curves as drawings inside a page (SVG): several lines over one axis of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flowdistill.utils.html import SERIES

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 230, 62, 24, 12, 34
POINTS = 400
"""Points of a drawn line, at most: of a longer one the lowest and the highest of each stretch."""
DASHES = ("", "8 3", "4 2", "10 3 2 3")
"""Of lines, so that they are told apart without colours."""
LOGARITHMIC = 100.0
"""Times the smallest value from which on the largest makes the axis logarithmic."""
LARGEST = 1e300
"""What is not below it is drawn as a gap, as infinity is; logarithmic axes end at its inverse too. Between these there
is room for sums and powers of ten."""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y) in ascending x; None leaves a gap.
        style: number of its colour and dashes.
    """

    name: str
    points: Sequence[Point]
    style: int = 0


def chart(title: str, lines: Sequence[Line], axis: str = "step") -> str:
    """Lines over one axis, or nothing where no line has a value."""
    lines = [line for line in lines if any(_number(y) for _, y in line.points)]
    if not lines:
        return ""
    values = [y for line in lines for _, y in line.points if y is not None and _number(y)]
    places = [x for line in lines for x, _ in line.points]
    logarithmic = min(values) > 1 / LARGEST and max(values) > LOGARITHMIC * min(values)
    low, high = _range(min(values), max(values), logarithmic)
    first, last = min(places), max(max(places), min(places) + 1)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first)

    def up(y: float) -> float:
        share = ((math.log10(y) if logarithmic else y) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = []
    for tick in log_ticks(low, high, 4) if logarithmic else ticks(low, high, 4):
        parts.append(f'<path d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}" style="stroke:var(--rule)"/>'
                     f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in ticks(first, last, 4) if max(places) > first else [first]:
        if tick == int(tick):
            parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.0f}'
                         "</text>")
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" style="stroke:var(--soft)"/>')
    for line in lines:
        drawn = "".join(_stretch([(across(x), up(y)) for x, y in stretch]) for stretch in _stretches(thinned(line)))
        parts.append(f'<path d="{drawn}" {stroke(line.style)}/>')
        for stretch in _stretches(line.points):
            if len(stretch) == 1:
                x, y = stretch[0]
                parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" '
                             f'style="fill:var(--c{line.style % SERIES})"/>')
    label = f"{title} by {axis}: " + "; ".join(_in_words(line, axis) for line in lines)
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
            f'aria-label="{escape(label)}">{"".join(parts)}</svg>')


def legend(lines: Sequence[Line]) -> str:
    """The names of lines, each beside a piece of it."""
    return '<ul class="legend">' + "".join(
        f'<li><svg viewBox="0 0 28 8" width="28" height="8" aria-hidden="true"><path d="M0 4H28" {stroke(line.style)}/>'
        f"</svg> {escape(line.name)}</li>" for line in lines) + "</ul>"


def stroke(style: int) -> str:
    """The attributes of a line of this style."""
    dashes = DASHES[(style + style // SERIES) % len(DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'fill="none" stroke-width="1.6" style="stroke:var(--c{style % SERIES})"{dashed}'


def thinned(line: Line, most: int = POINTS) -> list[Point]:
    """The points of a line, or of a long one the lowest and the highest value of each stretch, in their order."""
    if len(line.points) <= most:
        return list(line.points)
    size, kept = math.ceil(2 * len(line.points) / most), []
    for start in range(0, len(line.points), size):
        part = [(x, y) for x, y in line.points[start : start + size] if y is not None and _number(y)]
        if not part:
            kept.append(line.points[start])
            continue
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two, about so many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{number * step:.12g}") for number in numbers]


def log_ticks(low: float, high: float, about: int | None = None) -> list[float]:
    """1, 2 and 5 times powers of ten between two logarithms, or powers of ten alone where these would be many; at least
    one between the two where there are none."""
    tens = range(math.floor(low) - 1, math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [factor * 10.0**power for power in tens for factor in factors]
        found = [tick for tick in found if low <= math.log10(tick) <= high]
        if about is None or len(found) <= 2 * about:
            break
    if about is not None and len(found) > 2 * about:
        found = found[:: math.ceil(len(found) / about)]
    return found or [float(f"{10 ** ((low + high) / 2):.3g}")]


def _range(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    """The ends of the axis, with a little room."""
    if logarithmic:
        return math.log10(low) - 0.05, math.log10(high) + 0.05
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room if low < 0 or low - room >= 0 else 0.0, high + room


def _stretches(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None and _number(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _stretch(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _in_words(line: Line, axis: str) -> str:
    (first, start), *_ = found = [(x, y) for x, y in line.points if y is not None and _number(y)]
    last, end = found[-1]
    return f"{line.name} {_short(start)} at {axis} {first:g}" + (
        f" to {_short(end)} at {axis} {last:g}" if len(found) > 1 else "")


def _number(value: float | None) -> bool:
    return value is not None and abs(value) < LARGEST


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}"
