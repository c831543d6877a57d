"""``flowdistill completion``: the shell completes commands and options; by shtab, which reads them off the parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from flowdistill.utils.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser; see ``command`` in ``flowdistill.cli.commands``."""
    completion = command(
        "completion", run, lambda args: "", "print a script by which a shell completes commands and options",
        "Print a script for a shell; bash reads it from ~/.local/share/bash-completion/completions/flowdistill, zsh\n"
        "from a file _flowdistill in a folder of its $fpath. Needs shtab: pip install 'flowdistill[completion]'.",
        ["bash > ~/.local/share/bash-completion/completions/flowdistill"],
    )
    completion.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError:
        raise UserError("the completion of a shell is made by shtab, which is not installed; install it with pip "
                        "install 'flowdistill[completion]'") from None
    from flowdistill.cli.commands import make_parser

    parser = make_parser()
    _complete_files(parser, shtab.FILE, shtab.DIRECTORY)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Say of the arguments that are paths, by how they are shown, that files or folders complete them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in set(action.choices.values()):
                _complete_files(each, file, folder)
            continue
        shown = action.metavar if isinstance(action.metavar, str) else ""
        if action.choices is None and shown in ("RUN", "OUT_DIR", "DIR"):
            action.complete = folder  # type: ignore[attr-defined]
        elif action.choices is None and any(word in shown for word in ("FILE", ".yaml", "PATH", "MODEL", "TEACHER")):
            action.complete = file  # type: ignore[attr-defined]
