#!/usr/bin/env python
"""How far quantised teachers are from those of float32: the table in docs/experiments/memory.md.

    python scripts/measure_quantization.py             measure, and write the table into docs/experiments/memory.md
    python scripts/measure_quantization.py --print     measure, and print it

Each figure is the norm of the difference of two velocities over the norm of the one in float32, of the same states,
times and conditions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowdistill.teachers import Teacher

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "experiments" / "memory.md"
BEGIN, END = "<!-- made by scripts/measure_quantization.py -->", "<!-- end of the differences -->"
TEACHERS = ("assets/digits-flow", "assets/digits-ddpm", "assets/shapes/teacher", "assets/shapes/turbo")
TIMES = (0.2, 0.5, 0.8)
ROWS = 64
SCHEMES = {"bfloat16": ("bfloat16", None), "int8": ("float32", "int8"), "fp8": ("float32", "fp8"),
           "nf4": ("float32", "nf4")}
"""Column -> ``teacher.dtype``, ``teacher.quantize``."""


def differences(source: str, schemes: Sequence[str]) -> tuple[float, dict[str, list[float]]]:
    """The share of a teacher's parameters that are codes, and the relative differences at ``TIMES`` by scheme."""
    from flowdistill.teachers import load_teacher
    from flowdistill.utils.quantized import parameter_count, quantized_layers

    exact, share, found = load_teacher(ROOT / source), 0.0, {}
    for name in schemes:
        dtype, scheme = SCHEMES[name]
        coarse = load_teacher(ROOT / source, dtype=dtype, quantize=scheme)
        layers = quantized_layers(coarse.network)
        codes = sum(layer.in_features * layer.out_features for layer in layers)
        share = max(share, codes / parameter_count(coarse.network))
        found[name] = [difference(coarse, exact, t) for t in TIMES]
    return share, found


def difference(coarse: Teacher, exact: Teacher, t: float) -> float:
    """The relative difference of two teachers' velocities at time ``t``."""
    import torch

    from flowdistill.utils.randomness import Draw

    state = t * Draw(0, 0, rows=ROWS).normal(exact.shape)
    with torch.no_grad():
        one, other = (teacher.velocity(state, t, teacher.examples(range(ROWS)) if teacher.prompts is None else
                                       teacher.encode(prompts=["a red circle", "two blue squares"] * (ROWS // 2)))
                      for teacher in (coarse, exact))
    return float((one - other).norm() / other.norm())


def table(sources: Sequence[str], schemes: Sequence[str]) -> str:
    """The table in Markdown."""
    lines = ["| teacher | weights that are codes | " + " | ".join(schemes) + " |",
             "| --- | --- |" + " --- |" * len(schemes)]
    for source in sources:
        share, found = differences(source, schemes)
        cells = [", ".join(f"{100 * value:.2g}" for value in found[name]) + " %" for name in schemes]
        lines.append(f"| `{source}` | {share:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it")
    args = parser.parse_args(arguments)
    made = table(TEACHERS, list(SCHEMES))
    if args.print:
        print(made)
        return 0
    from flowdistill.utils.text import read_text

    text = read_text(PAGE)
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
