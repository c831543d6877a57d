"""Noise that belongs to a sample's index, so that image i is the same for any batch size and process count."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_STRIDE = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: consecutive seeds land far apart


def indexed_noise(shape: tuple[int, ...], seed: int, indices: Iterable[int]) -> Tensor:
    """Unit normal noise (N, *shape), float32 on the CPU; row i depends on ``seed`` and ``indices[i]`` only."""
    generator, indices = torch.Generator(), list(indices)
    noise = torch.empty(len(indices), *shape)
    for index, row in zip(indices, noise.unbind(), strict=True):
        generator.manual_seed(((seed + 1) * _STRIDE + index) & 0x7FFFFFFFFFFFFFFF)
        row.normal_(generator=generator)
    return noise
