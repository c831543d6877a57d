"""Generated images as PNG files."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from flowdistill.utils.files import atomic_write, local_path

CELL = 32  # smallest side of an image in a grid, in pixels of the file: 8x8 digits stay visible
PADDING = 2  # pixels between the images of a grid


def save_grid(images: Tensor, path: str | os.PathLike[str], columns: int | None = None) -> None:
    """Write images as one PNG, row by row; the file is complete or absent.

    Args:
        images, columns: see :func:`grid`.
        path: a PNG file; its folder is made.
    """
    save_picture(grid(images, columns), path)


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images as one picture, row by row.

    Args:
        images: (N, C, H, W) in [0, 1], N at least 1; values outside are clipped, those that are not finite are black,
            with a warning. One channel is grey, three are colour, four are colour with the fourth in grey beside it,
            and others are beside each other in grey. Images whose shorter side is below 32 pixels are enlarged by a
            whole factor, each pixel into a square.
        columns: images in a row; default: the nearest to a square.
    """
    _check(images)
    pixels = _visible(to_uint8(images.detach().cpu()))
    factor = math.ceil(CELL / min(pixels.shape[-2:]))
    enlarged = pixels.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    return to_pil_image(make_grid(enlarged, nrow=columns, padding=PADDING, pad_value=255))


def stacked(parts: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures of one size under each other, each below its title in black on white."""
    first = next(iter(parts.values()))
    size = max(14, first.width // 40)
    font, band = ImageFont.load_default(size), round(1.6 * size)
    whole = Image.new(first.mode, (first.width, len(parts) * (band + first.height)), "white")
    drawing = ImageDraw.Draw(whole)
    for number, (title, picture) in enumerate(parts.items()):
        top = number * (band + first.height)
        drawing.text((2 * PADDING, top + band // 2), title, fill="black", font=font, anchor="lm")
        whole.paste(picture, (0, top + band))
    return whole


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG, complete or absent; its folder is made."""
    with atomic_write(path) as file:
        picture.save(file, format="png")


def save_images(images: Tensor, folder: str | os.PathLike[str], start: int = 0) -> list[Path]:
    """Write images as ``000000.png``, ``000001.png``, ... at their own size; the folder is made.

    Args:
        images: (N, C, H, W) in [0, 1]; values outside are clipped, those that are not finite are black, with a warning.
            PNG has one to four channels (the last of two and of four is transparency); of more, each is below the one
            before, in grey: (C H, W).
        start: number of the first file.

    Returns:
        The N paths.
    """
    _check(images)
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.png" for number in range(start, start + len(images))]
    stored = to_uint8(images.detach().cpu())
    if stored.shape[1] > 4:
        stored = stored.flatten(1, 2)[:, None]
    for pixels, path in zip(stored, paths, strict=True):
        to_pil_image(pixels).save(path)
    return paths


def _check(images: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must have the shape (N, C, H, W) with N and C at least 1, not {tuple(images.shape)}")


def _visible(pixels: Tensor) -> Tensor:
    """Channels (N, C, H, W) as a screen shows them, none of them as transparency: (N, 1 or 3, H, W')."""
    channels = pixels.shape[1]
    if channels in (1, 3):
        return pixels
    if channels == 4:
        return torch.cat([pixels[:, :3], pixels[:, 3:].expand(-1, 3, -1, -1)], dim=3)
    return torch.cat(pixels.split(1, dim=1), dim=3)


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, ...) in [0, 1] as they would be stored: uint8, values outside clipped, rounded to the nearest level.

    Values that are not finite become black, and a warning counts the images that have any.
    """
    finite = images.isfinite()
    if not finite.all():
        broken = int((~finite).flatten(1).any(dim=1).sum())
        warnings.warn(f"{broken} of {len(images)} images have values that are not finite, which are shown as black: "
                      "the model diverged, or overflows in its precision", stacklevel=2)
        images = images.where(finite, 0.0)
    return images.float().clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
