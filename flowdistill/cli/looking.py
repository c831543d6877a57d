"""``flowdistill report`` and ``demo``: runs as a page, and a student in a browser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from flowdistill.cli.arguments import at_least
from flowdistill.utils.errors import UserError
from flowdistill.utils.exit import exit_at_once


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands to the parser; see ``command`` in ``flowdistill.cli.commands``."""
    report = command(
        "report", write_page, lambda args: args.out, "write a page of one or several runs",
        "Write one page, a file without anything from elsewhere: pictures, samples over steps, what was measured,\n"
        "curves, settings, commands. It is made of what a run folder holds, also while the run goes on, and trains\n"
        "and measures nothing. Several runs stand side by side.",
        ["runs/digits-freeflow", "runs/digits-freeflow runs/digits-dmd2 --out compared.html"],
    )
    report.add_argument("run_folder", metavar="RUN", nargs="+", help="run folder")
    report.add_argument("--out", metavar="FILE.html", default="report.html", help="the page (default: report.html)")

    demo = command(
        "demo", show, lambda args: args.run_folder, "show a student in a browser, on this machine",
        "Draw what is asked for on a page: the student's images beside its teacher's, from the same noise, with the\n"
        "milliseconds of each. It needs gradio: pip install 'flowdistill[demo]'. Nobody else reaches it, and nothing\n"
        "is sent anywhere, unless --host says so.",
        ["runs/digits-freeflow", "runs/my-run --no-teacher --port 8000"],
    )
    demo.add_argument("run_folder", metavar="RUN", help="run or student folder")
    demo.add_argument("--port", metavar="N", type=at_least(1, 65535), help="default: the first free one from 7860 on")
    demo.add_argument("--host", metavar="ADDRESS", default="127.0.0.1",
                      help="where it listens; 0.0.0.0 lets in whoever reaches this machine (default: 127.0.0.1)")
    demo.add_argument("--no-teacher", action="store_true", help="show the student only")
    demo.add_argument("--device", help="default: the GPU when there is one")


def write_page(args: argparse.Namespace) -> int:
    """Write the page of the runs."""
    from flowdistill.utils.files import local_path
    from flowdistill.utils.html import check_page_place

    if local_path(args.out).suffix.lower() not in (".html", ".htm"):  # a run's own file, for one, is not overwritten
        raise UserError(f"--out {args.out} must be a .html file")
    check_page_place(args.out)
    from flowdistill.training.run_page import write_report

    write_report(args.run_folder, args.out)
    count = len(args.run_folder)
    print(f"{args.out}: a page of {'the run' if count == 1 else f'{count} runs'}, to be opened in a browser")
    return 0


def show(args: argparse.Namespace) -> int:
    """Serve the page of the student until it is interrupted."""
    from flowdistill.cli.commands import _device
    from flowdistill.evaluation.demo import gradio_module, serve

    gradio_module()  # that it is missing is said before anything is loaded
    number = serve(args.run_folder, _device(args.device), args.host, args.port, not args.no_teacher,
                   lambda line: print(line, flush=True))
    print("flowdistill: interrupted", file=sys.stderr)
    exit_at_once(128 + number)
