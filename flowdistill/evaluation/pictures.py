"""A strip of images for each row of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.data.image_sets import FolderImages
from flowdistill.data.pictures import open_picture
from flowdistill.evaluation.generation import Sampler, generate
from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.utils.images import grid

COUNT = 10


@dataclass(frozen=True)
class Strip:
    """Images of one row, and what they are called."""

    title: str
    picture: Image.Image


def drawn_strip(
    title: str, sampler: Sampler, model: Teacher | Student, condition: Condition | None | object,
    own: Sequence[int] | None, seed: int,
) -> Strip:
    """The first images that are measured of a model: of the same noise and labels or prompts for every row."""
    made = generate(sampler, tuple(model.shape), COUNT, seed, COUNT, 0, 1, num_classes=model.num_classes, own=own,
                    condition=condition if callable(condition) else None, progress=False)
    return Strip(title, grid(torch.cat([batch.images.cpu() for batch in made]), COUNT))


def stored_strip(title: str, images: FolderImages) -> Strip:
    """The first images of a folder, each in the size and colours of the first one."""
    pictures = [open_picture(path) for path in images.paths[:COUNT]]
    alike = [picture.convert(pictures[0].mode).resize(pictures[0].size) for picture in pictures]
    return Strip(title, grid(torch.stack([pil_to_tensor(picture) for picture in alike]) / 255, COUNT))
