"""The 1,797 handwritten 8x8 digits inside scikit-learn (UCI optdigits test set)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# scikit-learn counts black pixels in 4x4 blocks of a 32x32 bitmap, so a value is 0..16.
LEVELS = 16.0


def load_digits() -> tuple[Tensor, Tensor]:
    """Return images, float32 (1797, 1, 8, 8) in [0, 1], and labels, int64 (1797,) in 0..9, in the package's order."""
    images, labels = _read()
    return images.clone(), labels.clone()


@functools.cache
def _read() -> tuple[Tensor, Tensor]:
    from sklearn import datasets  # with pandas, half a second of a command that may need neither

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / LEVELS
    return images, torch.from_numpy(bunch.target).to(torch.int64)
