"""Fashion-MNIST's four files with a few pictures of no particular clothes."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

from flowdistill.data.fashion import FOLDER_VARIABLE, SIZE

__all__ = ["FOLDER_VARIABLE", "idx", "write_fashion"]


def idx(array: Tensor) -> bytes:
    """A uint8 array in the IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.contiguous().numpy().tobytes()


def write_fashion(folder: Path, train: int = 40, test: int = 20) -> Path:
    """A folder with the four files; the labels go round, and a picture is bright where its class says."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        labels = (torch.arange(count) % 10).to(torch.uint8)
        pixels = torch.randint(60, (count, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
        for row, label in enumerate(labels.tolist()):
            pixels[row, 2 * label + 2 : 2 * label + 8, 4:24] += 180
        for kind, array in (("images-idx3", pixels.to(torch.uint8)), ("labels-idx1", labels)):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array), mtime=0))
    return folder
