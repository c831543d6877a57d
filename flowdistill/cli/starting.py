"""``flowdistill init``: a first configuration for a pipeline, with the reasons for what is in it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable

from flowdistill.cli.arguments import SETTING, positive


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser; see ``command`` in ``flowdistill.cli.commands``."""
    init = command(
        "init", run, lambda args: args.out, "write a configuration for a pipeline",
        "Look at a pipeline's configurations, without its weights, and write a file for 'flowdistill distill' that\n"
        "fits it, with the reason for each setting: the method, guidance, where the student starts, precision, and\n"
        "what 'flowdistill plan' advises for the card. Settings given as key=value are taken as they are.",
        ["path/to/pipeline", "stabilityai/stable-diffusion-xl-base-1.0 --gpu-memory 24 --out my.yaml",
         "path/to/pipeline --method freeflow teacher.null_label=10"],
    )
    init.add_argument("teacher", metavar="TEACHER", help="pipeline (folder or hub id)")
    init.add_argument("overrides", metavar=SETTING, nargs="*", help="settings that the file is to have")
    init.add_argument("--method", metavar="METHOD", help="default: the usual one; the file says why")
    init.add_argument("--gpu-memory", metavar="GIB", type=positive,
                      help="memory of the GPU in GiB (default: that of the first GPU here)")
    init.add_argument("--out", metavar="FILE", default="my.yaml", help="the file, which is not there yet (default: "
                                                                       "my.yaml)")


def run(args: argparse.Namespace) -> int:
    """Write the file, and say what is left to do."""
    from flowdistill.utils.files import check_new, write_new

    check_new(args.out, "--out")
    from flowdistill.plan.starting import start
    from flowdistill.utils.shipped import find_path

    found = start(args.teacher, args.method, args.gpu_memory, args.overrides)
    title = f"Written by flowdistill init for {args.teacher}; 'flowdistill config {found.values['method.name']}' has " \
            "every setting."
    file = write_new(args.out, found.text(title), "--out")
    print(*found.remarks, sep="\n")
    print(f"\n{file}: written; it says why each setting is as it is")
    todo = [f"set {key}: {help}" for key, help in found.missing.items()]
    prompts = found.values.get("teacher.prompts")
    if isinstance(prompts, str) and not find_path(prompts).exists() and "*" not in prompts:
        todo.append(f"write the prompts into {prompts}, one a line, or name another file as teacher.prompts")
    for each in todo:
        print(f"  first {each}")
    print(f"  then  flowdistill distill {shlex.quote(str(file))}")
    return 0
