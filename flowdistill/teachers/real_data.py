"""Real images as the teacher's latents, for the methods and terms that ask for data."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.data import load_images
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw


class RealData:
    """A named image set in memory, without the classes that the teacher does not draw.

    Args:
        teacher: whose latents and conditions the images become.
        name: a key of ``flowdistill.data.IMAGE_SETS``.
        images: images (N, C, H, W) in [0, 1] and labels (N,) instead of the named set.

    Raises:
        UserError: an unknown set, samples of another shape than the teacher's, none of the teacher's own labels, or a
            teacher that takes prompts.
    """

    def __init__(self, teacher: Teacher, name: str, images: tuple[Tensor, Tensor] | None = None) -> None:
        if teacher.prompts is not None:
            raise UserError(f"method.data '{name}' has class labels, and the teacher takes prompts; images with "
                            "prompts are not supported")
        pictures, self.labels = images or load_images(name)
        if teacher.classes is not None and teacher.classes.own is not None:
            mine = torch.isin(self.labels, torch.tensor(teacher.classes.own))
            if not mine.any():
                raise UserError(f"method.data '{name}' has no image of the labels {list(teacher.classes.own)}")
            pictures, self.labels = pictures[mine], self.labels[mine]
        self.latents = teacher.codec.encode(pictures.to(teacher.device)).cpu()
        self.teacher = teacher
        if self.latents.shape[1:] != teacher.shape:
            raise UserError(f"method.data '{name}' has samples of shape {tuple(self.latents.shape[1:])}, but "
                            f"the teacher models {tuple(teacher.shape)}")

    def draw(self, draw: Draw, count: int | None = None) -> tuple[Tensor, Condition | None]:
        """Latents (B, *shape) of random images and their conditions, where the draws go; ``count`` over all processes,
        None: all rows."""
        index = draw.integers(len(self.latents), count)
        rows, classes = index.cpu(), self.teacher.classes
        condition = None if classes is None else classes.wrap(self.labels[rows].to(index.device))
        return self.latents[rows].to(index.device), condition
