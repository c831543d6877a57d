"""Devices by name, and the way there."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.utils.errors import UserError


def usable_device(name: str | None, key: str) -> torch.device | None:
    """The device that a setting names; None for none.

    Args:
        key: of the setting, for messages.

    Raises:
        UserError: this machine does not have it.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{key} is {name}, which cannot be used here: {str(error).splitlines()[0]}") from error
    return device


WITHOUT_PINNED = ("cpu", "meta", "mps")
"""Kinds of devices to which nothing is copied from pinned memory."""


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """``values`` on ``device``; from the host to a GPU without a wait, through pinned memory.

    A copy of ordinary memory waits until the device has done all that it was told before.
    """
    device = torch.device(device)
    if values.device.type != "cpu" or device.type in WITHOUT_PINNED:
        return values.to(device)
    if torch.compiler.is_compiling():  # which has no pinned memory, and makes the copy a part of what it compiles
        return values.to(device, non_blocking=True)
    return values.pin_memory().to(device, non_blocking=True)


def as_tensor(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.as_tensor``, by which the host does not wait: the device makes a number itself."""
    if isinstance(value, Tensor):
        return sent(value.to(dtype), device)
    return torch.full((), value, dtype=dtype, device=device)


class OnDevices:
    """A small constant that is used again and again, on any device: it goes to each one once."""

    def __init__(self, values: Tensor) -> None:
        self._copies = {values.device: values}

    def on(self, device: torch.device) -> Tensor:
        """The constant on ``device``."""
        if device not in self._copies:
            self._copies[device] = sent(next(iter(self._copies.values())), device)
        return self._copies[device]
