"""The images that a run's settings name, and what their latents take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from flowdistill.conditioning.prompts import in_bytes
from flowdistill.config import DataOptions
from flowdistill.data.named_sets import IMAGE_SETS
from flowdistill.data.sources import open_pictures
from flowdistill.teachers import Teacher
from flowdistill.teachers.codec import VaeCodec
from flowdistill.teachers.latent_bank import picture_size
from flowdistill.teachers.real_data import latents_mode
from flowdistill.utils.errors import UserError
from flowdistill.utils.shipped import find_path


@dataclass(frozen=True)
class Images:
    """Images that a run takes from files.

    Attributes:
        name: of ``data``.
        options: how they are read.
    """

    name: str
    options: DataOptions


def images_of(settings: object) -> list[Images]:
    """The images that the settings of a method name, each once; not the named sets, which need no files.

    A section without ``data_options`` of its own is read as the others' say.
    """
    found = list(_sections(settings))
    shared = next((options for _, options in found if options is not None), DataOptions())
    named: list[Images] = []
    for name, options in found:
        images = Images(name, options or shared)
        if name and name not in IMAGE_SETS and images not in named:
            named.append(images)
    return named


def _sections(settings: object) -> Iterator[tuple[str, DataOptions | None]]:
    if not is_dataclass(settings):
        return
    values: dict[str, Any] = {item.name: getattr(settings, item.name) for item in fields(settings)}
    if isinstance(values.get("data"), str) or isinstance(values.get("data_options"), DataOptions):
        yield values.get("data") or "", values.get("data_options")
    for value in values.values():
        yield from _sections(value)


def in_words(images: Images, teacher: Teacher) -> str:
    """How many there are, and what their latents take; of what is not on this machine only what each takes."""
    latent = isinstance(teacher.codec, VaeCodec)
    row = 4 * math.prod(teacher.shape) if latent else math.prod(picture_size(teacher))
    what = f"{'latents' if latent else 'pictures'} of {in_bytes(row)} each"
    local = images.name.endswith((".tar", ".parquet")) or find_path(images.name).exists()
    try:
        count = len(open_pictures(images.name, images.options)) if local else None
    except UserError as error:
        return f"images of {images.name}: {what}; how many is not known: {error}"
    if count is None:
        return f"images of {images.name}: they are not here; {what}"
    mode = latents_mode(images.options, teacher, count)
    memory, disk = count * row * (mode == "memory"), count * row * (mode != "none" and latent)
    held = f"{in_bytes(memory) if memory else 'none'} of host memory and {in_bytes(disk) if disk else 'none'} of disk"
    return (f"images of {images.name}: {count:,}, {what}, in the mode {mode} (data_options.cache_latents): {held}")
