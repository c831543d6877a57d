"""Weights that are not finite, of which nothing but black images is to be had."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Those of eight bits and fewer, of quantised networks, are not looked at: not all of them can be asked."""


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is not finite; None where all are."""
    return next((name for name, value in tensors if value.dtype in TYPES and not value.isfinite().all()), None)
