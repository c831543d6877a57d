#!/usr/bin/env python
"""How far finite differences of a flow map are from its derivative, in float32 and in half precision.

    python scripts/derivative_precision.py runs/digits-freeflow

FreeFlow's objective needs dV/dd, the derivative of the student's average velocity in the duration. A difference of two
passes divides their rounding by the step, so half precision leaves few digits of it. The exact derivative is
forward mode's, in float32; a row has the root mean square error of the differences, relative to its size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from flowdistill.utils.devices import usable_device
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path

STEPS = (0.005, 0.01, 0.02, 0.05, 0.1)
PRECISIONS = ("fp32", "fp16", "bf16")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=local_path, metavar="RUN", help="run folder of a flow map from noise (freeflow)")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="noises, each with a duration (default: 64)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        print(table(options.run, options.rows, options.device))
    except UserError as error:
        print(f"derivative_precision: error: {error}", file=sys.stderr)
        return 2
    return 0


def table(run: Any, rows: int, device: str) -> str:
    """Markdown, a row a precision and a column a step.

    Raises:
        UserError: fewer than one row, or a student that is no flow map from noise.
    """
    from flowdistill import load_student
    from flowdistill.networks.attention import allow_forward_mode
    from flowdistill.students import FlowMap

    if rows < 1:
        raise UserError(f"--rows is {rows}; it must be at least 1")
    usable_device(device, "--device")
    student = load_student(run, device)
    if not isinstance(student, FlowMap) or student.num_steps != 1:
        raise UserError(f"{run} is no flow map from noise, which takes a duration; give a run of freeflow or boot")
    allow_forward_mode(student.network, "the exact derivative")
    found = errors(student, rows)
    lines = [f"| precision | {' | '.join(f'step {step:g}' for step in STEPS)} |", "|---" * (1 + len(STEPS)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{100 * value:.2g} %' for value in found[name])} |" for name in PRECISIONS]
    return "\n".join(lines)


def errors(student: Any, rows: int) -> dict[str, list[float]]:
    """Relative error of the differences by precision, one for each of ``STEPS``; durations away from both ends."""
    import torch

    from flowdistill.conditioning import Condition
    from flowdistill.objectives import flow_map as fm
    from flowdistill.training.precision import HalfPrecisionForward
    from flowdistill.utils.randomness import indexed_noise

    network = student.network.eval()
    once, condition = indexed_noise(student.shape, 0, range(rows)).to(student.device), student.examples(range(rows))
    share = torch.rand(rows, generator=torch.Generator().manual_seed(0)).to(student.device)
    duration = max(STEPS) + (student.t_max - 2 * max(STEPS)) * share

    def velocity(call: Any) -> Any:
        def of(d: torch.Tensor) -> torch.Tensor:
            twice = len(d) > rows
            given = Condition.cat([condition, condition]) if twice and condition is not None else condition
            noise = torch.cat([once, once]) if twice else once
            time = torch.full((len(d),), student.t_max, device=d.device)
            return call(student.t_max * noise, time, given, duration=d)

        return of

    with torch.no_grad():
        exact = fm.duration_derivative_jvp(velocity(network), duration)
        found = {}
        for name in PRECISIONS:
            call = network if name == "fp32" else HalfPrecisionForward(network, name, student.device)
            made = [fm.duration_derivative(velocity(call), duration, step, student.t_max) for step in STEPS]
            found[name] = [((one - exact).square().mean() / exact.square().mean()).sqrt().item() for one in made]
    return found


if __name__ == "__main__":
    sys.exit(main())
