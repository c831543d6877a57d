"""Frozen parts that stay in CPU memory and visit the device when they are called (accelerate's hooks)."""

from __future__ import annotations

import torch
from accelerate import cpu_offload_with_hook
from torch import nn

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
