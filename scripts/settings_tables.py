#!/usr/bin/env python
"""Bring the tables of settings in Markdown pages up to date with the settings' own help texts, defaults and ranges.

    python scripts/settings_tables.py               write every table in docs/ and README.md anew
    python scripts/settings_tables.py --check       say which pages are not up to date, and end with 1 if any
    python scripts/settings_tables.py page.md ...   the same for these pages

A table stands between two lines, ``<!-- settings:NAME -->`` and ``<!-- /settings -->``. NAME is a method, or a section
that all methods share: teacher, train or evaluation. It is what ``flowdistill config NAME --markdown`` prints, or
``flowdistill config --section NAME --markdown``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flowdistill.config.listing import as_markdown, method_settings, run_settings_of
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import read_text

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("teacher", "train", "evaluation")
MARKED = re.compile(r"^(<!-- settings:(\S+) -->\n).*?^(<!-- /settings -->)$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The pages in which tables are looked for."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def table(name: str) -> str:
    """The table of a method, or of a section that all methods share."""
    if name in SECTIONS:
        return as_markdown(run_settings_of(None), f"{name}.")
    return as_markdown(run_settings_of(method_settings(name)))


def updated(text: str, table: Callable[[str], str] = table) -> str:
    """A page's text with its tables as they are now.

    Raises:
        UserError: a table without an end, which would take the text up to the end of the next one with it, an end
            without a beginning, or an unknown name.
    """
    inside = None
    for line in text.split("\n"):
        if line.startswith(("<!-- settings:", "<!-- /settings")):
            if line.startswith("<!-- /") == (inside is None):
                raise UserError(f"the table {inside} has no line <!-- /settings --> at its end" if inside else
                                f"the line {line} ends no table")
            inside = None if inside else line
    if inside:
        raise UserError(f"the table {inside} has no line <!-- /settings --> at its end")
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", metavar="PAGE", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    old = 0
    try:
        texts = {page: (text := read_text(page), updated(text)) for page in args.pages or pages()}
    except UserError as error:
        print(f"settings_tables: error: {error}", file=sys.stderr)
        return 2
    for page, (text, new) in texts.items():
        if new != text:
            old += 1
            print(f"{page}: {'not up to date' if args.check else 'written'}")
            if not args.check:
                page.write_text(new, encoding="utf-8")
    return 1 if args.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
