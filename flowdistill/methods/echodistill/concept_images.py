"""The few pictures of a concept, with their captions."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowdistill.data.pictures import find_pictures, open_picture
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.randomness import Draw
from flowdistill.utils.text import read_json_lines, text_of

CAPTIONS = "metadata.jsonl"


class ConceptImages(NamedTuple):
    """Pictures (N, 3, H, W) in [0, 1] and a caption each."""

    images: Tensor
    captions: list[str]


def load_concept_images(folder: str | os.PathLike[str], size: int | tuple[int, int], caption: str) -> ConceptImages:
    """All pictures of a folder in the order of their names: turned upright, in RGB, cut to ``size`` and shrunk.

    How they are read: ``flowdistill.data.pictures``. Files that are no pictures are left out, with a warning unless
    they are descriptions (.json, .jsonl) or hidden.

    Args:
        size: (height, width) in pixels, or a square's side.
        folder: may hold ``metadata.jsonl`` with ``{"file_name": ..., "text": ...}``, as data sets of diffusers do.
        caption: of the pictures without a text of their own.

    Raises:
        UserError: no folder, no picture in it, a picture that cannot be read or is smaller than ``size``, or captions
            that are not as they should be.
    """
    height, width = (size, size) if isinstance(size, int) else size
    folder = local_path(folder)
    if not folder.is_dir():
        raise UserError(f"method.instance_data_dir {folder} is no folder; give one with a few pictures of the concept")
    found = find_pictures(folder, recursive=False)
    pictures = found.pictures
    if not pictures:
        have = f"it has {', '.join(file.name for file in found.others[:3])}" if found.others else "it is empty"
        raise UserError(f"method.instance_data_dir {folder} has no picture that can be read ({have}); put a few in it, "
                        "as .png or .jpg for example")
    others = [file.name for file in found.others if file.suffix not in (".json", ".jsonl")]
    if others:
        warnings.warn(f"left out of {folder}, for they are no pictures that can be read: {', '.join(others)}",
                      stacklevel=2)
    captions = _captions(folder / CAPTIONS, {file.name for file in pictures})
    images = torch.stack([_fitted(file, height, width) for file in pictures])
    return ConceptImages(images, [captions.get(file.name, caption) for file in pictures])


def augmented(images: Tensor, draw: Draw, flip: bool, zoom: float) -> Tensor:
    """Pictures (B, C, H, W), some mirrored (half of them if ``flip``), each enlarged up to ``zoom`` times at a random
    place."""
    if not flip and zoom == 1:
        return images
    rows = len(images)
    scale = 1 / draw.uniform(1.0, zoom)
    across, down = ((1 - scale) * draw.uniform(-1.0, 1.0) for _ in range(2))
    mirror = torch.where(draw.uniform() < 0.5, -1.0, 1.0) if flip else torch.ones_like(scale)
    zero = torch.zeros_like(scale)
    turn = torch.stack([torch.stack([mirror * scale, zero, across], 1), torch.stack([zero, scale, down], 1)], 1)
    grid = F.affine_grid(turn.to(images), [rows, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _fitted(file: Path, height: int, width: int) -> Tensor:
    image = open_picture(file).convert("RGB")
    if image.width < width or image.height < height:
        raise UserError(f"{file} is {image.width} x {image.height} pixels; the model makes {width} x {height}, and "
                        "pictures must not be smaller")
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return pil_to_tensor(image).float() / 255


def _captions(file: Path, names: set[str]) -> dict[str, str]:
    if not file.is_file():
        return {}
    captions = {}
    form = '{"file_name": "1.png", "text": "a photo of ..."}'
    lines = read_json_lines(file, lambda record: (text_of(record["file_name"]), text_of(record["text"])), form)
    for number, (name, text) in lines:
        if name not in names:
            raise UserError(f"line {number} of {file} names {name}, which is no picture in {file.parent}")
        captions[name] = text
    return captions
