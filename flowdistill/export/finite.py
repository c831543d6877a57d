"""Weights after a training that diverged, of which nothing but black images is to be had."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Those of eight bits and fewer, of quantised networks, are not looked at: not all of them can be asked."""
LARGEST = torch.finfo(torch.float32).max ** 0.5
"""The square of what is larger overflows, and so does a network with such a weight."""


def overflowing(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is not finite or above ``LARGEST``; None where there is none."""
    return next((name for name, value in tensors if not _is_fine(value)), None)


def _is_fine(value: Tensor) -> bool:
    if value.dtype not in TYPES or not value.numel():
        return True
    low, high = value.aminmax()  # both NaN where one value is
    return bool(low >= -LARGEST) and bool(high <= LARGEST)
