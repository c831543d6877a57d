"""Scales of a network's input and output, folded into its first and last layer."""

from __future__ import annotations

import torch
from torch import nn

from flowdistill.students.student import Student
from flowdistill.utils.errors import UserError


def folding_problem(backbone: nn.Module) -> str | None:
    """Why scales do not fold into this network; None where they do."""
    if getattr(backbone.config, "center_input_sample", False):
        return (f"the {type(backbone).__name__} centres its input (center_input_sample), so no input scale folds into "
                "it")
    if any(hasattr(block, "skip_conv") for block in getattr(backbone, "up_blocks", ())):
        return "the UNet2DModel has skip blocks that bypass its last layer, which an output scale cannot fold into"
    return None


@torch.no_grad()
def fold_scales(student: Student, backbone: nn.Module, k_input: float, k_output: float) -> None:
    """Make ``backbone``, a copy of the student's, compute ``k_output * backbone(k_input * x)``, in place.

    Raises:
        UserError: a network whose input or output passes by those layers.
    """
    if (problem := folding_problem(backbone)) is not None:
        raise UserError(problem)
    first, last = student.network.velocity.family.projections(backbone)
    first.weight.mul_(k_input)
    last.weight.mul_(k_output)
    last.bias.mul_(k_output)
