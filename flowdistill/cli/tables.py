"""``flowdistill methods`` and ``flowdistill families``: what there is to choose from, as the classes say it."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowdistill.utils.errors import UserError, listed

WIDTH = 100


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the two commands to the parser; see ``command`` in ``flowdistill.cli.commands``."""
    methods = command(
        "methods", run_methods, lambda args: "", "list the methods",
        "List the methods: what each does, its paper, whether it needs images, the calls of its student for an\n"
        "image, and the networks that train beside the student. 'flowdistill config METHOD' has the settings.",
        ["", "--markdown"],
    )
    families = command(
        "families", run_families, lambda args: "", "list the kinds of pipelines that can be distilled",
        "List the backbones that teachers may have: the pipelines they come in, what they are told, how they are\n"
        "guided, and the stock pipeline that a student becomes. Schedulers are in docs/reference/teachers.md.",
        ["", "--markdown"],
    )
    for parser in (methods, families):
        parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")


class Row(NamedTuple):
    """A name, and what there is to say of it."""

    name: str
    facts: dict[str, str]


def run_methods(args: argparse.Namespace) -> int:
    """Print the methods."""
    _print(method_rows(), args.markdown)
    return 0


def run_families(args: argparse.Namespace) -> int:
    """Print the backbones."""
    _print(family_rows(), args.markdown)
    return 0


def method_rows() -> list[Row]:
    """Of every method by its name; of one that cannot be imported or described, that it cannot."""
    from flowdistill.config import METHODS
    from flowdistill.training.method import facts_of

    rows = []
    for name in METHODS:
        try:
            about = facts_of(METHODS.get(name))
        except UserError as error:
            rows.append(Row(name, {"what it does": str(error)}))
            continue
        except Exception as error:  # a method may come from anywhere
            rows.append(Row(name, {"what it does": f"cannot be described ({type(error).__name__}: {error})"}))
            continue
        rows.append(Row(name, {"what it does": about.sentence, "paper": about.paper or "-", "images": about.data,
                               "calls": about.calls, "trains besides": about.networks}))
    return rows


def family_rows() -> list[Row]:
    """Of every backbone by its class name; of one in a package that cannot be imported, that it cannot."""
    from flowdistill.networks.backbones import FAMILIES

    rows = []
    for name in FAMILIES:
        try:
            family = FAMILIES.get(name)
        except UserError as error:
            rows.append(Row(name, {"pipelines": str(error)}))
            continue
        pipelines, (told, guided) = list(family.pipelines), family.in_words()
        becomes = [facts.exported_as or each for each, facts in family.pipelines.items()] or [family.student_pipeline]
        rows.append(Row(name, {
            "pipelines": listed(pipelines) if pipelines else "every pipeline of such a network without prompts",
            "told": told,
            "guidance": guided,
            "a student becomes": listed(dict.fromkeys(filter(None, becomes))) or "-",
        }))
    return rows


def _print(rows: Sequence[Row], markdown: bool) -> None:
    if markdown:
        columns = max((list(row.facts) for row in rows), key=len)
        print("| " + " | ".join(["name", *columns]) + " |")
        print("|" + " --- |" * (len(columns) + 1))
        for row in rows:
            print("| " + " | ".join([f"`{row.name}`", *(row.facts.get(column, "") for column in columns)]) + " |")
        return
    for row in rows:
        print(row.name)
        width = max(len(column) for column in row.facts) + 2
        for column, text in row.facts.items():
            print(textwrap.fill(text, WIDTH, initial_indent=f"    {column:{width}}", break_on_hyphens=False,
                                subsequent_indent=" " * (width + 4)))
        print()
