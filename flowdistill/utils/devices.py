"""Devices by name."""

from __future__ import annotations

import torch

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
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{key} is {device}, which cannot be used here: {str(error).splitlines()[0]}") from error
    return device
