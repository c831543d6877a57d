"""What an autoencoder makes of pictures: kept in files of many rows, as encoded prompts are, and read row by row."""

from __future__ import annotations

import contextlib
import math

import diffusers
import PIL
import torch
from torch import Tensor

from flowdistill.conditioning.prompt_bank import DiskBank, Encode, Groups, Tensors, Words
from flowdistill.conditioning.prompt_lists import Texts
from flowdistill.data.sources import UsablePictures
from flowdistill.teachers import Teacher
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.files import cache_folder
from flowdistill.utils.hashing import json_sha256, module_sha256
from flowdistill.utils.processes import Processes
from flowdistill.utils.tf32 import as_torch_has_it

LATENTS = "latents"
VERSION = 1
"""Part of the folder's name: raise it when pictures are cut or resized in another way."""
READ_AT_ONCE = 32
"""Pictures that are read together; they are encoded one by one."""


class LatentBank(DiskBank):
    """Latents of pictures, each encoded by itself, so that it does not depend on its neighbours."""

    words = Words("latents", "picture", "encoding", "data_options.cache_latents: none", "the same command encodes")

    def __init__(self, teacher: Teacher, pictures: UsablePictures) -> None:
        self.teacher, self.pictures = teacher, pictures
        codec, size = teacher.codec, picture_size(teacher)
        assert isinstance(codec, VaeCodec)
        facts = [VERSION, module_sha256(codec), codec.scale, codec.shift, codec.mean.flatten().tolist(),
                 codec.std.flatten().tolist(), *size, diffusers.__version__, PIL.__version__, pictures.pictures.place]
        folder = cache_folder("latents") / json_sha256(facts)
        texts = Texts(pictures.facts(index) for index in range(len(pictures)))
        super().__init__(folder, texts, Groups(READ_AT_ONCE, 4 * math.prod(teacher.shape), False))

    def made(self) -> LatentBank:
        """The same with all its rows on disk. All processes must call this; they share the work."""

        self.fill(contextlib.nullcontext(lambda texts: {}), Processes.current())
        self.prepare()
        return self

    def latents(self, index: Tensor) -> Tensor:
        """(B, *shape) float32, on the CPU."""
        return self.rows(index).tensors[LATENTS]

    def _group(self, encode: Encode, rows: range) -> Tensors:
        return {LATENTS: encoded(self.teacher, self.pictures, list(rows))}


def picture_size(teacher: Teacher) -> tuple[int, int, int]:
    """(channels, height, width) of the pictures that a teacher's latents become."""
    channels, height, width = teacher.shape
    factor = teacher.codec.factor
    return teacher.codec.image_channels(channels), height * factor, width * factor


def encoded(teacher: Teacher, pictures: UsablePictures, index: list[int]) -> Tensor:
    """Latents (B, *shape) of pictures, on the CPU; each is encoded alone, for batched kernels round differently."""
    channels, *size = picture_size(teacher)
    images = pictures.read(index, (size[0], size[1]), channels).float() / 255
    return one_by_one(teacher, images)


def one_by_one(teacher: Teacher, images: Tensor) -> Tensor:
    """Latents (B, *shape) of images (B, C, H, W) in [0, 1], on the CPU."""
    # Rows may be drawn while a network is in autocast, and are kept for runs with other settings.
    with torch.autocast(teacher.device.type, enabled=False), as_torch_has_it():
        if not isinstance(teacher.codec, VaeCodec):
            return teacher.codec.encode(images)
        return torch.cat([teacher.codec.encode(image[None].to(teacher.device)).cpu() for image in images])
