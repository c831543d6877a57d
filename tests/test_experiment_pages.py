"""Commands on the pages of docs fill the tables of the page they stand on; no table of an experiment lacks one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"scripts/\w+\.py (configs/experiments/\w+\.yaml)[^\n]*--write-docs (\S+)")
NAMES = {file.relative_to(ROOT).as_posix(): yaml.safe_load(file.read_text(encoding="utf-8"))["name"]
         for file in (ROOT / "configs" / "experiments").glob("*.yaml")}


def tables(text: str) -> list[str]:
    """Names of the tables that a script fills."""
    return re.findall(r"^<!-- table:(\w+) -->$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_commands_fill_the_tables_of_their_page(page):
    text = page.read_text(encoding="utf-8")
    found = tables(text)
    assert all(f"\n<!-- /table:{name} -->" in text for name in found)
    assert all(ROOT / target == page for target in re.findall(r"--write-docs (docs/\S+\.md)", text))
    commands = {NAMES[file] for file, _ in COMMAND.findall(text)}
    assert commands == set(found) & set(NAMES.values())


def test_no_table_stands_on_two_pages():
    found = [name for page in PAGES for name in tables(page.read_text(encoding="utf-8"))]
    assert found and len(found) == len(set(found))
