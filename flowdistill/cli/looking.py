"""``flowdistill report``: runs as a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser; see ``command`` in ``flowdistill.cli.commands``."""
    report = command(
        "report", write_page, lambda args: args.out, "write a page of one or several runs",
        "Write one page, a file without anything from elsewhere: pictures, samples over steps, what was measured,\n"
        "curves, settings, commands. It is made of what a run folder holds, also while the run goes on, and trains\n"
        "and measures nothing. Several runs stand side by side.",
        ["runs/digits-freeflow", "runs/digits-freeflow runs/digits-dmd2 --out compared.html"],
    )
    report.add_argument("run_folder", metavar="RUN", nargs="+", help="run folder")
    report.add_argument("--out", metavar="FILE.html", default="report.html", help="the page (default: report.html)")


def write_page(args: argparse.Namespace) -> int:
    """Write the page of the runs."""
    from flowdistill.utils.files import check_writable

    check_writable(args.out)
    from flowdistill.training.run_page import write_report

    write_report(args.run_folder, args.out)
    count = len(args.run_folder)
    print(f"{args.out}: a page of {'the run' if count == 1 else f'{count} runs'}, to be opened in a browser")
    return 0
