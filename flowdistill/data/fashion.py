"""Fashion-MNIST: 60,000 + 10,000 pictures of clothes, grey, 28x28, ten classes (Xiao, Rasul and Vollgraf 2017,
arXiv 1708.07747; MIT licence), from the four files in which it is published."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIZE = 28
FOLDER_VARIABLE = "FLOWDISTILL_FASHION"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package ``dataset-fashion-mnist`` puts the files."""
UNSIGNED_BYTES = 8  # IDX's code for the type of the numbers; the next byte of the header counts the dimensions


def load_fashion() -> tuple[Tensor, Tensor]:
    """The training set: images, float32 (60000, 1, 28, 28) in [0, 1], and labels, int64 (60000,), of ``CLASSES``.

    Raises:
        UserError: the files are not there, or one is damaged.
    """
    return _load("train")


def load_fashion_test() -> tuple[Tensor, Tensor]:
    """The 10,000 pictures held out, as :func:`load_fashion`."""
    return _load("t10k")


def _load(part: str) -> tuple[Tensor, Tensor]:
    pixels, labels = read_fashion(fashion_folder(), part)
    return pixels.float().div_(255.0), labels.clone()


def fashion_folder() -> Path:
    """The folder that FLOWDISTILL_FASHION names, by default the Debian package's."""
    named = os.environ.get(FOLDER_VARIABLE)
    return local_path(named) if named else PACKAGE_FOLDER


@lru_cache(maxsize=2)
def read_fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 (N, 1, 28, 28), and labels, int64 (N,), of one part, ``train`` or ``t10k``; read once a process.

    Raises:
        UserError: a file is missing or damaged, or holds something else.
    """
    images_file, labels_file = (
        _find(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
    )
    pixels, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if pixels.shape[1:] != (SIZE, SIZE):
        raise UserError(f"{images_file} holds pictures of {pixels.shape[1]}x{pixels.shape[2]}, not {SIZE}x{SIZE}")
    if len(pixels) != len(labels):
        raise UserError(f"{images_file} holds {len(pixels):,} pictures and {labels_file} {len(labels):,} labels")
    if labels.max() >= len(CLASSES):
        raise UserError(f"{labels_file} has the label {labels.max()}; the classes are 0 to {len(CLASSES) - 1}")
    return pixels.unsqueeze(1), labels.long()


def _find(folder: Path, name: str) -> Path:
    """The file of this name, packed or not."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    where = f"which {FOLDER_VARIABLE} names" if os.environ.get(FOLDER_VARIABLE) else "where Debian's package puts it"
    raise UserError(
        f"Fashion-MNIST is not on this machine: {folder}, {where}, has no {name}.gz; get it with "
        f"'apt install dataset-fashion-mnist', or set {FOLDER_VARIABLE} to a folder with the four files of "
        "https://github.com/zalandoresearch/fashion-mnist"
    )


def read_idx(file: Path, dimensions: int) -> Tensor:
    """An array of bytes in the IDX format, packed with gzip or not, as uint8 of so many dimensions.

    Raises:
        UserError: the file cannot be read, is damaged, or holds another kind of array or none.
    """
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise UserError(f"{file} cannot be read or is damaged ({error}); copy it again") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, UNSIGNED_BYTES, dimensions)) or len(content) < header:
        raise UserError(f"{file} is not an IDX file of bytes in {dimensions} dimension(s)")
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    if len(content) - header != math.prod(shape) or not math.prod(shape):
        raise UserError(f"{file} is damaged: for an array of {'x'.join(map(str, shape))} it should have "
                        f"{math.prod(shape):,} bytes behind its header, not {len(content) - header:,}; copy it again")
    # A copy: torch takes no memory that may not be written to.
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
