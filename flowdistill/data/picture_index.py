"""The first look at pictures: each is read once, so that a damaged one is known before the work; and remembered."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from flowdistill.conditioning.prompt_lists import in_parts
from flowdistill.data.image_sets import MOST_WORKERS
from flowdistill.data.picture_sources import Pictures
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.files import cache_folder, in_cache, write_cache
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.logging import on_terminal, say
from flowdistill.utils.processes import Processes

VERSION = 1
"""Part of every index's name: raise it when another set of files counts as readable."""
AT_ONCE = 1024
"""Pictures between two looks at the clock."""
SAVED_EVERY = 60.0
"""Seconds after which a pass that goes on is saved."""
NAMED = 8
"""Damaged pictures that an error says the reasons of."""


class Looked(NamedTuple):
    """What is known of each picture: whether it can be read, and its (height, width), int64 (N, 2)."""

    readable: NDArray[np.bool_]
    sizes: NDArray[np.int64]


def look_at(pictures: Pictures) -> Looked:
    """Read each picture that was not read before, or has changed since. All processes share the work, and call this
    together.

    What is known is kept by name, size and time of change, and saved whole or not at all, every minute and at the end.

    Raises:
        UserError: the processes see different pictures.
    """
    processes = Processes.current()
    keys = _keys(pictures)
    # Those of other machines may have other times of change.
    titles = "\n".join(pictures.title(index) for index in range(min(len(keys), AT_ONCE)))
    names = hashlib.sha256(titles.encode("utf-8", "surrogateescape"))
    number = int.from_bytes(names.digest()[:7], "little") + len(keys)
    if processes.max(number) != -processes.max(-number):
        raise UserError(f"the pictures of {pictures.name} are not the same ones for all processes; give every machine "
                        "the same ones at the same place")
    file = cache_folder("images") / f"index-{VERSION}-{json_sha256(pictures.place)[:32]}.npy"
    known = _read(file)
    rows = torch.from_numpy(_found(keys, known))
    # A process that sees other times of change than the main one knows as much as it does.
    rows = processes.on_main(lambda: rows)
    missing = (rows[:, 0] == 0).nonzero()[:, 0]
    if len(missing):
        if processes.is_main and not on_terminal():
            say(f"reading {len(missing):,} of {len(keys):,} pictures of {pictures.name} once")
        own = missing[processes.span(len(missing)).start : processes.span(len(missing)).stop]
        made = []
        bar = tqdm(total=len(own), desc="reading pictures once", unit="picture", leave=False,
                   disable=None if processes.is_main else True)
        with bar:
            for part in processes.together(lambda: list(_looked(pictures, own.tolist(), keys, file, bar))):
                made.append(part)
        rows[missing] = processes.rows(torch.cat([torch.zeros(0, 3, dtype=torch.int64), *made]))
        if processes.is_main:
            _save(file, keys, list(range(len(keys))), rows.numpy())
    values = rows.numpy()
    return Looked(values[:, 0] > 0, values[:, 1:])


def damaged(pictures: Pictures, places: NDArray[np.int64]) -> UserError:
    """A sentence that names the pictures at ``places`` and says what is wrong with the first of them."""
    reasons = []
    for index in places[:NAMED].tolist():
        try:
            pictures.open(index)
        except UserError as error:
            reasons.append(str(error).removesuffix("; replace or remove it"))
    more = f", and {listed([pictures.title(i) for i in places[NAMED : 2 * NAMED].tolist()])}" * (len(places) > NAMED)
    return UserError(f"{len(places):,} of {len(pictures):,} pictures of {pictures.name} cannot be used: "
                     f"{'; '.join(reasons)}{more}; replace or remove them, or leave such pictures out with "
                     "data_options.on_error=skip")


def _keys(pictures: Pictures) -> NDArray[np.int64]:
    """A hash of each picture's facts, (N,)."""
    digest = hashlib.blake2b
    values = b"".join(digest(os.fsencode(pictures.facts(index)), digest_size=8).digest()
                      for index in range(len(pictures)))
    return np.frombuffer(values, dtype="<i8").astype(np.int64)


def _looked(
    pictures: Pictures, places: list[int], keys: NDArray[np.int64], file: Path, bar: tqdm
) -> Iterator[torch.Tensor]:
    """(1 or -1, height, width) of each place, in parts (n, 3): whether the picture can be read, and its size."""

    def one(index: int) -> tuple[int, int, int]:
        try:
            image = pictures.open(index)
        except UserError:
            return -1, 0, 0
        return 1, image.height, image.width

    saved, done = time.monotonic(), []
    main = Processes.current().is_main
    with ThreadPoolExecutor(max_workers=min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        for part in in_parts(len(places), AT_ONCE):
            rows = torch.tensor(list(pool.map(one, places[part.start : part.stop])), dtype=torch.int64)
            done.append(rows)
            bar.update(len(rows))
            if main and time.monotonic() - saved > SAVED_EVERY:
                _save(file, keys, places[: part.stop], torch.cat(done).numpy())
                saved = time.monotonic()
            yield rows


def _read(file: Path) -> NDArray[np.int64]:
    """(key, height, width) of pictures that can be read, (N, 3), by rising key."""
    nothing = np.zeros((0, 3), dtype=np.int64)
    if not in_cache(file):
        return nothing
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # a damaged index is made again
        return nothing
    return values if values.dtype == np.int64 and values.ndim == 2 and values.shape[1] == 3 else nothing


def _found(keys: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """(1 where it is known, else 0; height, width) of each key, (N, 3)."""
    found = np.zeros((len(keys), 3), dtype=np.int64)
    if len(known):
        places = np.searchsorted(known[:, 0], keys).clip(max=len(known) - 1)
        found[:, 0] = known[places, 0] == keys
        found[:, 1:] = known[places, 1:] * found[:, :1]
    return found


def _save(file: Path, keys: NDArray[np.int64], places: list[int], rows: NDArray[np.int64]) -> None:
    """Keep what is known of pictures that can be read; a damaged one is looked at again, one that is gone forgotten.

    Args:
        keys: of all pictures.
        places: of those that ``rows`` are about.
    """
    good = rows[:, 0] > 0
    values = np.concatenate([keys[places][good, None], rows[good, 1:]], axis=1)
    both = np.concatenate([values, _read(file)])
    _, first = np.unique(both[:, 0], return_index=True)
    kept = both[first]
    content = io.BytesIO()
    np.save(content, kept[np.isin(kept[:, 0], keys)])
    write_cache(file, content.getvalue(), "sizes of the pictures")
