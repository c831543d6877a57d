"""``flowdistill env``: what a report of a fault should say of where it happened."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from flowdistill.utils.environment import collected


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser; see ``command`` in ``flowdistill.cli.commands``."""
    env = command(
        "env", run, lambda args: "", "say which versions and devices are here, for a report of a fault",
        "Print the versions of flowdistill and of what it uses, Python, the platform and the devices that torch sees:\n"
        "paste it into a report. Of the environment it shows some variables of torch, the hub and launchers.",
        ["", "--json"],
    )
    env.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what is here."""
    found = collected()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(len(name) for name in found) + 2
    for name, value in found.items():
        print(f"{name:{width}}{value}")
    return 0
