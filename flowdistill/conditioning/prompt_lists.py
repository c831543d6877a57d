"""Lists of prompts of any length: read from files one by one, kept outside the process's memory where they are long."""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import JsonObject, iter_csv_rows, iter_json_lines, iter_lines, text_of

T = TypeVar("T", covariant=True)
COLUMN = "prompt"
"""The column that is read where none is named."""
WEIGHT = "weight"
IN_MEMORY = 1 << 20
"""Bytes of text up to which a list stays in memory."""
ESCAPED = "surrogateescape"
"""How names of files are held that are not in UTF-8."""
AT_ONCE = 1 << 16
"""Rows of a .parquet file, and bytes of a list, that are read at once."""


class _Rows(Sequence[T]):
    """What is equal to any other sequence of equal things, and never changes."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: object) -> _Rows[T]:
        return self


class Texts(_Rows[str]):
    """Texts as one run of bytes, in an unnamed file where they are long, and the places at which they begin.

    A million texts take 8 MB of the process's memory. Several threads and forked processes may read them.

    Args:
        source: yields the texts, each once.
    """

    def __init__(self, source: Iterable[str] = ()) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY)
        starts, end = array("q", [0]), 0
        for text in source:
            content = text.encode("utf-8", ESCAPED)
            self._file.write(content)
            end += len(content)
            starts.append(end)
        self._starts = np.frombuffer(starts, dtype=np.int64)
        self._file.flush()
        self._bytes: bytes | None = None
        if end <= IN_MEMORY:
            self._file.seek(0)
            self._bytes = self._file.read()
            self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            rows = range(len(self))[index]
            if rows.step != 1 or not rows:
                return [self[row] for row in rows]
            ends, content = self._starts[rows.start : rows.stop + 1], self._read(rows.start, rows.stop)
            ends = ends - ends[0]
            spans = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
            return [content[a:b].decode("utf-8", ESCAPED) for a, b in spans]
        row = range(len(self))[index]
        return self._read(row, row + 1).decode("utf-8", ESCAPED)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE >> 4):
            yield from self[start : start + (AT_ONCE >> 4)]

    def __reduce__(self) -> tuple[Callable[..., Texts], tuple[list[str]]]:
        return Texts, (list(self),)

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """SHA-256 of the texts from ``start`` to before ``stop`` and of their order, hexadecimal."""
        stop = len(self) if stop is None else stop
        digest = hashlib.sha256(np.diff(self._starts[start : stop + 1]).astype("<i8").tobytes())
        for first in range(start, stop, AT_ONCE >> 4):
            digest.update(self._read(first, min(first + (AT_ONCE >> 4), stop)))
        return digest.hexdigest()

    def _read(self, start: int, stop: int) -> bytes:
        first, end = int(self._starts[start]), int(self._starts[stop])
        if self._bytes is not None:
            return self._bytes[first:end]
        return os.pread(self._file.fileno(), end - first, first)


class Numbers(_Rows[float]):
    """Numbers as float64, 8 bytes each."""

    def __init__(self, values: Iterable[float] | NDArray[np.float64]) -> None:
        self.values = np.asarray(values if isinstance(values, np.ndarray) else array("d", values), dtype=np.float64)

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> list[float]: ...

    def __getitem__(self, index: int | slice) -> float | list[float]:
        found: float | list[float] = self.values[index].tolist()
        return found

    def __iter__(self) -> Iterator[float]:
        return iter(self.values.tolist())


class PromptList(NamedTuple):
    """Prompts and how often each is drawn (weights of sum 1)."""

    prompts: Sequence[str]
    weights: Sequence[float]


def read_prompts(path: str | os.PathLike[str], column: str | None = None) -> PromptList:
    """The prompts of a file, and how often each is drawn.

    ``.txt``, and whatever is named otherwise: a prompt a line. ``.jsonl``: an object a line, ``.csv``: a row after one
    with the columns' names, ``.parquet``: a table. These three have the prompts in a column (a key), and may have
    weights of at least 0 in another, "weight", 1 where there is none.

    Text is UTF-8 with or without a byte-order mark; lines end in LF, CR LF or CR only. Empty lines are left out.

    Args:
        column: that of the prompts, "prompt" by default.

    Raises:
        UserError: no such file, no prompt in it, a line that is not as it should be, no such column, or a .parquet file
            without pyarrow.
    """
    file = find_path(path)
    name, kind = f"the prompts file {file}", file.suffix.lower()
    weights = array("d")
    if kind in READERS:
        pairs = READERS[kind](file, name, column or COLUMN)
    elif column is None:
        pairs = ((line.strip(), 1.0) for line in iter_lines(file, name) if line.strip())
    else:
        raise UserError(f"teacher.prompt_column is {shown(column)}, but {name} has lines and no columns; only "
                        f"{', '.join(READERS)} have")

    def prompts() -> Iterator[str]:
        for prompt, weight in pairs:
            weights.append(weight)
            yield prompt

    texts, total = Texts(prompts()), sum(weights)
    if total <= 0:
        raise UserError(f"{name} has no prompt" + (" with a weight above 0" if len(texts) else ""))
    return PromptList(texts, Numbers(np.frombuffer(weights, dtype=np.float64) / total))


def equal_prompts(prompts: Sequence[str]) -> PromptList:
    """Prompts that are drawn equally often."""
    return PromptList(list(prompts), [1 / len(prompts)] * len(prompts))


Pairs = Iterator[tuple[str, float]]


def _of_json_lines(file: Path, name: str, column: str) -> Pairs:
    form = f'{{"{column}": "a cat", "weight": 2}}, with a weight of at least 0'

    def pair(record: JsonObject) -> tuple[str, float]:
        return text_of(record[column]), _weight(record.get(WEIGHT, 1.0))

    return (made for _, made in iter_json_lines(file, pair, form, name))


def _of_csv(file: Path, name: str, column: str) -> Pairs:
    rows = iter_csv_rows(file, name)
    _, header = next(rows, (0, []))
    place, weight_place = _columns(header, name, column)
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"line {line} of {name} has {len(row)} columns, and its first line has {len(header)}; "
                            "texts with commas need quotes")
        try:
            yield row[place], 1.0 if weight_place is None else _weight(row[weight_place])
        except ValueError:
            raise UserError(f"line {line} of {name} has the weight {shown(row[weight_place or 0])}; it must be a "
                            "number of at least 0") from None


def _of_parquet(file: Path, name: str, column: str) -> Pairs:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{name} is a table that pyarrow reads, which is not installed; install flowdistill[parquet], "
                        "or give a .txt, .jsonl or .csv file") from None
    if not file.is_file():
        raise UserError(f"{name} does not exist")
    try:
        with parquet.ParquetFile(file) as table:
            place, weight_place = _columns(table.schema_arrow.names, name, column)
            wanted = [column] if weight_place is None else [column, WEIGHT]
            batches = (batch.to_pydict() for batch in table.iter_batches(AT_ONCE, columns=wanted))
            row = 0
            for batch in batches:
                for text, weight in zip(batch[column], batch.get(WEIGHT, [1.0] * len(batch[column])), strict=True):
                    row += 1
                    try:
                        yield text_of(text), _weight(weight)
                    except (ValueError, TypeError):
                        raise UserError(f"row {row} of {name} has {shown(text)} in '{column}'"
                                        + ("" if weight_place is None else f" and {shown(weight)} in '{WEIGHT}'")
                                        + "; it must have a text, and a weight of at least 0") from None
    except (ArrowException, OSError) as error:
        raise UserError(f"{name} is damaged or no .parquet file: {' '.join(str(error).split())[:200]}") from error


READERS: dict[str, Callable[[Path, str, str], Pairs]] = {
    ".jsonl": _of_json_lines, ".csv": _of_csv, ".parquet": _of_parquet,
}


def _columns(names: Sequence[str], file: str, column: str) -> tuple[int, int | None]:
    """The places of the prompts and of their weights among the columns of a file."""
    if not names:
        raise UserError(f"{file} is empty; it begins with the names of its columns, '{column}' among them")
    if column not in names:
        raise UserError(f"{file} has no column '{column}', but the columns {listed(names)}; name one in "
                        "teacher.prompt_column")
    return names.index(column), names.index(WEIGHT) if WEIGHT in names else None


def _weight(value: Any) -> float:
    weight = float(value)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{weight} is no weight")
    return weight


def in_parts(count: int, size: int) -> Iterator[range]:
    """0, 1, ..., count - 1 in ranges of ``size``."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
