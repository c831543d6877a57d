"""Image sets by name, which need no network."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import Tensor

from flowdistill.data.digits import load_digits
from flowdistill.data.emoji import emoji_captions, load_emoji, load_emoji64
from flowdistill.data.fashion import load_fashion, load_fashion_test
from flowdistill.data.shapes import caption, load_shapes
from flowdistill.utils.errors import UserError, listed, shown

IMAGE_SETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "digits": load_digits, "emoji": load_emoji, "emoji64": load_emoji64, "fashion": load_fashion,
    "fashion-test": load_fashion_test, "shapes": load_shapes,
}


def shapes_captions() -> list[str]:
    """What describes each picture of the shapes world, by its class."""
    return [caption(label) for label in load_shapes()[1].tolist()]


CAPTIONS: dict[str, Callable[[], list[str]]] = {
    "emoji": emoji_captions, "emoji64": emoji_captions, "shapes": shapes_captions,
}
"""What describes each image, of the sets that have such words."""


def load_images(name: str) -> tuple[Tensor, Tensor]:
    """Load a named image set.

    Args:
        name: a key of ``IMAGE_SETS``.

    Returns:
        images, float32 (N, C, H, W) in [0, 1], and labels, int64 (N,). The tensors are the caller's to change.

    Raises:
        UserError: unknown name, or the package that carries the set is not installed, or its files are damaged.
    """
    if name not in IMAGE_SETS:
        near = difflib.get_close_matches(str(name), IMAGE_SETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"unknown image set {shown(name)}{hint}; the named sets are {listed(sorted(IMAGE_SETS))}")
    return IMAGE_SETS[name]()


def load_captions(name: str) -> list[str] | None:
    """A caption of each image of a named set; None where the set has none.

    Raises:
        UserError: see :func:`load_images`.
    """
    if name not in IMAGE_SETS:
        load_images(name)  # which says so
    return CAPTIONS[name]() if name in CAPTIONS else None
