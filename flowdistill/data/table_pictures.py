"""Pictures in tables that the package datasets reads: of the hub, saved by it, or .parquet files."""

from __future__ import annotations

import glob
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from flowdistill.data.picture_sources import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    Labels,
    captions_of,
    chosen_column,
    label_of,
)
from flowdistill.data.pictures import decode_picture, open_picture
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.files import local_path

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")
"""Where pictures are looked for if no column says that it has them."""
SAVED, SEVERAL = "dataset_info.json", "dataset_dict.json"
"""What ``save_to_disk`` writes for one table, and for several splits."""


AT_ONCE = 1 << 12
"""Rows that are looked through at once."""


def is_saved_table(folder: Path) -> bool:
    """Whether a folder is what datasets' ``save_to_disk`` writes."""
    return (folder / SEVERAL).is_file() or (folder / SAVED).is_file() and (folder / "state.json").is_file()


class TablePictures:
    """The rows of a table with a column of pictures, in their order.

    Args:
        source: a folder of ``save_to_disk``, a .parquet file or a pattern of them, or a hub id (owner/name).
        split: of a table with several.
        image: the column of the pictures; None: the one that datasets knows for one, or a usual name.

    Raises:
        UserError: datasets is not installed, or there is no such table, split or column.
    """

    options = frozenset({"captions", "label", "classes", "image", "split"})
    left_out: str | None = None

    def __init__(self, source: str, split: str = "train", image: str | None = None) -> None:
        self.name = source
        try:
            import datasets
        except ImportError:
            here = source.endswith(".parquet") or local_path(source).exists()
            what = f"{source} is a table that" if here else f"there is no folder {source} here, and a hub id is what"
            raise UserError(f"{what} the package datasets reads, which is not installed; install flowdistill[data]"
                            ) from None
        table = _opened(datasets, source, split)
        columns: dict[str, Any] = dict(table.features)
        known = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
        usual = tuple(known) or IMAGE_COLUMNS
        chosen = chosen_column(columns, image, usual, source, "image")
        if chosen is None:
            raise UserError(f"{source} has no column of pictures, but {listed(columns)}; name one in "
                            "data_options.image")
        self.image, self.columns = chosen, {name: kind for name, kind in columns.items() if name != chosen}
        # Bytes, or the path of a file: what is decoded here is decoded as every other picture is.
        try:
            self.table = table.cast_column(chosen, datasets.Image(decode=False))
        except Exception as error:  # of pyarrow, by the type of the column
            kind = getattr(columns[chosen], "dtype", type(columns[chosen]).__name__)
            raise UserError(f"the column {chosen} of {source} holds no pictures, but {kind}; name another one "
                            "in data_options.image") from error
        self.place = f"{source} {split} {image} {table._fingerprint}"
        if not len(table):
            raise UserError(f"{source} has no rows")

    def __len__(self) -> int:
        return len(self.table)

    def title(self, index: int) -> str:
        return f"row {index} of {self.name}"

    def facts(self, index: int) -> str:
        file = self._files[index]
        return f"{self.place}\0{index}" + (f"\0{file}" if file else "")

    @cached_property
    def _files(self) -> list[str]:
        """Of rows that have the path of a picture and not the picture, its file's path, size and time of change; the
        table's own fingerprint does not know these. Nothing of the others is read."""
        found: list[str] = []
        for rows in self.table.select_columns([self.image]).with_format("arrow").iter(AT_ONCE):
            for part in rows.column(0).chunks:
                empty = part.field("bytes").is_null().to_pylist()
                found += [_stamp(path) if bare and path is not None else ""
                          for path, bare in zip(part.field("path").to_pylist(), empty, strict=True)]
        return found

    def open(self, index: int) -> Image.Image:
        value = self.table[index][self.image] or {}
        content, path = value.get("bytes"), value.get("path")
        if content is None and path is not None:
            return open_picture(path)
        return decode_picture(content or b"", self.title(index))

    def captions(self, column: str | None) -> list[list[str]] | None:
        chosen = chosen_column(self.columns, column, CAPTION_COLUMNS, self.name, "captions")
        if chosen is None:
            return None
        return [captions_of(value, self.title(i)) for i, value in enumerate(self._column(chosen))]

    def labels(self, column: str | None) -> Labels | None:
        chosen = chosen_column(self.columns, column, LABEL_COLUMNS, self.name, "label")
        if chosen is None:
            return None
        names = getattr(self.columns[chosen], "names", None)
        return Labels([label_of(value, self.title(i)) for i, value in enumerate(self._column(chosen))], names)

    def _column(self, name: str) -> list[Any]:
        return list(self.table.select_columns([name])[:][name])


def _stamp(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return path  # it is named when it is read
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"


def _opened(datasets: Any, source: str, split: str) -> Any:
    place = local_path(source)
    try:
        if place.is_dir():
            table = datasets.load_from_disk(str(place))
            if not hasattr(table, "features"):  # several splits
                if split not in table:
                    raise UserError(f"{source} has no split '{split}', but {listed(table)}; name one in "
                                    "data_options.split")
                table = table[split]
            return table
        if source.endswith(".parquet"):
            files = [str(place)] if place.is_file() else sorted(glob.glob(str(place)))
            if not files:
                raise UserError(f"there is no file {source}")
            return datasets.load_dataset("parquet", data_files=files, split="train")
        return datasets.load_dataset(source, split=split)
    except UserError:
        raise
    except Exception as error:  # of the hub, of the disk, of the format: no fixed set
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        where = "is no set of images here and could not be fetched from the hub" if not (
            place.exists() or source.endswith(".parquet")) else "cannot be read by the package datasets"
        raise UserError(f"{os.fspath(source)} {where}: {reason}") from error
