"""What makes tiny networks quick, in the tests' process and in those forked for them; larger ones lose by it."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from torch.backends import mkldnn

from tests.copies import quick_deepcopy

Put = Callable[[Any, str, object], object]


def quicken(put: Put = setattr, *, without_onednn: bool) -> None:
    """Let networks be copied by ``tests.copies``, what is installed be looked up once, and torch convolve without
    oneDNN.

    oneDNN takes longer to prepare a convolution of 8 x 8 pixels and 8 channels than torch's own kernel takes to do it:
    a pass of ``tests.tiny``'s U-Net takes 5.8 ms with it and 3.6 without, with gradients 13.5 and 8.5; one of the
    shipped digits' network with 16 images takes 12 and 17.

    Args:
        put: ``setattr``, or one that is undone.
        without_onednn: False: it convolves where it did.
    """
    put(copy, "deepcopy", quick_deepcopy)
    put(importlib.metadata, "entry_points", known_entry_points)
    if without_onednn:
        put(mkldnn, "enabled", False)


def known_entry_points(**wanted: str) -> EntryPoints:
    """``importlib.metadata.entry_points``, which reads a file of every package that is installed, for what cannot have
    changed: a test that installs something puts it in a folder of its own on the path."""
    folder = os.getcwd() if "" in sys.path else ""
    return _entry_points(tuple(sys.path), folder, tuple(sorted(wanted.items())))


@functools.cache
def _entry_points(path: tuple[str, ...], folder: str, wanted: tuple[tuple[str, str], ...]) -> EntryPoints:
    return entry_points(**dict(wanted))


@contextlib.contextmanager
def usual_kernels() -> Iterator[None]:
    """With torch's own choice of kernels, on which the memory of a pass depends."""
    before, mkldnn.enabled = mkldnn.enabled, True
    try:
        yield
    finally:
        mkldnn.enabled = before
