"""Pages that are one file: their style, tables and pictures, with nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from flowdistill.utils.files import check_replaceable

SERIES = 7
"""Colours ``--c0`` to ``--c6`` of lines in a figure."""
STYLE = """
:root { color-scheme: light dark; --fg: #1a1a1a; --bg: #fff; --soft: #595959; --rule: #d4d4d4; --panel: #f4f5f7;
  --link: #0b57a4;
  /* Okabe, Ito 2008: told apart by people with any kind of colour vision; dark enough on white. */
  --c0: #0072b2; --c1: #c04f00; --c2: #007d5c; --c3: #a8508a; --c4: #9a6a00; --c5: #2b86b9; --c6: #000; }
@media (prefers-color-scheme: dark) { :root { --fg: #e8e8e8; --bg: #15171b; --soft: #adb3bb; --rule: #3a3f47;
  --panel: #1f2329; --link: #8ec7ff;
  --c0: #56b4e9; --c1: #ff8c4a; --c2: #35c79b; --c3: #e39bc4; --c4: #f0b429; --c5: #a6d8f7; --c6: #fff; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem;
  color: var(--fg); background: var(--bg); overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
a { color: var(--link); } .soft, figcaption small { color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .5rem 0; }
.wide { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; }
table.texts th, table.texts td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere;
  min-width: 6rem; }
table.texts { width: 100%; } table.texts th:first-child, table.texts td:first-child { min-width: min(16rem, 40vw); }
.remarks p { margin: .15rem 0; font-size: 13px; }
figure { margin: 1rem 0; min-width: 0; } figcaption { font-weight: 600; } figcaption small { font-weight: 400; }
figure img { max-width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--rule); }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--fg); }
pre { background: var(--panel); padding: .7rem 1rem; overflow-x: auto; } code { font: 13px ui-monospace, monospace; }
dl { display: grid; grid-template-columns: minmax(0, max-content) minmax(0, 1fr); gap: .2rem 1rem; font-size: 13px; }
dt { overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); } dd { margin: 0 0 .4rem 1rem; } }
"""
BEGINNING = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
ICON = '<link rel="icon" href="data:,">'
WIDEST = 1600
"""Pixels of a picture's width in a page; wider ones are reduced."""
HEAVIEST = 600_000
"""Bytes of a picture in a page; heavier ones become JPEG."""


def check_page_place(path: str | os.PathLike[str]) -> None:
    """Refuse a file to write a page to that could not be written, or that is there and is no such page.

    Raises:
        UserError: so.
    """
    def is_own(file: Path) -> bool:
        with open(file, "rb") as content:
            start = content.read(2**16)
        return start.startswith(BEGINNING.encode()) and ICON.encode() in start

    check_replaceable(path, is_own, "a page that flowdistill has written")


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page. ``title`` is text; the others are as they stand in it."""
    code = f"<script>{script}</script>" if script else ""
    return (f'{BEGINNING}{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{ICON}'
            f"<style>{STYLE}{style}</style></head><body>{body}{code}</body></html>\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], called: str, kind: str = "") -> str:
    """Texts as a table that scrolls sideways where it is too wide.

    Args:
        called: what the table is, for people who hear the page.
        kind: class of the table.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    name = f' class="{kind}"' if kind else ""
    return (f'<div class="wide" tabindex="0" role="region" aria-label="{escape(called)}"><table{name}>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def definitions(entries: Sequence[tuple[str, str]]) -> str:
    """Names and values, both texts, as a list."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries) + "</dl>"


def picture(image: Image.Image | Path, alt: str, caption: str = "", attributes: str = "") -> str:
    """A picture, in memory or in a file, with everything in the page; one that cannot be read is a sentence.

    Args:
        alt: what is to be seen, for people who do not see it.
        caption: text above it.
        attributes: of the figure, as they stand in the page.
    """
    head = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is large is reduced
            data, (width, height) = _embedded(image)
    except Exception as error:  # of files that are cut short, no pictures or far too large Pillow raises any kind
        shown = image.name if isinstance(image, Path) else "the picture"
        return f"<figure {attributes}>{head}<p>{escape(shown)} cannot be read: {escape(str(error))}</p></figure>"
    size = f'width="{width}" height="{height}"'
    return f'<figure {attributes}>{head}<img alt="{escape(alt)}" {size} src="{data}"></figure>'


def _embedded(image: Image.Image | Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI, and its width and height."""
    if isinstance(image, Path):
        content = image.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            kind, loaded = opened.format, opened.copy()
        if kind == "PNG" and loaded.width <= WIDEST and len(content) <= HEAVIEST:
            return _uri(content, "png"), loaded.size
        return _embedded(loaded)
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)
    content, kind = _encoded(image, "png"), "png"
    if len(content) > HEAVIEST:
        content, kind = _encoded(image.convert("RGB"), "jpeg"), "jpeg"
    return _uri(content, kind), image.size


def _encoded(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **({"quality": 88} if kind == "jpeg" else {}))
    return content.getvalue()


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
