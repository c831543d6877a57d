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
MASK = ".mask.png"


class ConceptImages(NamedTuple):
    """Pictures (N, 3, H, W) in [0, 1] and a caption each."""

    images: Tensor
    captions: list[str]


def concept_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Name -> file of what :func:`load_concept_images` and :func:`load_concept_masks` read of a folder."""
    folder = local_path(folder)
    found = {file.name: file for file in find_pictures(folder, recursive=False).pictures}
    return found | ({CAPTIONS: folder / CAPTIONS} if (folder / CAPTIONS).is_file() else {})


def load_concept_images(folder: str | os.PathLike[str], size: int | tuple[int, int], caption: str) -> ConceptImages:
    """All pictures of a folder in the order of their names: turned upright, in RGB, cut to ``size`` and shrunk.

    How they are read: ``flowdistill.data.pictures``. Files that are no pictures are left out, with a warning unless
    they are descriptions (.json, .jsonl) or hidden; masks are of :func:`load_concept_masks`.

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
    pictures = [file for file in found.pictures if not _is_mask(file)]
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


def load_concept_masks(folder: str | os.PathLike[str], size: int | tuple[int, int]) -> Tensor | None:
    """Where the pictures of :func:`load_concept_images` show the object, cut alike: (N, 1, H, W) in [0, 1].

    ``NAME.mask.png`` beside NAME.png, NAME.jpg and so on is white there and black elsewhere; else an alpha channel
    says so. None when no picture has either.

    Raises:
        UserError: a mask without its picture, of another shape, or without an object; or pictures with and without.
    """
    height, width = (size, size) if isinstance(size, int) else size
    folder = local_path(folder)
    found = find_pictures(folder, recursive=False).pictures
    pictures, files = [file for file in found if not _is_mask(file)], [file for file in found if _is_mask(file)]
    owners = {file: [picture for picture in pictures if picture.stem == _name_of(file)] for file in files}
    for file, owner in owners.items():
        if len(owner) != 1:
            raise UserError(f"{file} is the mask of {_name_of(file)}, and {folder} has {len(owner) or 'no'} "
                            f"picture{'s' * (len(owner) > 1)} of this name; it needs one")
    files_of = {owner[0]: file for file, owner in owners.items()}
    masks = {picture: _mask(picture, files_of.get(picture)) for picture in pictures}
    without = [picture.name for picture, mask in masks.items() if mask is None]
    if len(without) == len(masks):
        return None
    if without:
        raise UserError(f"{len(masks) - len(without)} of {len(masks)} pictures in {folder} have a mask, and "
                        f"{', '.join(without[:3])} {'has' if len(without) == 1 else 'have'} none; give all of them one "
                        f"(NAME{MASK} or an alpha channel), or none")
    shape = (width, height)
    cut = [ImageOps.fit(mask, shape, Image.Resampling.LANCZOS) for mask in masks.values() if mask is not None]
    values = torch.stack([pil_to_tensor(mask).float() / 255 for mask in cut])
    for picture, part in zip(pictures, values.mean((1, 2, 3)).tolist(), strict=True):
        if not 0 < part < 1:
            raise UserError(f"the mask of {picture} has {'no object' if part == 0 else 'nothing but the object'} in "
                            f"the part of {width} x {height} that is used; make it white where the object is and black "
                            "elsewhere")
    return values


def _is_mask(file: Path) -> bool:
    return file.name.lower().endswith(MASK)


def _name_of(mask: Path) -> str:
    return mask.name[: -len(MASK)]


def _mask(picture: Path, file: Path | None) -> Image.Image | None:
    """In grey, turned as the picture is; None without one."""
    if file is not None:
        mask, shape = open_picture(file).convert("L"), open_picture(picture).size
        if mask.size != shape:
            raise UserError(f"{file} is {mask.width} x {mask.height} pixels and {picture.name} {shape[0]} x {shape[1]}"
                            "; a mask needs the shape of its picture")
        return mask
    with Image.open(picture) as image:
        if not image.has_transparency_data:
            return None
        alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


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
