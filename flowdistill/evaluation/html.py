"""A report as one page: table, figure and images, with everything in it and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from html import escape

from flowdistill.evaluation.metrics.frechet import figure_of
from flowdistill.evaluation.pictures import Strip
from flowdistill.evaluation.report import Report, Row
from flowdistill.utils.files import atomic_write

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 360, 64, 44, 16, 200
# Okabe, Ito 2008: told apart by people with any kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #1a1a1a;
       background: #fff; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3em .8em; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1em 0; } figcaption { font-weight: 600; }
figure img { max-width: 100%; image-rendering: pixelated; }
svg text { font: 12px system-ui, sans-serif; fill: #1a1a1a; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em; font-size: 13px; } dd { margin: 0;
     overflow-wrap: anywhere; }
"""


def write_html(report: Report, strips: Sequence[Strip], path: str | os.PathLike[str]) -> None:
    """Write the page, complete or not at all."""
    with atomic_write(path) as file:
        file.write(page(report, strips).encode())


def page(report: Report, strips: Sequence[Strip]) -> str:
    """The page as text."""
    header, *lines = report.cells()
    table = "".join(_table_row(cells, "th" if cells is header else "td") for cells in (header, *lines))
    remarks = "".join(f"<p>{escape(line)}</p>" for line in report.remarks())
    called = report.protocol.get("distance", "FID")
    chart = _chart(report.rows, figure_of(called), called)
    parts = [f"<h1>{escape(_title(report))}</h1>", f'<div class="wide"><table>{table}</table></div>', remarks]
    if chart:
        parts.append(f'<h2>{escape(called)} by network calls</h2><div class="wide">{chart}</div>')
    if strips:
        parts.append("<h2>Images of the same noise</h2>" + "".join(map(_figure, strips)))
    protocol = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
                       for name, value in report.protocol.items())
    parts.append(f"<h2>Protocol</h2><dl>{protocol}</dl>")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(_title(report))}</title>'
            f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n")


def _title(report: Report) -> str:
    against = "" if report.reference is None else f" against {report.reference}"
    return f"{report.num_images:,} images{against}"


def _table_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(strip: Strip) -> str:
    content = io.BytesIO()
    strip.picture.save(content, format="png")
    data = base64.b64encode(content.getvalue()).decode()
    return (f'<figure><figcaption>{escape(strip.title)}</figcaption><img alt="{escape(strip.title)}" '
            f'src="data:image/png;base64,{data}"></figure>')


def _chart(rows: Sequence[Row], figure: str, called: str) -> str:
    """The Fréchet distance against calls, both on logarithmic axes, one line a model with bars of one deviation; a
    model without calls is a level. Empty where there is no distance.

    Args:
        figure: its key, ``"fid"`` or ``"fd"``; ``called``: its name.
    """
    found = [(row.model, row.calls, row.figures.get(figure), row.figures.get(f"{figure}_std") or 0.0) for row in rows]
    fids = [(model, calls, value, std) for model, calls, value, std in found if value is not None and value > 0]
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
    parts = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{end}" fill="none" stroke="#888"/>',
             f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">network calls</text>',
             f'<text x="4" y="{TOP + 10}">{escape(called)}</text>']
    for calls in sorted({calls for _, calls, _, _ in fids if calls is not None}):
        parts.append(f'<text x="{x(calls):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{calls}</text>')
    for tick in _ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{end}" stroke="#e5e5e5"/>'
                     f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    taken: list[float] = []
    for number, model in enumerate(dict.fromkeys(model for model, *_ in fids)):
        colour = COLOURS[number % len(COLOURS)]
        levels = [fid for name, calls, fid, _ in fids if name == model and calls is None]
        points = sorted((calls, fid, std) for name, calls, fid, std in fids if name == model and calls is not None)
        parts += [f'<path d="M{LEFT} {y(fid):.1f}H{end}" stroke="{colour}" stroke-dasharray="5 4"/>' for fid in levels]
        if len(points) > 1:
            line = " ".join(f"{x(calls):.1f},{y(fid):.1f}" for calls, fid, _ in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for calls, fid, std in points:
            parts.append(f'<path d="M{x(calls):.1f} {y(fid - std):.1f}V{y(fid + std):.1f}" stroke="{colour}"/>'
                         f'<circle cx="{x(calls):.1f}" cy="{y(fid):.1f}" r="4" fill="{colour}"/>')
        last = (y(levels[-1]), end) if not points else (y(points[-1][1]), x(points[-1][0]))
        place = last[0]
        while any(abs(place - other) < 14 for other in taken):  # names do not lie on each other
            place += 2
        taken.append(place)
        parts.append(f'<path d="M{last[1]:.1f} {last[0]:.1f}L{end + 8} {place:.1f}" stroke="{colour}" opacity="0.4"/>'
                     f'<text x="{end + 12}" y="{place + 4:.1f}" style="fill:{colour}">{escape(_short(model))}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    return f'<svg {size} role="img" aria-label="{escape(called)} by network calls">{"".join(parts)}</svg>'


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"...{name[-(most - 3):]}"


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two logarithms; at least the ends' nearest where there are none."""
    steps = [factor * 10.0**power for power in range(math.floor(low) - 1, math.ceil(high) + 1) for factor in (1, 2, 5)]
    found = [step for step in steps if low <= math.log10(step) <= high]
    return found or [float(f"{10 ** ((low + high) / 2):.3g}")]
