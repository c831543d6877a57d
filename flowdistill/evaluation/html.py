"""A report as one page: table, figure and images, with everything in it and nothing from elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape

from flowdistill.evaluation.metrics.frechet import figure_of
from flowdistill.evaluation.pictures import Strip
from flowdistill.evaluation.report import Report, Row
from flowdistill.utils.charts import LARGEST, log_ticks
from flowdistill.utils.files import atomic_write
from flowdistill.utils.html import SERIES, definitions, document, picture, table

DASH = "\N{EM DASH}"
"""For what was not measured or does not apply."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 360, 64, 44, 16, 200


def write_html(report: Report, strips: Sequence[Strip], path: str | os.PathLike[str]) -> None:
    """Write the page, complete or not at all."""
    with atomic_write(path) as file:
        file.write(page(report, strips).encode())


def page(report: Report, strips: Sequence[Strip]) -> str:
    """The page as text."""
    parts = [f"<h1>{escape(_title(report))}</h1>", measured(report)]
    if strips:
        shown = (picture(strip.picture, f"images of {strip.title}", strip.title) for strip in strips)
        parts.append("<h2>Images of the same noise</h2>" + "".join(shown))
    parts.append(f"<h2>Protocol</h2>{protocol(report)}")
    return document(_title(report), "".join(parts))


def measured(report: Report, level: str = "h2") -> str:
    """The part of a page with the table of a report, what is to be said of it, and its figure with a heading of this
    level."""
    header, *lines = report.cells()
    text = table(header, lines, "what was measured of each model")
    text += f'<div class="remarks">{"".join(f"<p>{escape(line)}</p>" for line in report.remarks())}</div>'
    called = report.protocol.get("distance", "FID")
    chart = _chart(report.rows, figure_of(called), called)
    if chart:
        text += (f'<{level}>{escape(called)} by network calls</{level}><div class="wide" tabindex="0" role="region" '
                 f'aria-label="{escape(called)} by network calls">{chart}</div>')
    return text


def protocol(report: Report) -> str:
    """The part of a page with how a report was measured."""
    return definitions([(name.replace("_", " "), _in_words(value)) for name, value in report.protocol.items()])


def _in_words(value: object) -> str:
    if value is None:
        return DASH
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_in_words(inner)}" for name, inner in value.items()) or DASH
    return "; ".join(map(_in_words, value)) or DASH if isinstance(value, (list, tuple)) else str(value)


def _title(report: Report) -> str:
    against = "" if report.reference is None else f" against {report.reference}"
    return f"{report.num_images:,} images{against}"


def _chart(rows: Sequence[Row], figure: str, called: str) -> str:
    """The Fréchet distance against calls, both on logarithmic axes, one line a model with bars of one deviation; a
    model without calls is a level. Empty where there is no distance.

    Args:
        figure: its key, ``"fid"`` or ``"fd"``; ``called``: its name.
    """
    found = [(row.model, row.calls, row.figures.get(figure), row.figures.get(f"{figure}_std") or 0.0) for row in rows]
    fids = [(model, calls, value, std) for model, calls, value, std in found
            if value is not None and 1 / LARGEST < value < LARGEST and std < LARGEST]
    if not fids:
        return ""
    lowest = min(max(fid - std, fid / 2) for _, _, fid, std in fids)
    low, high = math.log10(lowest) - 0.05, math.log10(max(fid + std for _, _, fid, std in fids)) + 0.05
    most = max([calls for _, calls, _, _ in fids if calls is not None], default=1)

    def x(calls: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(calls) + 0.2) / (math.log2(most) + 0.4)

    def y(fid: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(max(fid, lowest))) / (high - low)

    end = WIDTH - RIGHT
    parts = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{end}" fill="none" style="stroke:var(--soft)"/>',
             f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">network calls</text>',
             f'<text x="4" y="{TOP + 10}">{escape(called)}</text>']
    for calls in sorted({calls for _, calls, _, _ in fids if calls is not None}):
        parts.append(f'<text x="{x(calls):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{calls}</text>')
    for tick in log_ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{end}" style="stroke:var(--rule)"/>'
                     f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    taken: list[float] = []
    for number, model in enumerate(dict.fromkeys(model for model, *_ in fids)):
        colour = f"var(--c{number % SERIES})"
        levels = [fid for name, calls, fid, _ in fids if name == model and calls is None]
        points = sorted((calls, fid, std) for name, calls, fid, std in fids if name == model and calls is not None)
        parts += [f'<path d="M{LEFT} {y(fid):.1f}H{end}" stroke-dasharray="5 4" style="stroke:{colour}"/>'
                  for fid in levels]
        if len(points) > 1:
            line = " ".join(f"{x(calls):.1f},{y(fid):.1f}" for calls, fid, _ in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke-width="1.5" style="stroke:{colour}"/>')
        for calls, fid, std in points:
            parts.append(f'<path d="M{x(calls):.1f} {y(fid - std):.1f}V{y(fid + std):.1f}" style="stroke:{colour}"/>'
                         f'<circle cx="{x(calls):.1f}" cy="{y(fid):.1f}" r="4" style="fill:{colour}"/>')
        last = (y(levels[-1]), end) if not points else (y(points[-1][1]), x(points[-1][0]))
        place = last[0]
        while any(abs(place - other) < 14 for other in taken):  # names do not lie on each other
            place += 2
        taken.append(place)
        parts.append(f'<path d="M{last[1]:.1f} {last[0]:.1f}L{end + 8} {place:.1f}" opacity="0.5" '
                     f'style="stroke:{colour}"/>'
                     f'<text x="{end + 12}" y="{place + 4:.1f}">{escape(_short(model))}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    return f'<svg {size} role="img" aria-label="{escape(called)} by network calls">{"".join(parts)}</svg>'


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"...{name[-(most - 3):]}"
