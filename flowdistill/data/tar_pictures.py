"""Pictures in tar files as webdataset writes them, read at their places without unpacking or passing through."""

from __future__ import annotations

import glob
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load, save

from flowdistill.conditioning.prompt_lists import Texts
from flowdistill.data.picture_sources import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    Labels,
    captions_of,
    chosen_column,
    label_of,
)
from flowdistill.data.pictures import ENDINGS, FoundPictures, decode_picture, named_like_a_picture
from flowdistill.utils.errors import UserError, listed, shortened
from flowdistill.utils.files import cache_folder, in_cache, local_path, write_cache
from flowdistill.utils.hashing import json_sha256

VERSION = 2
"""Part of every index's name: raise it when what is in one changes."""
TEXT, CLASS, JSON = ".txt", ".cls", ".json"
ELSEWHERE = -1
"""In the place of a member's first byte: its content is not in the tar, or not in one piece."""
DOTTED = "picture whose key ends at the first of several dots in its name, such as "
END = 2 * tarfile.BLOCKSIZE
"""Zero bytes that a tar ends in, at least (POSIX.1-2017, pax, ustar interchange format)."""


class _Member(NamedTuple):
    """Where a file lies: the number of its tar, its first byte there, and its size."""

    tar: int
    start: int
    size: int


class TarPictures:
    """The pictures of tar files, in the order of the files' names and of their places in them.

    Members of one tar whose names are the same up to the first dot of their last part belong together: a picture, and
    beside it ``.txt`` (its caption), ``.cls`` (its label), or a ``.json`` object with keys for either. A link is what
    it leads to in the same tar. Where they lie is found once for each tar, and kept by its path, size and time of
    change.

    Args:
        pattern: a file, or a pattern of files such as ``shards/*.tar``.

    Raises:
        UserError: no such file, one that is damaged or compressed, two pictures of one name, or no picture.
    """

    options = frozenset({"captions", "label", "classes"})

    def __init__(self, pattern: str) -> None:
        self.name, path = pattern, local_path(pattern)
        self.tars = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(str(path)))]
        if not self.tars:
            raise UserError(f"there is no tar file {pattern}")
        self.place = "\n".join(str(tar.resolve()) for tar in self.tars)
        self._stamps = [_stamp(tar) for tar in self.tars]
        pictures: list[_Member] = []
        beside: dict[str, list[_Member]] = {ending: [] for ending in (TEXT, CLASS, JSON)}
        nothing = _Member(-1, 0, 0)
        left_out: Counter[str] = Counter()

        def titles() -> Any:
            for number, (tar, stamp) in enumerate(zip(self.tars, self._stamps, strict=True)):
                for key, members in _samples(tar, stamp, left_out).items():
                    shown = [ending for ending in members if ending in ENDINGS]
                    if len(shown) > 1:
                        raise UserError(f"{tar} has {listed(key + ending for ending in shown)}, two pictures of one "
                                        "name; each needs a name of its own")
                    if not shown:
                        continue
                    pictures.append(_Member(number, *members[shown[0]]))
                    for ending, found in beside.items():
                        found.append(_Member(number, *members[ending]) if ending in members else nothing)
                    yield key + shown[0]

        self.names = Texts(titles())
        self.left_out = FoundPictures([], [], left_out).summary()
        if not pictures:
            instead = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(f"{pattern} holds no pictures ({', '.join(sorted(ENDINGS))}){instead}")
        self._pictures = np.array(pictures, dtype=np.int64)
        self._beside = {ending: np.array(members, dtype=np.int64) for ending, members in beside.items()}

    def __len__(self) -> int:
        return len(self.names)

    def title(self, index: int) -> str:
        return f"{self.names[index]} in {self.tars[self._pictures[index, 0]]}"

    def facts(self, index: int) -> str:
        tar, start, size = self._pictures[index].tolist()
        return "\0".join((self.tars[tar].name, *map(str, self._stamps[tar]), self.names[index], str(start), str(size)))

    def open(self, index: int) -> Image.Image:
        return decode_picture(self._read(self._pictures[index], index), self.title(index))

    def captions(self, column: str | None) -> list[list[str]] | None:
        plain = self._beside[TEXT]
        if column is None and (there := plain[:, 0] >= 0).any():
            values = None if there.all() else self._values(None, CAPTION_COLUMNS, "captions")
            return [captions_of(self._text(plain[i], i), f"the {TEXT} of {self.title(i)}")
                    if there[i] or values is None else captions_of(values[i], f"the {JSON} of {self.title(i)}")
                    for i in range(len(self))]
        values = self._values(column, CAPTION_COLUMNS, "captions")
        return None if values is None else [
            captions_of(value, f"the {JSON} of {self.title(i)}") for i, value in enumerate(values)]

    def labels(self, column: str | None) -> Labels | None:
        plain = self._beside[CLASS]
        if column is None and (there := plain[:, 0] >= 0).any():
            values = None if there.all() else self._values(None, LABEL_COLUMNS, "label")
            return Labels([label_of(self._text(plain[i], i), self.title(i)) if there[i] or values is None else
                           label_of(values[i], f"the {JSON} of {self.title(i)}") for i in range(len(self))])
        values = self._values(column, LABEL_COLUMNS, "label")
        return None if values is None else Labels([
            label_of(value, f"the {JSON} of {self.title(i)}") for i, value in enumerate(values)])

    def _values(self, column: str | None, usual: Sequence[str], key: str) -> list[object] | None:
        """What the objects have for a key; None without one of the usual keys, or without objects."""
        there = self._beside[JSON][:, 0] >= 0
        if not there.any():
            if column is not None:
                raise UserError(f"data_options.{key} is {column}, but {self.name} has no {JSON} beside its pictures; "
                                f"set it to null for {TEXT if key == 'captions' else CLASS} files")
            return None
        names: dict[str, None] = {}
        kept: list[dict[str, object]] = []
        for index, described in enumerate(there.tolist()):
            values = self._object(index) if described else {}
            names |= dict.fromkeys(values)
            kept.append({name: values[name] for name in (usual if column is None else [column]) if name in values})
        chosen = chosen_column(names, column, usual, f"{self.name} ({JSON})", key)
        return None if chosen is None else [values.get(chosen) for values in kept]

    def _object(self, index: int) -> dict[str, object]:
        try:
            value = json.loads(self._text(self._beside[JSON][index], index) or "")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"the {JSON} of {self.title(index)} is no JSON object")
        return value

    def _text(self, member: NDArray[np.int64], index: int) -> str | None:
        if member[0] < 0:
            return None
        try:
            return self._read(member, index).decode().removeprefix("\ufeff").strip()
        except UnicodeDecodeError:
            raise UserError(f"a text beside {self.title(index)} is not UTF-8") from None

    def _read(self, member: NDArray[np.int64], index: int) -> bytes:
        tar, start, size = member.tolist()
        try:
            handle = os.open(self.tars[tar], os.O_RDONLY)
            try:
                content = os.pread(handle, size, start)
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"{self.title(index)} cannot be read: {error.strerror}") from error
        if len(content) != size:
            raise UserError(f"{self.tars[tar]} is cut short; replace it")
        return content


def _stamp(tar: Path) -> tuple[int, int]:
    try:
        stat = tar.stat()
    except OSError as error:
        raise UserError(f"the tar file {tar} cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _samples(
    tar: Path, stamp: tuple[int, int], left_out: Counter[str]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> ending -> (first byte, size) of the members of a tar, in their order.

    Args:
        left_out: where the members are counted that look like pictures and are not read, by kind.

    Raises:
        UserError: it is damaged, compressed, or has one name twice.
    """
    names, places = _members(tar, stamp)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, (start, size) in zip(names, places.tolist(), strict=True):
        folder, slash, last = name.rpartition("/")
        stem, dot, ending = last.partition(".")
        ending = dot + ending.lower()
        if named_like_a_picture(Path(last)) and (kind := _why_left_out(last, ending, start)):
            # One example is enough for all tars.
            left_out[next((known for known in left_out if known.startswith(DOTTED)), kind + shortened(last))
                     if kind == DOTTED else kind] += 1
        if not stem or start == ELSEWHERE:
            continue
        endings = samples.setdefault(folder + slash + stem, {})
        if ending in endings:
            raise UserError(f"{tar} has {name} twice; each needs a name of its own")
        endings[ending] = start, size
    return samples


def _why_left_out(name: str, ending: str, start: int) -> str | None:
    """The kind of a member that is named like a picture and is not read; None of one that is.

    Args:
        name: without its folder.
        ending: from its first dot on.
        start: its first byte.
    """
    if name.startswith("."):
        return "hidden file"
    if start == ELSEWHERE:
        return "link to what is not in the tar, or sparse file"
    if ending in ENDINGS:
        return None
    return ending if ending.count(".") == 1 else DOTTED


def _members(tar: Path, stamp: tuple[int, int]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the files in a tar, and the first byte (or ``ELSEWHERE``) and size of each (N, 2)."""
    facts = [VERSION, str(tar.resolve()), *stamp]
    file = cache_folder("images") / f"tar-{json_sha256(facts)[:32]}.safetensors"
    if in_cache(file):
        try:
            found = load(file.read_bytes())
            return found["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1], found["places"]
        except Exception:  # a damaged index is made again
            pass
    names: list[str] = []
    places: list[tuple[int, int]] = []
    links: dict[int, str] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if member.issym() or member.islnk():
                    folder = posixpath.dirname(member.name) if member.issym() else ""
                    links[len(names)] = posixpath.normpath(posixpath.join(folder, member.linkname))
                elif not member.isreg():
                    continue
                names.append(member.name)
                places.append((ELSEWHERE, 0) if len(names) - 1 in links or member.issparse() else
                              (member.offset_data, member.size))
                opened.members = []  # type: ignore[attr-defined]  # it would keep them all
            end = opened.offset
        # At a header that is damaged, tarfile stops as at the end.
        _check_end(tar, end, stamp[0])
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{tar} is damaged, compressed or no tar file ({error}); give plain tars") from error
    if links:
        by_name = {posixpath.normpath(name): number for number, name in enumerate(names)}
        for number, target in links.items():
            for _ in links:  # a link may lead to another; those in a circle lead nowhere
                place = by_name.get(target, number)
                if place not in links:
                    places[number] = places[place]
                    break
                target = links[place]
    made = np.array(places, dtype=np.int64).reshape(-1, 2)
    text = "".join(f"{name}\0" for name in names).encode("utf-8", "surrogateescape")
    write_cache(file, save({"names": np.frombuffer(text, dtype=np.uint8), "places": made}), "places in the tars")
    return names, made


def _check_end(tar: Path, end: int, size: int) -> None:
    """Refuse a tar whose last member is followed by anything but zero bytes, or by too few.

    Args:
        end: its first byte after the last member.
        size: of the file.

    Raises:
        UserError: so.
    """
    if size - end < END:
        raise UserError(f"{tar} is cut short: its {size:,} bytes do not end in the two empty blocks that end a tar; "
                        "replace it")
    with tar.open("rb") as file:
        file.seek(end)
        while content := file.read(1 << 20):
            if content.strip(b"\0"):
                raise UserError(f"{tar} is damaged, or several tars in one: from byte {end:,} on it holds something "
                                "that is no member; replace it, or give each tar by itself")
