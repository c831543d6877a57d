"""Sets of stored images: a named set of flowdistill.data, or a folder."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flowdistill.data.named_sets import load_images
from flowdistill.data.pictures import find_pictures, read_picture
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.images import to_uint8
from flowdistill.utils.randomness import mixed_seed


class ImageSet(Protocol):
    """Stored images in a fixed order; ``left_out`` says in words what looks like images of the set and is not read."""

    name: str
    labels: Tensor | None
    left_out: str | None

    def __len__(self) -> int: ...

    def hash(self) -> str:
        """Changes when the images change; starts with what was hashed."""

    def batches(self, span: range, batch_size: int, channels: int | None) -> Iterator[tuple[range, list[Tensor]]]:
        """The images of ``span`` as lists of uint8 (C, H, W), with their indices."""


class NamedImages:
    """A labelled set of ``flowdistill.data.load_images``, rounded to uint8."""

    left_out: str | None = None

    def __init__(self, name: str) -> None:
        self.labels: Tensor | None
        images, self.labels = load_images(name)
        self.name = name
        self.images = to_uint8(images)

    def __len__(self) -> int:
        return len(self.images)

    def hash(self) -> str:
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return f"pixels and labels {digest.hexdigest()}"

    def batches(self, span: range, batch_size: int, channels: int | None) -> Iterator[tuple[range, list[Tensor]]]:
        for indices in batches_of(span, batch_size):
            yield indices, list(self.images[indices.start : indices.stop])


class FolderImages:
    """All pictures below a folder, whatever their names end in, in the order of their relative paths; no labels.

    Which files those are, and which are left out: ``find_pictures``. How they are read: ``read_picture``.

    ``sampled``: for a :meth:`sample`, of what it is, in words.

    Raises:
        UserError: the folder does not exist or holds no picture.
    """

    labels: Tensor | None = None
    sampled: str | None = None

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = local_path(folder)
        self.name = str(folder)
        found = find_pictures(self.folder)
        self.paths, self.left_out = found.pictures, found.summary()
        if not self.paths:
            instead = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(f"the folder {self.folder} holds no images that can be read{instead}")

    def sample(self, count: int, seed: int = 0) -> FolderImages:
        """``count`` of the images, drawn without replacement; which ones depends on the seed and their number only.

        Raises:
            UserError: fewer than 1, or more than there are.
        """
        total = len(self.paths)
        if not 1 <= count <= total:
            raise UserError(f"{count} images were asked for, but {self.folder} holds {total} images")
        generator = torch.Generator().manual_seed(mixed_seed("sample of a folder", seed))
        rows = torch.randperm(total, generator=generator)[:count].sort().values
        drawn = copy.copy(self)
        drawn.paths = [self.paths[row] for row in rows.tolist()]
        drawn.sampled = f"{count} of {total}, drawn with seed {seed}"
        return drawn

    def __len__(self) -> int:
        return len(self.paths)

    def hash(self) -> str:
        # Names, sizes and times, not contents: reading 100 GB of images to find out that nothing changed would
        # take longer than the rest of an evaluation.
        digest = hashlib.sha256()
        for path in self.paths:
            stat = path.stat()
            digest.update(os.fsencode(path.relative_to(self.folder).as_posix()))
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"names, sizes and times {digest.hexdigest()}"

    def batches(self, span: range, batch_size: int, channels: int | None) -> Iterator[tuple[range, list[Tensor]]]:
        """``channels``: 1 reads grey images, also where they are stored in RGB; 3 reads every image as RGB, None as
        it is stored, grey or RGB.

        Raises:
            UserError: a picture that cannot be read, or one in colour where grey is asked for.
        """
        read = _read_grey if channels == 1 else functools.partial(read_picture, channels=channels)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for indices in batches_of(span, batch_size):
                yield indices, list(pool.map(lambda index: read(self.paths[index]), indices))


def _read_grey(path: Path) -> Tensor:
    """A picture without colours, uint8 (1, H, W): whoever reads one channel would not see them."""
    picture = read_picture(path)
    if len(picture) > 1 and not all(torch.equal(channel, picture[0]) for channel in picture[1:]):
        raise UserError(f"{path} is in colour, and the features read grey images (1 channel) only; name features that "
                        "read colours, such as inception")
    return picture[:1]


def batches_of(span: range, batch_size: int) -> Iterator[range]:
    """Consecutive parts of ``span`` with at most ``batch_size`` indices."""
    for start in range(span.start, span.stop, batch_size):
        yield range(start, min(start + batch_size, span.stop))
