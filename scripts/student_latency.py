#!/usr/bin/env python
"""Latency of one-step students, one process: one image and a batch, with sizes.

    python scripts/student_latency.py runs/digits-dmd2 runs/digits-msd --threads 1

A call is noise to images, with routing where there are several students; conditions are encoded before. The models take
turns, repetition by repetition, so that a busy machine disturbs all of them alike; the median is shown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("students", nargs="+", type=local_path, metavar="RUN", help="run or student folders")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="of the second column (default 64)")
    parser.add_argument("--repetitions", type=int, default=30, metavar="N", help="calls of each kind (default 30)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        print(table(options))
    except UserError as error:
        print(f"student_latency: error: {error}", file=sys.stderr)
        return 2
    return 0


def table(options: argparse.Namespace) -> str:
    """Markdown, a row a student."""
    import torch

    from flowdistill import load_student
    from flowdistill.evaluation.evaluate import student_parameters

    for name in ("batch", "repetitions", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    torch.set_num_threads(options.threads)
    students = [load_student(path, options.device) for path in options.students]
    seconds: dict[tuple[int, int], list[float]] = {}
    for repetition in range(options.repetitions + 1):
        for number, student in enumerate(students):
            for rows in (1, options.batch):
                taken = call_seconds(student, rows, repetition)
                if repetition:  # the first one warms up
                    seconds.setdefault((number, rows), []).append(taken)
    lines = [f"| student | parameters of an image | stored | one image, ms | batch of {options.batch}, images/s |",
             "|---|---|---|---|---|"]
    for number, (path, student) in enumerate(zip(options.students, students, strict=True)):
        stored, active = student_parameters(student)
        one, many = (statistics.median(seconds[number, rows]) for rows in (1, options.batch))
        lines.append(f"| {path} | {active:,} | {stored:,} | {1000 * one:.2f} | {options.batch / many:.0f} |")
    return "\n".join(lines)


def call_seconds(student: Any, rows: int, seed: int) -> float:
    """Seconds of one call of ``rows`` images, in turn over the student's conditions."""
    import torch

    from flowdistill.utils.randomness import indexed_noise

    noise = indexed_noise(student.shape, seed, range(rows)).to(student.device)
    condition = student.examples(range(seed, seed + rows))
    if student.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        student.decode(student(noise, condition))
    if student.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
