"""``flowdistill config``: every setting of a run, as a file to start from, as a table, or found by a word."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from flowdistill.utils.errors import UserError

SECTIONS = ("teacher", "method", "train", "evaluation")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser; see ``command`` in ``flowdistill.cli.commands``."""
    config = command(
        "config", run, lambda args: args.out, "show every setting, or find one",
        "Print every setting of a run with its default, what it may be and what it does, as a YAML file that\n"
        "'flowdistill distill' reads; without a method those that all methods share. --search looks for a setting by\n"
        "words, in all methods where none is named.",
        ["dmd2 --out my.yaml", "--search critic learning rate", "freeflow --search guidance", "--section train",
         "freeflow --markdown"],
    )
    config.add_argument("method", metavar="METHOD", nargs="?",
                        help="a method's name, as 'flowdistill methods' lists them, or package.module:Class")
    config.add_argument("--host", metavar="METHOD", help="of a method over another one: the other one")
    what = config.add_mutually_exclusive_group()
    what.add_argument("--search", metavar="WORD", nargs="+",
                      help="print the settings with all of these words in their name or help")
    what.add_argument("--markdown", action="store_true",
                      help="print a table in Markdown, of the method's own settings unless --section names others")
    config.add_argument("--section", choices=SECTIONS, help="only this section of the file")
    config.add_argument("--out", metavar="FILE", help="write it there, where no file is yet")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for, or write it."""
    if args.method is None and (args.host is not None or args.section == "method"):
        raise UserError(f"{'--host' if args.host is not None else '--section method'} needs a method: flowdistill "
                        "config METHOD")
    from flowdistill.utils.files import write_new

    text = _text(args)
    if args.out is None:
        print(text, end="")
    else:
        print(f"{write_new(args.out, text, '--out')}: written")
    return 0


def _text(args: argparse.Namespace) -> str:
    from flowdistill.config import listing

    if args.search is not None:
        if args.host is not None:
            raise UserError("--search looks through the settings of methods themselves, so it goes without --host; "
                            "name the host in place of the method")
        found = listing.search(args.search, None if args.method is None else [args.method], args.section)
        return listing.as_found(found, methods=args.method is None)
    method = None if args.method is None else listing.method_settings(args.method, args.host)
    settings = listing.run_settings_of(method)
    if args.markdown:
        section = args.section or ("" if method is None else "method")
        return listing.as_markdown(settings, f"{section}." if section else "")
    if args.section is not None:
        settings = [each for each in settings if each.key.split(".")[0] == args.section]
    whose = "that no method decides" if method is None else f"of a run of {args.method}"
    return (f"# Every setting {whose}, with its default; a value of ??? has to be set.\n"
            "# What is left out of the file keeps its default.\n\n" + listing.as_yaml(settings))
