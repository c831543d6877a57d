"""Sets of stored images: a named set of flowdistill.data, or a folder."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from flowdistill.data.named_sets import load_images
from flowdistill.data.pictures import find_pictures, read_picture
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.images import to_uint8
from flowdistill.utils.randomness import mixed_seed

MOST_WORKERS = 8
"""Threads that read pictures; the figures do not depend on their number."""


class ImageSet(Protocol):
    """Stored images in a fixed order; ``left_out`` says in words what looks like images of the set and is not read."""

    name: str
    labels: Tensor | None
    left_out: str | None

    def __len__(self) -> int: ...

    def hash(self) -> str:
        """Changes when the images change; starts with what was hashed."""

    def batches(
        self, span: range, batch_size: int, channels: int | None, then: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """The images of ``span`` as lists of uint8 (C, H, W), with their indices; ``then``: each image as this
        function returns it."""


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

    def batches(
        self, span: range, batch_size: int, channels: int | None, then: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[range, list[Tensor]]]:
        for indices in batches_of(span, batch_size):
            images = self.images[indices.start : indices.stop]
            yield indices, list(images if then is None else map(then, images))


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

    def batches(
        self, span: range, batch_size: int, channels: int | None, then: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """Each image is read, and passed through ``then``, by one of several threads, and the next batch while a batch
        is in use.

        ``channels``: 1 reads every image as grey, 3 as RGB, None as it is stored, grey or RGB.

        Raises:
            UserError: a picture that cannot be read, or that ``then`` refuses.
        """

        def one(index: int) -> Tensor:
            image = read_picture(self.paths[index], channels)
            try:
                return image if then is None else then(image)
            except UserError as error:
                raise UserError(f"{self.paths[index]}: {error}") from error

        return read_batches(one, span, batch_size)


def read_batches(
    one: Callable[[int], Tensor], span: range, batch_size: int
) -> Iterator[tuple[range, list[Tensor]]]:
    """What ``one`` makes of each index of ``span``, in lists, by several threads, which are a batch ahead."""
    with ThreadPoolExecutor(max_workers=min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        begun: deque[tuple[range, list[Future[Tensor]]]] = deque()
        try:
            for indices in batches_of(span, batch_size):
                begun.append((indices, [pool.submit(one, index) for index in indices]))
                if len(begun) > 1:
                    yield _finished(begun.popleft())
            while begun:
                yield _finished(begun.popleft())
        finally:
            for _, images in begun:  # of a reader that was closed, or of a picture that cannot be read
                for image in images:
                    image.cancel()


def _finished(batch: tuple[range, list[Future[Tensor]]]) -> tuple[range, list[Tensor]]:
    return batch[0], [image.result() for image in batch[1]]


def batches_of(span: range, batch_size: int) -> Iterator[range]:
    """Consecutive parts of ``span`` with at most ``batch_size`` indices."""
    for start in range(span.start, span.stop, batch_size):
        yield range(start, min(start + batch_size, span.stop))
