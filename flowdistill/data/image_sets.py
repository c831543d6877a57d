"""Sets of stored images: a named set of flowdistill.data, or a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowdistill.data.named_sets import load_images
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import to_uint8

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class ImageSet(Protocol):
    """Stored images in a fixed order."""

    name: str
    labels: Tensor | None

    def __len__(self) -> int: ...

    def hash(self) -> str:
        """Changes when the images change; starts with what was hashed."""

    def batches(self, span: range, batch_size: int, channels: int | None) -> Iterator[tuple[range, list[Tensor]]]:
        """The images of ``span`` as lists of uint8 (C, H, W), with their indices."""


class NamedImages:
    """A labelled set of ``flowdistill.data.load_images``, rounded to uint8."""

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
    """All images below a folder (png, jpg, jpeg, webp, bmp), in the order of their relative paths; no labels.

    Raises:
        UserError: the folder does not exist or holds no image.
    """

    labels: Tensor | None = None

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        if not self.folder.is_dir():
            raise UserError(f"the image folder {self.folder} does not exist")
        found = (path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        self.paths = sorted(found, key=lambda path: path.relative_to(self.folder).as_posix())
        if not self.paths:
            raise UserError(f"the folder {self.folder} holds no images ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.paths)

    def hash(self) -> str:
        # Names, sizes and times, not contents: reading 100 GB of images to find out that nothing changed would
        # take longer than the rest of an evaluation.
        digest = hashlib.sha256()
        for path in self.paths:
            stat = path.stat()
            digest.update(f"{path.relative_to(self.folder).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"names, sizes and times {digest.hexdigest()}"

    def batches(self, span: range, batch_size: int, channels: int | None) -> Iterator[tuple[range, list[Tensor]]]:
        """``channels``: 1 reads every image as grey, 3 as RGB, None as it is stored, grey or RGB."""
        mode = None if channels is None else {1: "L", 3: "RGB"}.get(channels)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for indices in batches_of(span, batch_size):
                yield indices, list(pool.map(lambda index: read_image(self.paths[index], mode), indices))


def read_image(path: Path, mode: str | None = None) -> Tensor:
    """Read an image file as uint8 (C, H, W); ``mode`` is PIL's, "L" or "RGB", None for whichever it is stored in."""
    try:
        with Image.open(path) as image:
            stored = "L" if image.mode in ("1", "L", "LA") else "RGB"
            pixels = np.array(image.convert(mode or stored), dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def batches_of(span: range, batch_size: int) -> Iterator[range]:
    """Consecutive parts of ``span`` with at most ``batch_size`` indices."""
    for start in range(span.start, span.stop, batch_size):
        yield range(start, min(start + batch_size, span.stop))
