"""CUDA's float32 products with TF32's 10 bits of mantissa: where they are allowed, and what must not depend on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

SWITCHES: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
"""What decides about matrix products, and about convolutions."""
OWN = (False, True)
"""How torch has them where nobody sets them."""


@contextlib.contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """A block in which CUDA's float32 products have TF32's 10 bits of mantissa, or all 23; None: as it is outside."""
    with _set(None if allowed is None else (allowed, allowed)):
        yield


@contextlib.contextmanager
def as_torch_has_it() -> Iterator[None]:
    """A block with torch's own settings: for what is kept and used again by runs with others."""
    with _set(OWN):
        yield


def tf32_facts(device: torch.device) -> list[object]:
    """What decides, for a hash of what is computed on ``device``; nothing where it is as torch has it."""
    now = tuple(bool(switch.allow_tf32) for switch in SWITCHES)
    return [] if device.type != "cuda" or now == OWN else [f"tf32 {now}"]


@contextlib.contextmanager
def _set(values: Sequence[bool] | None) -> Iterator[None]:
    if values is None:
        yield
        return
    before = [switch.allow_tf32 for switch in SWITCHES]
    try:
        for switch, value in zip(SWITCHES, values, strict=True):
            switch.allow_tf32 = value
        yield
    finally:
        for switch, value in zip(SWITCHES, before, strict=True):
            switch.allow_tf32 = value
