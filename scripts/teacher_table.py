#!/usr/bin/env python
"""Write the table of docs/experiments/teachers.md from what the tests' own functions measure.

    python scripts/teacher_table.py             measure, and write the table into docs/experiments/teachers.md
    python scripts/teacher_table.py --print     measure, and print it
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "experiments" / "teachers.md"
BEGIN, END = "<!-- made by scripts/teacher_table.py -->", "<!-- end of the table -->"
HEAD = ("tiny pipeline", "class", "backbone", "path", "prediction", "conditions", "guidance", "difference",
        "trains a step of", "export", "export's difference", "LoRA export's difference", "LoRA file's difference")


def row(name: str) -> list[str]:
    """One line of the table, everything measured or detected now."""
    from flowdistill.utils.errors import UserError
    from tests import test_families as tests
    from tests.families import FAMILIES, NEGATIVE
    from tests.networks.test_lora import LORA, lora_file

    family = FAMILIES[name]
    pipeline, teacher = tests.teacher_of(name)
    scales = [(1.0, None)]
    if family.prompts or family.labels is not None:
        scales.append((family.guidance, None))
    if family.negative:
        scales.append((family.guidance, NEGATIVE))
    worst = max(tests.difference(name, scale, negative) for scale, negative in scales)
    trained = []
    for method in tests.METHODS:
        try:
            tests.train_one_step(name, method)
            trained.append(method)
        except (UserError, AssertionError) as error:
            print(f"{name}: {method}: {error}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        try:
            export, latents, images = tests.exported(name, Path(folder) / "out")
            apart = f"{images if latents is None else latents:.0e}"
        except UserError as error:
            export, apart = f"no: {error}", "-"
        low, file = "-", "-"
        if apart != "-":
            _, latents, images = tests.exported(name, Path(folder) / "lora", lora=LORA)
            low = f"{images if latents is None else latents:.0e}"
        if family.prompts and (found := lora_file(name, Path(folder) / "file")) is not None:
            file = f"{found[0]:.0e}"
    conditions = "prompt" if teacher.prompts else "class" if teacher.classes else "none"
    guidance = "input" if teacher.takes_guidance else "two passes" if teacher.can_guide else "-"
    return [name, type(pipeline).__name__, type(teacher.network.backbone).__name__, teacher.path.kind,
            teacher.path.prediction, conditions, guidance, f"{worst:.0e}", "; ".join(trained), export, apart,
            low, file]


def table(rows: list[list[str]]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in ([*HEAD], ["---"] * len(HEAD), *rows)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    from tests.families import FAMILIES

    made: Any = table([row(name) for name in FAMILIES])
    if options.print:
        print(made)
        return 0
    from flowdistill.utils.text import read_text

    before, _, rest = read_text(PAGE).partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")
    print(f"the table of {len(FAMILIES)} pipelines is in {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
