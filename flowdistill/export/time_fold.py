"""What a student adds to its time embedding, folded into that embedding's last layer.

At timestep k of the K that a student is called at, the layer's input is a_k, and e_k (where the jump ends, guidance) is
added to its output. With the a_k as rows of A and the e_k as rows of E,

    W' = W + E^T (A A^T)^-1 A,   so that   W' a_k = W a_k + e_k

exactly at these timesteps, and at others not: a change of rank K at most. It needs timesteps that the embedding tells
apart, which the condition number of A measures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdistill.networks.backbones import last_linear
from flowdistill.networks.lora import merged
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.students.steps import Steps
from flowdistill.students.student import Student
from flowdistill.utils.errors import UserError

WORST_CONDITION = 1e4
"""Of A; rounding in float32 is then up to a thousandth of what is added."""


class TimeFold(NamedTuple):
    """The change of one layer, ``left @ right``: (D, K) and (K, D'), float32, and the condition number of A."""

    left: Tensor
    right: Tensor
    condition: float


@torch.no_grad()
def time_folds(student: Student, steps: Steps, guidance_scale: float | None = None) -> dict[str, TimeFold]:
    """The change of the last layer of each time embedding, by its name in the backbone; none without anything to add.

    Args:
        steps: the calls; what each adds is that of a jump from its time to what it aims at.

    Raises:
        UserError: the embedding hardly tells the timesteps apart.
    """
    network = student.network
    columns = {name: torch.full((len(steps),), float(value), device=student.device)
               for name, value in student.scalars(guidance_scale).items()}
    if "duration" in columns:
        lengths = [t - aim for t, aim in zip(steps.times, steps.aims, strict=True)]
        columns["duration"] = torch.tensor(lengths, dtype=torch.float32, device=student.device)
    extra = network.extra_embedding(**columns)
    if extra is None:
        return {}
    velocity = network.velocity
    backbone = merged(velocity.backbone)
    layers: dict[nn.Module, None] = {}
    inputs: dict[nn.Module, Tensor] = {}
    for module in velocity.family.time_embeddings(backbone):
        module._forward_hooks.clear()
        layers[last_linear(module)] = None
    names = {module: name for name, module in backbone.named_modules() if module in layers}
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0].double()))
    times = torch.tensor(steps.times, dtype=torch.float64)
    condition = student.examples([0] * len(steps))
    VelocityNetwork(backbone, velocity.path, velocity.family)(
        torch.zeros(len(steps), *student.shape), times, None if condition is None else condition.to("cpu")
    )
    return {names[layer]: _fold(extra.cpu(), a) for layer, a in inputs.items()}


def _fold(extra: Tensor, inputs: Tensor) -> TimeFold:
    """For e_k (K, D) and a_k (K, D')."""
    sizes = torch.linalg.svdvals(inputs)
    condition = (sizes[0] / sizes[-1]).item()
    if not condition <= WORST_CONDITION:
        raise UserError(f"the {len(inputs)} calls of this student cannot be folded into its time embedding, whose "
                        f"inputs at their timesteps have the condition number {condition:.3g}, above "
                        f"{WORST_CONDITION:g}; export it with fewer calls")
    right = torch.linalg.solve(inputs @ inputs.T, inputs)
    return TimeFold(extra.float().T.contiguous(), right.float(), condition)


@torch.no_grad()
def fold_time(backbone: Any, folds: dict[str, TimeFold]) -> None:
    """Add the changes to the layers of a copy of the backbone, in place."""
    for name, fold in folds.items():
        weight = backbone.get_submodule(name).weight
        weight.add_((fold.left.double() @ fold.right.double()).to(weight.dtype))
