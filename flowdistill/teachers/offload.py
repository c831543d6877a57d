"""Frozen parts that stay in CPU memory and visit the device when they are called (accelerate's hooks)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from torch import nn

from flowdistill.utils.errors import UserError

PARTS = ("none", "codec", "all")
"""What rests on the CPU: nothing, the autoencoder, or the teacher's network as well."""


class OffloadHook:
    """A module on the CPU that moves to ``device`` when its forward pass (of autoencoders: encode, decode) begins.

    It stays there, so that calls in a row move it once, until :meth:`offload`.
    """

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        module.to("cpu")
        _, self.hook = cpu_offload_with_hook(module, torch.device(device))

    def offload(self) -> None:
        self.hook.offload()

    def remove(self) -> None:
        """Make the module an ordinary one again."""
        self.hook.remove()


def check_not_shared(teacher: Any, networks: Iterable[nn.Module]) -> None:
    """UserError when networks that train stand on the weights of a teacher that goes away between uses."""
    if getattr(teacher, "offload", "none") != "all":
        return
    resting = {id(p) for p in teacher.network.parameters()}
    if any(id(p) in resting for network in networks for p in network.parameters()):
        raise UserError("teacher.offload is 'all', but adapters (method.student or method.critic is 'lora') use the "
                        "teacher's own weights all the time; set teacher.offload to codec")
