"""What makes tiny networks quick, in the tests' process and in those forked for them; larger ones lose by it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch.backends import mkldnn

from tests.copies import quick_deepcopy

Put = Callable[[Any, str, object], object]


def quicken(put: Put = setattr, *, without_onednn: bool) -> None:
    """Let networks be copied by ``tests.copies``, and torch convolve without oneDNN.

    oneDNN takes longer to prepare a convolution of 8 x 8 pixels and 8 channels than torch's own kernel takes to do it:
    a pass of ``tests.tiny``'s U-Net takes 5.8 ms with it and 3.6 without, with gradients 13.5 and 8.5; one of the
    shipped digits' network with 16 images takes 12 and 17.

    Args:
        put: ``setattr``, or one that is undone.
        without_onednn: False: it convolves where it did.
    """
    put(copy, "deepcopy", quick_deepcopy)
    if without_onednn:
        put(mkldnn, "enabled", False)


@contextlib.contextmanager
def usual_kernels() -> Iterator[None]:
    """With torch's own choice of kernels, on which the memory of a pass depends."""
    before, mkldnn.enabled = mkldnn.enabled, True
    try:
        yield
    finally:
        mkldnn.enabled = before
