"""Images in a NumPy file: the batches that ADM's evaluation reads and writes."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flowdistill.data.image_sets import batches_of
from flowdistill.utils.files import local_path
from flowdistill.utils.hashing import file_sha256

ARRAY = "arr_0"
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayImages:
    """The array ``arr_0`` of an .npz file, uint8 (N, H, W, 1 or 3): what ADM calls a batch, of samples or of a
    reference. Read into memory when the first image is asked for."""

    labels: Tensor | None = None
    left_out: str | None = None

    def __init__(self, path: str | os.PathLike, shape: tuple[int, ...]) -> None:
        self.path, self.name, self.shape = local_path(path), str(path), shape

    @classmethod
    def found(cls, path: str | os.PathLike) -> ArrayImages | None:
        """The images of a file; None where it is no .npz file or its ``arr_0`` is no such array."""
        try:
            with zipfile.ZipFile(local_path(path)) as archive, archive.open(f"{ARRAY}.npy") as member:
                shape, _, kind = _READERS[np.lib.format.read_magic(member)](member)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        fits = kind == np.uint8 and len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0
        return cls(path, shape) if fits else None

    @cached_property
    def images(self) -> Tensor:
        """(N, H, W, C) uint8."""
        with np.load(self.path, allow_pickle=False) as file:
            return torch.from_numpy(np.ascontiguousarray(file[ARRAY]))

    def __len__(self) -> int:
        return self.shape[0]

    def hash(self) -> str:
        return f"file {file_sha256(self.path)}"

    def batches(
        self, span: range, batch_size: int, channels: int | None, then: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """``channels``: 1 reads colour as grey (ITU-R 601), 3 grey as RGB, None as it is stored."""
        for indices in batches_of(span, batch_size):
            part = self.images[indices.start : indices.stop].permute(0, 3, 1, 2)
            if channels == 3:
                part = part.expand(-1, 3, -1, -1)
            elif channels == 1 and part.shape[1] == 3:
                weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
                part = (part.float() * weights).sum(dim=1, keepdim=True).round().to(torch.uint8)
            yield indices, list(part.contiguous() if then is None else map(then, part))
