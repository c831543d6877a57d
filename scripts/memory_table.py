#!/usr/bin/env python
"""Write the table of docs/memory.md: the plans of the shipped configurations. Nothing is loaded or downloaded.

    python scripts/memory_table.py             plan, and write the table into docs/memory.md
    python scripts/memory_table.py --print     plan, and print it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- made by scripts/memory_table.py -->", "<!-- end of the table -->"
CONFIGS = ("sd15/dmd2", "sd15/dmd2_4step", "sd15/lcm_lora", "sdxl/disback", "sdxl/dmd2_4step", "sdxl/lcm_lora",
           "sd3/dmd2", "sd3/dmd2_4step", "sit/freeflow", "flux/dmd2", "flux/dmd2_4step_lora",
           "qwen_image/dmd2_4step_lora", "z_image/dmd2_4step_lora")
HEAD = ("configuration", "network", "teacher", "autoencoder", "student", "its average", "its optimiser",
        "its gradients", "critic", "its optimiser", "its gradients", "other networks", "activations: student",
        "critic", "peak")


def row(name: str) -> list[str]:
    """One line of the table; GiB."""
    from flowdistill.config import load_config
    from flowdistill.plan import make_plan
    from flowdistill.plan.advice import GIB

    plan = make_plan(load_config(ROOT / "configs" / f"{name}.yaml"))
    parts = plan.parts
    student, critic, other = parts["student"], parts.get("critic"), parts.get("other networks")
    of_critic = [None] * 3 if critic is None else [critic.weights, critic.optimizer, critic.gradients]
    sizes = [parts["teacher"].weights, parts["autoencoder"].weights, student.weights, student.average,
             student.optimizer, student.gradients, *of_critic,
             0 if other is None else other.weights, *(plan.activations.get(role) for role in ("student", "critic")),
             plan.peak]
    network = f"{parts['teacher'].parameters / 1e6:,.0f} M"
    return [f"`configs/{name}.yaml`", network, *("-" if size is None else f"{size / GIB:.2f}" for size in sizes)]


def table(rows: list[list[str]]) -> str:
    """The rows as Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ([*HEAD], ["---"] * len(HEAD), *rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    made = table([row(name) for name in CONFIGS])
    if options.print:
        print(made)
        return 0
    from flowdistill.utils.text import read_text

    before, _, rest = read_text(PAGE).partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"the table of {len(CONFIGS)} configurations is in {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
