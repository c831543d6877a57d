"""Pictures in a folder, with captions and labels in a table beside them, in text files, or by subfolder."""

from __future__ import annotations

import itertools
import os
import posixpath
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowdistill.conditioning.prompt_lists import Texts
from flowdistill.data.picture_sources import (
    CAPTION_COLUMNS,
    FOLDER,
    LABEL_COLUMNS,
    SIDECAR,
    Label,
    Labels,
    captions_of,
    chosen_column,
    label_of,
)
from flowdistill.data.pictures import find_pictures, open_picture
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.files import local_path
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import iter_csv_rows, iter_json_lines, read_text

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE = "file_name"
AT_ONCE = 1 << 12
"""Rows of a .parquet file that are read at once."""


class FolderPictures:
    """All pictures below a folder, in the order of their relative paths.

    A table ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``, in the folder or in one below it, has a column
    ``file_name``, of paths from there, and columns of captions and labels. Without one, the caption of ``1.png`` is in
    ``1.txt``, and the label of ``cat/1.png`` is cat. Endings in capitals are the same.

    Raises:
        UserError: no folder, no picture in it, or two tables in one folder.
    """

    options = frozenset({"captions", "label", "classes"})

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self.name = find_path(folder), str(folder)
        found = find_pictures(self.folder)
        self.left_out = found.summary()
        self.place = str(self.folder.resolve())
        if not found.pictures:
            tars = sorted(path.name for path in found.others if path.suffix == ".tar")
            hint = (f"; its tars are named as {self.name}/*.tar" if tars else
                    f"; left out: {self.left_out}" if self.left_out else "")
            raise UserError(f"the folder {self.folder} holds no images that can be read{hint}")
        root = len(self.folder.parts)
        self.names = Texts("/".join(path.parts[root:]) for path in found.pictures)
        stats = [path.stat() for path in found.pictures]
        self._stamps = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], dtype=np.int64)
        texts = [path for path in found.others if path.suffix.lower() == ".txt"]
        self._texts = bool(texts)
        self._oddly_named = {path.with_suffix(""): path for path in texts if path.suffix != ".txt"}
        self.tables = [path for path in found.others if path.name.lower() in TABLES]
        for one, other in itertools.combinations(self.tables, 2):
            if one.parent == other.parent:
                raise UserError(f"the folder {one.parent} has {one.name} and {other.name}; keep one")

    def __len__(self) -> int:
        return len(self.names)

    def title(self, index: int) -> str:
        return str(self._path(index))

    def facts(self, index: int) -> str:
        return "\0".join((self.names[index], *map(str, self._stamps[index].tolist())))

    def open(self, index: int) -> Image.Image:
        return open_picture(self._path(index))

    def captions(self, column: str | None) -> list[list[str]] | None:
        if column != SIDECAR:
            found = self._column(column, CAPTION_COLUMNS, "captions")
            if found is not None:
                return [captions_of(*found.get(name, (None, ""))) for name in self.names]
            if not self._texts:
                return None
        return [self._sidecar(self._path(index)) for index in range(len(self))]

    def labels(self, column: str | None) -> Labels | None:
        if column != FOLDER:
            found = self._column(column, LABEL_COLUMNS, "label")
            if found is not None:
                return Labels([label_of(*found.get(name, (None, ""))) for name in self.names])
        folders: list[Label | None] = [name.partition("/")[0] if "/" in name else None for name in self.names]
        return Labels(folders) if column == FOLDER or any(folder is not None for folder in folders) else None

    def _path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def _sidecar(self, picture: Path) -> list[str]:
        file = picture.with_suffix(".txt")
        if not file.is_file():
            file = self._oddly_named.get(picture.with_suffix(""), file)
        return captions_of(read_text(file).strip(), str(file)) if file.is_file() else []

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def _column(
        self, column: str | None, usual: tuple[str, ...], key: str
    ) -> dict[str, tuple[Any, str]] | None:
        """A picture's value in a column of the tables, and the words for its place; None where none has such a column.

        Raises:
            UserError: no such column, or a row that names no picture of the folder, or one that another row names.
        """
        if not self.tables:
            if column is not None:
                instead = "sidecar or null" if key == "captions" else "folder or null"
                raise UserError(f"data_options.{key} is {column}, but {self.folder} has no table with columns "
                                f"({', '.join(TABLES)}); add one, or set it to {instead}")
            return None
        found: dict[str, tuple[Any, str]] = {}
        any_column = False
        for table in self.tables:
            names = _columns(table)
            if not names:
                raise UserError(f"{table} has no rows")
            if FILE not in names:
                raise UserError(f"{table} has no column {FILE}, which says whose row it is")
            chosen = chosen_column((name for name in names if name != FILE), column, usual, str(table), key)
            if chosen is None:
                continue
            any_column = True
            below = table.parent.relative_to(self.folder).as_posix()
            for where, row in _rows(table):
                name = row.get(FILE)
                if not isinstance(name, str) or (name := posixpath.normpath(f"{below}/{name}")) not in self._known:
                    raise UserError(f"{where} names {row.get(FILE)}, which is no picture in {table.parent}")
                if name in found:
                    raise UserError(f"{where} names {name}, which {found[name][1]} has named already")
                found[name] = row.get(chosen), where
        return found if any_column else None


def _columns(table: Path) -> list[str]:
    """The columns of a table, the keys of all its objects; none of a table without rows."""
    if table.suffix.lower() == ".jsonl":
        return list(dict.fromkeys(name for _, row in _rows(table) for name in row))
    return list(next(_rows(table), ("", {}))[1])


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, with the words for where each stands.

    Raises:
        UserError: a table that is damaged, or a .parquet file without pyarrow.
    """
    if table.suffix.lower() == ".jsonl":
        form = f'{{"{FILE}": "1.png", "text": "a red cat"}}'
        for line, record in iter_json_lines(table, lambda record: dict(record.items()), form):
            yield f"line {line} of {table}", record
    elif table.suffix.lower() == ".csv":
        rows = iter_csv_rows(table)
        header = [cell.strip() for cell in next(rows, (0, []))[1]]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise UserError(f"{table} has more than one column {listed(twice)}; keep one of each name")
        for line, row in rows:
            if len(row) != len(header):
                raise UserError(f"line {line} of {table} has {len(row)} columns, and its first line has {len(header)}; "
                                "texts with commas need quotes")
            yield f"line {line} of {table}", dict(zip(header, row, strict=True))
    else:
        yield from _parquet_rows(table)


def _parquet_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{table} is a table that pyarrow reads, which is not installed; install flowdistill[parquet], "
                        "or write a metadata.jsonl or metadata.csv") from None
    try:
        with parquet.ParquetFile(local_path(table)) as opened:
            number = 0
            for batch in opened.iter_batches(AT_ONCE, columns=opened.schema_arrow.names):
                columns = batch.to_pydict()
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    yield f"row {number} of {table}", dict(zip(columns, values, strict=True))
    except (ArrowException, OSError) as error:
        raise UserError(f"{table} is damaged or no .parquet file: {' '.join(str(error).split())[:200]}") from error
