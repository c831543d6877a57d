"""What names images: a named set, a folder, tars, a table; and the images that a training run can use of them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowdistill.config import DataOptions
from flowdistill.data.folder_pictures import FolderPictures
from flowdistill.data.image_sets import MOST_WORKERS, read_batches
from flowdistill.data.named_sets import IMAGE_SETS
from flowdistill.data.picture_index import damaged, look_at
from flowdistill.data.picture_sources import Pictures
from flowdistill.data.pictures import fitted, to_tensor
from flowdistill.data.table_pictures import TablePictures, is_saved_table
from flowdistill.data.tar_pictures import TarPictures
from flowdistill.utils.errors import WORD, UserError, listed, shown
from flowdistill.utils.files import local_path
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.logging import log_once
from flowdistill.utils.shipped import find_path

KINDS = ("a named set ({names})", "a folder", "tars (shards/*.tar)", ".parquet files",
         "a folder that the package datasets has saved", "a hub id (owner/name)")


def open_pictures(source: str | os.PathLike[str], options: DataOptions | None = None) -> Pictures:
    """The pictures that a source names, other than a named set; none of them is read.

    ``*.tar`` and ``*.parquet`` are files or patterns of files; a folder has pictures, or is what datasets has saved;
    ``owner/name``, where there is no such folder, is a hub id.

    Raises:
        UserError: there is no such source, or an option that means nothing to it.
    """
    options = options or DataOptions()
    text = os.fspath(source)
    place = find_path(text)
    found: Pictures
    if text.endswith(".tar"):
        found = TarPictures(text)
    elif text.endswith(".parquet") or place.is_dir() and is_saved_table(place):
        found = TablePictures(text if text.endswith(".parquet") else str(place), options.split, options.image)
    elif place.is_dir():
        found = FolderPictures(text)
    elif _is_hub_id(text):
        found = TablePictures(text, options.split, options.image)
    else:
        near = difflib.get_close_matches(text, IMAGE_SETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"there are no images {shown(text, WORD)}{hint}; what can be named is "
                        + ", ".join(KINDS).format(names=listed(sorted(IMAGE_SETS))))
    check_options(options, found.options, text)
    return found


def check_options(options: DataOptions, meant: frozenset[str], source: str) -> None:
    """Refuse an option that is set and means nothing to a source.

    Raises:
        UserError: so.
    """
    for key in ("captions", "label", "classes", "image", "split"):
        if key not in meant and (value := getattr(options, key)) != getattr(DataOptions(), key):
            raise UserError(f"data_options.{key} is {shown(value, quoted=False)}, which means nothing to {source}; "
                            "leave it out")


def names_more_than_a_folder(source: str | os.PathLike[str]) -> bool:
    """Whether a text names tars, .parquet files, or a folder that datasets has saved."""
    text = os.fspath(source)
    return text.endswith((".tar", ".parquet")) or is_saved_table(find_path(text))


def _is_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/") and (
        not Path(text).suffix and not local_path(text).exists())


class UsablePictures:
    """The pictures of a source that a run can use, by their places among these.

    Each is read once before, which is remembered. All processes must make this together.

    Args:
        pictures: all of them.
        wanted: which of them have what is needed besides (N,), and words for what the others lack.
        skip: whether to leave out what is damaged or lacks something.

    Raises:
        UserError: a picture that is damaged, or lacks something, unless they are left out; none that is left.
    """

    def __init__(self, pictures: Pictures, wanted: tuple[NDArray[np.bool_], str] | None = None, skip: bool = False
                 ) -> None:
        self.pictures = pictures
        looked = look_at(pictures)
        has, lack = (np.ones(len(pictures), dtype=bool), "") if wanted is None else wanted
        if not skip:
            if not has.all():
                lacking = np.flatnonzero(~has)
                raise UserError(f"{len(lacking):,} of {len(has):,} pictures of {pictures.name} have no {lack}: "
                                f"{listed((pictures.title(i) for i in lacking[:16].tolist()), 8)}; add what is "
                                "missing, or leave such pictures out with data_options.on_error=skip")
            if not looked.readable.all():
                raise damaged(pictures, np.flatnonzero(~looked.readable))
        self.places = np.flatnonzero(looked.readable & has)
        self.sizes = looked.sizes[self.places]
        broken, without = int((~looked.readable).sum()), int((looked.readable & ~has).sum())
        if broken or without:
            counted = ((broken, "that cannot be read"), (without, f"without a {lack}"))
            parts = [f"{count:,} {words}" for count, words in counted if count]
            log_once(f"left out of the {len(pictures):,} pictures of {pictures.name}: {' and '.join(parts)}")
        if pictures.left_out:
            log_once(f"in {pictures.name}, not read as pictures: {pictures.left_out}")
        if not len(self.places):
            raise UserError(f"no picture of {pictures.name} can be used: of {len(pictures):,}, {broken:,} cannot be "
                            f"read and {without:,} have no {lack or 'caption'}")

    def __len__(self) -> int:
        return len(self.places)

    def facts(self, index: int) -> str:
        return self.pictures.facts(int(self.places[index]))

    def read(self, index: list[int], size: tuple[int, int], channels: int) -> Tensor:
        """Pictures at (height, width), uint8 (B, C, H, W); see :func:`flowdistill.data.pictures.fitted`."""

        def one(place: int) -> Tensor:
            return fitted(self.pictures.open(int(self.places[place])), size, channels)

        if len(index) == 1:
            return one(index[0])[None]
        return torch.stack(list(self._pool.map(one, index)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=min(MOST_WORKERS, os.cpu_count() or 1))


class SourceImages:
    """All pictures of a source as a set of stored images, at their own sizes; no labels."""

    labels: Tensor | None = None

    def __init__(self, pictures: Pictures) -> None:
        self.pictures, self.name, self.left_out = pictures, pictures.name, pictures.left_out

    def __len__(self) -> int:
        return len(self.pictures)

    def hash(self) -> str:
        return f"names, sizes and times {json_sha256([self.pictures.facts(i) for i in range(len(self.pictures))])}"

    def batches(
        self, span: range, batch_size: int, channels: int | None, then: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """Each picture is read, and passed through ``then``, by one of several threads.

        Raises:
            UserError: a picture that cannot be read, or that ``then`` refuses.
        """

        def one(index: int) -> Tensor:
            image = to_tensor(self.pictures.open(index), channels)
            try:
                return image if then is None else then(image)
            except UserError as error:
                raise UserError(f"{self.pictures.title(index)}: {error}") from error

        return read_batches(one, span, batch_size)
