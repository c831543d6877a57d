"""The encoded prompts of a list, by their places in it: in memory, on disk, or encoded when they are asked for.

All three give the same bits. What a prompt becomes depends on those that a text encoder reads together with it, so the
list is cut into groups once and for all, the same ones in every mode, by every process and after every resume.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompt_lists import Texts, in_parts
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, disk_errors
from flowdistill.utils.logging import on_terminal, say
from flowdistill.utils.processes import Processes

Tensors = dict[str, Tensor]
Encode = Callable[[list[str]], Tensors]
"""Prompts (B) to tensors (B, ...) on the CPU."""

SHARD_BYTES = 64 << 20
"""What a shard has before its rows are trimmed, about."""
SHARD_ROWS = 4096
"""The most prompts of a shard."""
OPEN_SHARDS = 256
"""Files that are kept open, of the 1,024 that a process may mostly have."""
LIVE_BYTES = 32 << 20
"""Of encoded groups that are kept in case they are asked for again; one is, whatever its size."""
STALE = 3600.0
"""Seconds after which an unfinished file is one that a killed process has left."""


class PromptBank(Protocol):
    """Encoded prompts by their places in a list."""

    def rows(self, index: Tensor) -> Condition:
        """The rows (B,) int64, on the CPU, as long as those of the whole list."""


class MemoryBank(NamedTuple):
    """All rows in memory."""

    condition: Condition

    def rows(self, index: Tensor) -> Condition:
        return self.condition[index]


class Groups(NamedTuple):
    """How a list is cut into what a text encoder reads together.

    Attributes:
        size: prompts of a group; the last one may have fewer.
        row_bytes: of the longest row, encoded.
        ragged: whether rows are as long as the longest prompt of their group.
    """

    size: int
    row_bytes: int
    ragged: bool

    @property
    def shard(self) -> int:
        """Prompts of a shard: whole groups."""
        return self.size * max(1, min(SHARD_BYTES // max(1, self.row_bytes), SHARD_ROWS) // self.size)


class Words(NamedTuple):
    """What the messages of a bank call its content.

    Attributes:
        what: rows, in the plural; ``unit``: one of them; ``making``: what is done to make them.
        remedy: what needs no disk.
        again: what makes them again.
    """

    what: str = "encoded prompts"
    unit: str = "prompt"
    making: str = "encoding"
    remedy: str = "teacher.prompt_cache: live"
    again: str = "the same command, or flowdistill cache, encodes"


class DiskBank:
    """Rows in files of many rows each, read one by one.

    A file's name is a hash of the prompts in it, and it is complete or absent: encoding that was interrupted goes on
    where it was, prompts that are added at a list's end leave the files before them as they are, and lists share what
    they have in common. Trailing zeros of a row, which is what a text encoder's output is padded with, are left out and
    put back. Nothing is mapped into memory. Each row has a checksum, which is compared whenever it is read.

    Args:
        folder: of everything that these text encoders have encoded in this way.
        texts: what the rows are made of; of rows that are not made of texts, what tells them apart.
    """

    words = Words()

    def __init__(self, folder: Path, texts: Texts, groups: Groups) -> None:
        self.folder, self.texts, self.groups = folder, texts, groups
        self.size = groups.shard
        self.parts = list(in_parts(len(texts), self.size))
        self.files = [folder / f"shard-{texts.digest(part.start, part.stop)[:32]}.safetensors" for part in self.parts]
        self._open: _Recent[int, _Shard] = _Recent(lambda shard: 1, OPEN_SHARDS)
        self._form: dict[str, _Form] = {}

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there."""
        with disk_errors(str(self.folder)):
            there = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        return [number for number, file in enumerate(self.files) if file.name not in there]

    def fill(self, encoder: contextlib.AbstractContextManager[Encode], processes: Processes) -> None:
        """Encode what is missing. Processes that do this at once share the work, and none waits for another.

        Args:
            encoder: opens the text encoders, which happens where something is missing only.

        Raises:
            UserError: the disk has too little room, or cannot be written to.
        """
        missing = self.missing()
        if not missing:
            return
        with disk_errors(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            free = shutil.disk_usage(self.folder).free
        rows = sum(len(self.parts[number]) for number in missing)
        needed = rows * self.groups.row_bytes
        if needed > free and not self.groups.ragged:  # ragged rows may be far shorter
            raise UserError(f"{rows:,} {self.words.what} take {needed / 1e9:,.1f} GB, and the disk of {self.folder} "
                            f"has {free / 1e9:,.1f} GB left; XDG_CACHE_HOME moves them, and {self.words.remedy} "
                            "needs no disk")
        if processes.is_main and not on_terminal():
            say(f"{self.words.making} {rows:,} of {len(self.texts):,} {self.words.unit}s into {self.folder}")
        # First its own share; then what others, who may be none or slower, have not done yet.
        own = missing[processes.rank :: processes.world]
        others = set(missing).difference(own)
        bar = tqdm(total=rows, desc=f"{self.words.making} {self.words.unit}s", unit=self.words.unit, leave=False,
                   disable=None if processes.is_main else True)
        with encoder as encode, bar:
            for number in [*own, *sorted(others)]:
                if not self.files[number].is_file():
                    self._write(number, encode, bar)
                else:
                    bar.update(len(self.parts[number]))

    def prepare(self) -> DiskBank:
        """Look at every shard, so that rows can be read.

        Raises:
            UserError: one is missing, or cut short.
        """
        for number in range(len(self.files)):
            shard = self._shard(number)
            for name, form in shard.forms.items():
                known = self._form.setdefault(name, form)
                if known[:2] != form[:2]:
                    raise shard.damaged("its rows are of another shape than those before it")
                self._form[name] = _longer(known, form)
        return self

    def rows(self, index: Tensor) -> Condition:
        found = {name: torch.zeros((len(index), *form.shape), dtype=getattr(torch, form.dtype))
                 for name, form in self._form.items()}
        for place, row in enumerate(index.tolist()):
            shard, within = divmod(row, self.size)
            for name, values in self._shard(shard).row(within).items():
                found[name][place, : len(values)] = values
        return Condition({name: found[name] if form.length is not None else found[name][:, 0]
                          for name, form in self._form.items()})

    def _shard(self, number: int) -> _Shard:
        return self._open.get(number, lambda: _Shard(self.files[number], len(self.parts[number]), self.words))

    def _group(self, encode: Encode, rows: range) -> Tensors:
        return encode(self.texts[rows.start : rows.stop])

    def _write(self, number: int, encode: Encode, bar: Any) -> None:
        part = self.parts[number]
        forms: dict[str, _Form] = {}
        trimmed: dict[str, list[_Trimmed]] = {}
        for group in in_parts(len(part), self.groups.size):
            rows = range(part.start + group.start, part.start + group.stop)
            for name, values in self._group(encode, rows).items():
                form = _form_of(values)
                forms[name] = _longer(forms.get(name, form), form)
                trimmed.setdefault(name, []).append(_trimmed(values))
            bar.update(len(rows))
        content: Tensors = {}
        checksums = [0] * len(part)
        for name in sorted(forms):
            content[name] = torch.cat([group.values for group in trimmed[name]])
            lengths = torch.cat([torch.zeros(1, dtype=torch.int64), *(group.lengths for group in trimmed[name])])
            content[f"{name}/starts"] = starts = lengths.cumsum(0)
            stored = memoryview(_bytes(content[name]))  # type: ignore[arg-type]
            item = len(stored) // max(1, len(content[name]))
            places = (starts * item).tolist()
            checksums = [zlib.crc32(stored[start:end], checksum)
                         for checksum, start, end in zip(checksums, places[:-1], places[1:], strict=True)]
        content["checksums"] = torch.tensor(checksums)
        # One entry: safetensors writes several in an order of chance, and files of the same rows are the same.
        metadata = {"forms": json.dumps({name: form._asdict() for name, form in sorted(forms.items())})}
        with disk_errors(str(self.files[number])), atomic_write(self.files[number]) as file:
            file.write(save(content, metadata))

    def _remove_unfinished(self) -> None:
        for file in self.folder.glob(".shard-*.tmp"):
            with contextlib.suppress(OSError):  # another process may have been faster
                if time.time() - file.stat().st_mtime > STALE:
                    file.unlink()


class LiveBank:
    """Rows by text encoders that stay loaded, encoded when they are asked for.

    Args:
        encode: of the text encoders.
        lengths: of the longest row of the whole list, by name; where rows are not ragged, those of any.
    """

    def __init__(self, texts: Texts, groups: Groups, encode: Encode, lengths: Mapping[str, int]) -> None:
        self.texts, self.groups, self.encode, self.lengths = texts, groups, encode, dict(lengths)
        self._recent: _Recent[int, Tensors] = _Recent(
            lambda group: sum(values.nbytes for values in group.values()), LIVE_BYTES)

    def rows(self, index: Tensor) -> Condition:
        if not len(index):
            return self._row(0)[:0]
        return Condition.cat([self._row(row) for row in index.tolist()])

    def _row(self, row: int) -> Condition:
        group, within = divmod(row, self.groups.size)
        made = self._recent.get(group, lambda: self._group(group))
        return Condition({name: self._padded(name, values[within : within + 1]) for name, values in made.items()})

    def _group(self, number: int) -> Tensors:
        return self.encode(self.texts[number * self.groups.size : (number + 1) * self.groups.size])

    def _padded(self, name: str, values: Tensor) -> Tensor:
        if values.ndim < 2:
            return values
        longest = self.lengths.setdefault(name, values.shape[1])
        if values.shape[1] > longest or values.shape[1] < longest and not self.groups.ragged:
            raise RuntimeError(f"rows of {name} have the lengths {longest} and {values.shape[1]}; a family whose rows "
                               "are as long as the longest prompt encoded with them says so (ragged)")
        return torch.nn.functional.pad(values, (0, 0) * (values.ndim - 2) + (0, longest - values.shape[1]))


# --- what is in a shard


class _Form(NamedTuple):
    """Of a tensor's rows: the type's name, the shape behind the length, and the length of an untrimmed row; None for
    one number a row."""

    dtype: str
    rest: tuple[int, ...]
    length: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (1 if self.length is None else self.length, *self.rest)


def _longer(one: _Form, other: _Form) -> _Form:
    return max(one, other, key=lambda form: form.length or 0)


def _form_of(values: Tensor) -> _Form:
    shape = tuple(values.shape[1:])
    return _Form(str(values.dtype).removeprefix("torch."), shape[1:], shape[0] if shape else None)


class _Trimmed(NamedTuple):
    """Rows below each other (sum of lengths, ...) and their lengths (B,)."""

    values: Tensor
    lengths: Tensor


def _trimmed(rows: Tensor) -> _Trimmed:
    """Rows (B, L, ...) without the zeros at the end of each; numbers (B,) as rows of length 1."""
    if rows.ndim == 1:
        return _Trimmed(rows, torch.ones(len(rows), dtype=torch.int64))
    count, length = rows.shape[:2]
    if not rows.numel():
        return _Trimmed(rows.reshape(-1, *rows.shape[2:])[:0], torch.zeros(count, dtype=torch.int64))
    filled = torch.from_numpy(_bytes(rows).reshape(count, length, -1).any(axis=2))
    places = torch.arange(1, length + 1)
    lengths = (filled * places).amax(dim=1)
    return _Trimmed(rows.contiguous()[places <= lengths[:, None]], lengths)


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    """(N,). Bytes, not numbers: a minus zero is none of the zeros that are left out."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy()


class _Shard:
    """An open file of rows.

    Raises:
        UserError: it is missing or damaged.
    """

    def __init__(self, file: Path, rows: int, words: Words) -> None:
        self.file, self.words = file, words
        self._handle = -1
        try:
            self._handle = os.open(file, os.O_RDONLY)
            size = int.from_bytes(self._read(8, 0), "little")
            if size > os.fstat(self._handle).st_size:
                raise ValueError("it begins with no length of a header")
            header = json.loads(self._read(size, 8))
            self._start = 8 + size
            forms = json.loads(header.pop("__metadata__")["forms"])
            self.forms = {name: _Form(form["dtype"], tuple(form["rest"]), form["length"])
                          for name, form in forms.items()}
            self._places = {name: (entry["data_offsets"][0], entry["data_offsets"][1]) for name, entry in
                            header.items()}
            if self._start + max(end for _, end in self._places.values()) != os.fstat(self._handle).st_size:
                raise ValueError("it is cut short")
            self._item = {name: getattr(torch, form.dtype).itemsize * math.prod(form.rest)
                          for name, form in self.forms.items()}
            if {self._size("checksums")} | {self._size(f"{name}/starts") - 8 for name in self.forms} != {8 * rows}:
                raise ValueError("it has another number of rows")
        except FileNotFoundError:
            raise UserError(f"the {words.what} {file} are gone; {words.again} them again") from None
        except OSError as error:
            raise UserError(f"the {words.what} {file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self.damaged(str(error) if type(error) is ValueError else "it has another form") from error

    def row(self, row: int) -> Tensors:
        """A row as it was before it was padded.

        Raises:
            UserError: it is not what was written.
        """
        try:
            found, checksum = {}, 0
            for name in sorted(self.forms):
                start, end = self._numbers(f"{name}/starts", row, 2)
                form, item = self.forms[name], self._item[name]
                if not 0 <= start <= end <= start + (form.length or 1):
                    raise ValueError(f"row {row} of it is not what was written")
                content = self._read((end - start) * item, self._start + self._places[name][0] + start * item)
                checksum = zlib.crc32(content, checksum)
                flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
                found[name] = flat.view(getattr(torch, form.dtype)).reshape(end - start, *form.rest)
            if [checksum] != self._numbers("checksums", row, 1):
                raise ValueError(f"row {row} of it is not what was written")
            return found
        except OSError as error:
            raise UserError(f"the {self.words.what} {self.file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise self.damaged(str(error)) from None

    def damaged(self, reason: str) -> UserError:
        return UserError(f"the {self.words.what} {self.file} are damaged: {reason}; delete this file, and "
                         f"{self.words.again} its {self.words.unit}s again")

    def _size(self, name: str) -> int:
        first, end = self._places[name]
        return end - first

    def _numbers(self, name: str, first: int, count: int) -> list[int]:
        return memoryview(self._read(8 * count, self._start + self._places[name][0] + 8 * first)).cast("q").tolist()

    def _read(self, size: int, start: int) -> bytearray:
        content = bytearray(size)
        if size and os.preadv(self._handle, [content], start) != size:
            raise ValueError("it is cut short")
        return content

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)


K = TypeVar("K")
V = TypeVar("V")


class _Recent(Generic[K, V]):
    """What was asked for last, up to a size."""

    def __init__(self, size: Callable[[V], int], most: int) -> None:
        self._size, self._most, self._total = size, most, 0
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self._kept[key] = made = make()
        self._total += self._size(made)
        while self._total > self._most and len(self._kept) > 1:
            self._total -= self._size(self._kept.popitem(last=False)[1])
        return made
