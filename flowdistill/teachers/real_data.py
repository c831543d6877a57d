"""Real images as the teacher's latents, for the methods and terms that ask for data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompt_lists import Numbers, PromptList, Texts
from flowdistill.conditioning.prompts import PromptConditions
from flowdistill.config import DataOptions
from flowdistill.data.named_sets import IMAGE_SETS, load_captions, load_images
from flowdistill.data.picture_sources import class_numbers
from flowdistill.data.sources import UsablePictures, check_options, open_pictures
from flowdistill.teachers import Teacher
from flowdistill.teachers.codec import VaeCodec
from flowdistill.teachers.latent_bank import LatentBank, encoded, one_by_one, picture_size
from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.logging import log_once
from flowdistill.utils.randomness import Draw

AT_ONCE = 256
"""Pictures that are read into memory together."""
MANY = 2**40
"""What the choice among a picture's captions is drawn from."""

Latents = Callable[[Tensor], Tensor]
"""Latents (B, *shape) on the CPU of images (B,) int64."""
Hold = Callable[[Tensor], Latents]
"""Puts the images of some places (N,) where they come from while a run trains."""


class RealData:
    """Images with the conditions that the teacher knows: captions, class labels, or none.

    A picture is cut and resized to the teacher's size (:func:`flowdistill.data.pictures.fitted`), but for those of a
    named set, which must have it. Each latent is that of its picture alone, and so the same one from memory, from disk
    and made anew. All processes must make this together.

    Args:
        teacher: whose latents and conditions the images become.
        name: a key of ``flowdistill.data.IMAGE_SETS``, or what :func:`flowdistill.data.sources.open_pictures` takes.
        images: images (N, C, H, W) in [0, 1] and labels (N,) instead of the named set.
        options: how a source is read.

    Attributes:
        labels: (N,), of a teacher of classes; else None.
        bank: the latents on disk; None where there are none.
        captions: the list of all captions, encoded; None of a teacher that takes no prompts.

    Raises:
        UserError: no such source, or pictures that cannot be read; images of another shape than the teacher's; no
            captions for a teacher that takes prompts, no labels for one of classes, or none of its own labels.
    """

    def __init__(
        self, teacher: Teacher, name: str, images: tuple[Tensor, Tensor] | None = None,
        options: DataOptions | None = None,
    ) -> None:
        self.teacher, self.name, self.options = teacher, name, options or DataOptions()
        self.labels: Tensor | None = None
        self.bank: LatentBank | None = None
        self._captions: _Captions | None = None
        self._latents: Latents
        self._count = 1
        named = images is not None or name in IMAGE_SETS
        if not named:
            _check_used(self.options, teacher)
        if teacher.device.type == "meta":  # a plan has shapes and no content
            self._latents = lambda index: torch.empty(len(index), *teacher.shape, device="meta")
            return
        rows, hold = self._of_tensors(images) if named else self._of_pictures()
        if self.labels is not None and teacher.classes is not None and teacher.classes.own is not None:
            mine = torch.isin(self.labels, torch.tensor(teacher.classes.own))
            if not mine.any():
                raise UserError(f"method.data '{name}' has no image of the labels {list(teacher.classes.own)}")
            rows, self.labels = rows[mine], self.labels[mine]
        self._count = len(rows)
        self._latents = hold(rows)

    def __len__(self) -> int:
        return self._count

    @property
    def captions(self) -> PromptConditions | None:
        return None if self._captions is None else self._captions.bank

    def draw(self, draw: Draw, count: int | None = None) -> tuple[Tensor, Condition | None]:
        """Latents (B, *shape) of random images and their conditions, where the draws go; ``count`` over all processes,
        None: all rows."""
        index = draw.integers(len(self), count, on_cpu=True)
        return draw.placed(self.latents(index)), self._condition(index, draw, count)

    def latents(self, index: Tensor) -> Tensor:
        """Latents (B, *shape) of the images ``index`` (B,) int64, on the CPU."""
        return self._latents(index)

    def _condition(self, index: Tensor, draw: Draw, count: int | None) -> Condition | None:
        teacher = self.teacher
        if teacher.prompts is not None:
            if self._captions is None:
                return teacher.examples(index.tolist())
            return self._captions.rows(index, draw, count).to(draw.device)
        if teacher.classes is None:
            return None
        labels = torch.zeros_like(index) if self.labels is None else self.labels[index]
        return teacher.classes.wrap(draw.placed(labels))

    # --- named sets

    def _of_tensors(self, images: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Hold]:
        teacher = self.teacher
        check_options(self.options, frozenset(), f"the named set {self.name}")
        if teacher.prompts is not None:
            captions = None if images is not None else load_captions(self.name)
            if captions is None:
                raise UserError(f"method.data '{self.name}' has class labels and no captions, and the teacher takes "
                                "prompts; name images with captions")
            self._captions = _Captions(teacher.prompts, [[caption] for caption in captions])
        pictures, labels = images or load_images(self.name)
        if teacher.classes is not None:
            self.labels = labels
        if teacher.codec.image_channels(teacher.shape[0]) == pictures.shape[1]:
            latents = one_by_one(teacher, pictures[:1])
        else:
            latents = pictures[:1]
        if latents.shape[1:] != teacher.shape:
            raise UserError(f"method.data '{self.name}' has samples of shape {tuple(latents.shape[1:])}, but "
                            f"the teacher models {tuple(teacher.shape)}")
        return torch.arange(len(pictures)), lambda rows: one_by_one(teacher, pictures[rows]).__getitem__

    # --- other sources

    def _of_pictures(self) -> tuple[Tensor, Hold]:
        teacher, options = self.teacher, self.options
        if picture_size(teacher)[0] not in (1, 3):
            raise UserError(f"method.data '{self.name}' has pictures in grey or RGB, but the teacher's images have "
                            f"{picture_size(teacher)[0]} channels")
        found = open_pictures(self.name, options)
        captions: list[list[str]] | None = None
        numbers: Sequence[int] | None = None
        wanted = None
        if teacher.prompts is not None:
            captions = found.captions(options.captions)
            if captions is None:
                raise UserError(f"method.data '{self.name}' has no captions, and the teacher takes prompts; a folder "
                                "has them in metadata.jsonl, metadata.csv or metadata.parquet beside the pictures, or "
                                "in 1.txt for 1.png")
            wanted = np.array([bool(texts) for texts in captions]), "caption"
        elif teacher.classes is not None:
            labels = found.labels(options.label)
            if labels is None:
                raise UserError(f"method.data '{self.name}' has no labels, and the teacher has classes; a folder has "
                                "them as the names of its subfolders, or in the column label of metadata.jsonl, "
                                "metadata.csv or metadata.parquet")
            numbers = class_numbers(labels, options.classes, teacher.classes.num_classes, self.name, found.title)
            wanted = np.array([number >= 0 for number in numbers]), "label"
        usable = UsablePictures(found, wanted, options.on_error == "skip")
        if captions is not None and teacher.prompts is not None:
            self._captions = _Captions(teacher.prompts, [captions[place] for place in usable.places.tolist()])
        if numbers is not None:
            self.labels = torch.tensor(numbers)[torch.from_numpy(usable.places)]
        _, height, width = picture_size(teacher)
        small = int((usable.sizes < np.array([height, width])).any(axis=1).sum())
        if small:
            log_once(f"{small:,} of the {len(usable):,} pictures of {self.name} are smaller than {height} x {width} "
                     "and are enlarged")
        return torch.arange(len(usable)), lambda rows: self._held(usable, rows)

    def _held(self, usable: UsablePictures, rows: Tensor) -> Latents:
        """Where the rows come from, as ``cache_latents`` says."""
        teacher, mode = self.teacher, latents_mode(self.options, self.teacher, len(rows))
        latent, size = isinstance(teacher.codec, VaeCodec), picture_size(teacher)
        if mode == "none":
            return lambda index: encoded(teacher, usable, rows[index].tolist())
        if not latent:
            parts = [usable.read(part.tolist(), size[1:], size[0]) for part in rows.split(AT_ONCE)]
            pixels = torch.cat(parts)  # 8 bits each
            return lambda index: one_by_one(teacher, pixels[index].float() / 255)
        self.bank = bank = LatentBank(teacher, usable).made()
        if mode == "disk":
            return lambda index: bank.latents(rows[index])
        return torch.cat([bank.latents(part) for part in rows.split(AT_ONCE)]).__getitem__


def latents_mode(options: DataOptions, teacher: Teacher, count: int) -> str:
    """Where the latents of ``count`` pictures come from: ``memory``, ``disk`` or ``none``, which makes them anew.

    Raises:
        UserError: on disk, of a teacher without an autoencoder.
    """
    latent = isinstance(teacher.codec, VaeCodec)
    if options.cache_latents == "disk" and not latent:
        raise UserError("data_options.cache_latents is disk, but the teacher has no autoencoder: its latents are "
                        "the pictures, which are on disk; set it to memory, none or auto")
    if options.cache_latents != "auto":
        return options.cache_latents
    row = 4 * math.prod(teacher.shape) if latent else math.prod(picture_size(teacher))
    return "memory" if count * row <= options.memory_gb * 1e9 else "disk" if latent else "none"


class _Captions:
    """The captions of images as conditions, each different one encoded once.

    Args:
        prompts: of the teacher, whose text encoders and settings are used.
        captions: at least one for each image.
    """

    def __init__(self, prompts: PromptConditions, captions: Sequence[Sequence[str]]) -> None:
        places: dict[str, int] = {}
        flat = [places.setdefault(caption, len(places)) for each in captions for caption in each]
        self._places = torch.tensor(flat)
        counts = torch.tensor([len(each) for each in captions])
        self._starts = counts.cumsum(0) - counts
        self._counts = counts if int(counts.max()) > 1 else None
        texts = Texts(places)
        if prompts.prompts is not None and texts == prompts.prompts:
            self.bank = prompts
            return
        self.bank = prompts.beside(PromptList(texts, Numbers(np.full(len(texts), 1 / len(texts))))).shared()

    def rows(self, index: Tensor, draw: Draw, count: int | None) -> Condition:
        """The conditions of images ``index`` (B,), on the CPU; of several captions one is drawn."""
        chosen = self._starts[index]
        if self._counts is not None:
            counts = self._counts[index]
            chosen = chosen + (draw.integers(MANY, count, on_cpu=True) * counts).div(MANY, rounding_mode="floor")
        return self.bank.examples(self._places[chosen].tolist())


def _check_used(options: DataOptions, teacher: Teacher) -> None:
    """UserError for options that say where captions or labels are, for a teacher that takes none."""
    prompts, classes = teacher.prompts is not None, teacher.num_classes is not None and teacher.prompts is None
    unused = {"captions": options.captions if not prompts else None, "label": options.label if not classes else None,
              "classes": options.classes if not classes else None}
    for key, value in unused.items():
        if value is not None:
            takes = "prompts" if prompts else "class labels" if classes else "neither prompts nor labels"
            raise UserError(f"method.data_options.{key} is {shown(value)}, but the teacher takes {takes}; leave it out")
