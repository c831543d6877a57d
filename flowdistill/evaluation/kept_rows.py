"""Rows of teachers, measured once for a protocol: read from the cache, or from those that are shipped.

A row is found by a hash of all that decides its figures: the images (weights, path, solver, steps, guidance,
conditions, seed, number) and how they are measured (features, resize, reference, metrics and their versions). What
decides only the last digits, such as the device and the version of torch, is written beside the row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.evaluation.generation import Sampler
from flowdistill.evaluation.report import Row
from flowdistill.teachers import Teacher
from flowdistill.teachers.codec import VaeCodec
from flowdistill.teachers.pairs import teacher_facts
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import cache_folder, in_cache, local_path, write_cache
from flowdistill.utils.hashing import json_sha256, module_sha256
from flowdistill.utils.processes import Processes
from flowdistill.utils.shipped import shipped_folder
from flowdistill.utils.text import JsonObject, read_json_object

# Part of every key: raise it when rows of a protocol mean something else than before.
VERSION = 1
SHIPPED = "teacher_rows.json"
"""In the folder ``assets``; ``scripts/measure_shipped_teachers.py`` makes it."""


@dataclass(frozen=True)
class KnownSampler:
    """A sampler whose images are the same whenever ``identity()`` is."""

    sampler: Sampler
    identity: Callable[[], str]

    def __call__(self, noise: Tensor, given: Tensor | Condition | None) -> Tensor:
        return self.sampler(noise, given)


class TeacherIdentity:
    """Hashes of what a teacher makes of a noise; its weights are hashed once."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def known(self, sampler: Sampler, *settings: float | str) -> Sampler:
        """``sampler`` with its identity, which ``settings`` and the teacher decide; without one where it has no
        weights, as a stand-in."""
        network = getattr(self.teacher, "network", None)
        return KnownSampler(sampler, lambda: self._hash(*settings)) if isinstance(network, nn.Module) else sampler

    @cached_property
    def _weights(self) -> list[object]:
        codec = self.teacher.codec
        facts: list[object] = [module_sha256(self.teacher.network), module_sha256(codec)]
        if isinstance(codec, VaeCodec):
            facts += [codec.scale, codec.shift, *codec.mean.flatten().tolist(), *codec.std.flatten().tolist()]
        return facts

    def _hash(self, *settings: float | str) -> str:
        # Nine digits: the last ones of a schedule may differ from machine to machine.
        facts = [*self._weights, *teacher_facts(self.teacher, *settings)]
        return json_sha256([f"{fact:.9g}" if isinstance(fact, float) else fact for fact in facts])

    def scheduler(self) -> str:
        """The pipeline's scheduler with its settings, for samples of the pipeline's own call."""
        config = dict(getattr(self.teacher.scheduler, "config", {}))
        settings = {name: repr(config[name]) for name in sorted(config) if not name.startswith("_")}
        return json.dumps([type(self.teacher.scheduler).__name__, settings])


@dataclass(frozen=True)
class KeptRow:
    """A row that was measured before.

    Attributes:
        row: its figures; of a shipped one without a speed, which is another machine's.
        made: what it was measured with: ``torch``, ``device``, ``processes``, ``batch_size``.
        shipped: whether it came with flowdistill.
    """

    row: Row
    made: JsonObject
    shipped: bool

    def __str__(self) -> str:
        by = f"torch {self.made.get('torch')} on {self.made.get('device')}"
        if self.shipped:
            return f"shipped, measured with {by}; images/s are measured here"
        return (f"from the cache, measured with {by}, {self.made.get('processes')} process(es), batches of "
                f"{self.made.get('batch_size')}")


class KeptRows:
    """The cache of rows.

    Args:
        folder: by default ``~/.cache/flowdistill/rows``.
        device: that the rows are measured on: a speed is that of a kind of device.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, device: torch.device) -> None:
        self.folder = local_path(folder or cache_folder("rows"))
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def find(self, key: str) -> KeptRow | None:
        """The row of a key, from the cache, else from those that are shipped; None where there is none, or a damaged
        one."""
        path = self._path(key)
        if in_cache(path):
            try:
                found = _read(read_json_object(path), key, shipped=False)
            except UserError:
                found = None
            if found is not None:
                return found
        return next((row for row in shipped_rows() if row.made.get("key") == key), None)

    def keep(self, key: str, row: Row, batch_size: int, figures: JsonObject | None = None) -> None:
        """Write a row whose speed was just measured; a folder that cannot be written to costs a warning.

        Args:
            figures: what its figures were measured with, of a shipped row; None: they are from here too.
        """
        entry = entry_of(key, row, self.device, batch_size)
        if figures is not None:
            entry["made"] |= {name: figures[name] for name in ("torch", "device") if name in figures}
        write_cache(self._path(key), (json.dumps(entry, indent=1) + "\n").encode(), "teacher's rows")

    def _path(self, key: str) -> Path:
        return self.folder / f"{json_sha256([key, self.device])[:32]}.json"


def entry_of(key: str, row: Row, device: str, batch_size: int) -> JsonObject:
    """A row as it is written."""
    figures = {name: value for name, value in row.to_dict().items() if value is not None}
    made = {"torch": torch.__version__, "device": device, "processes": Processes.current().world,
            "batch_size": batch_size}
    return {"key": key, "row": figures, "made": made}


def shipped_rows() -> list[KeptRow]:
    """The rows that came with flowdistill, without their speed."""
    file = shipped_folder("assets") / SHIPPED
    if not file.is_file():
        return []
    entries = read_json_object(file).get("rows", [])
    found = (_read(entry, str(entry.get("key")), shipped=True) for entry in entries)
    return [row for row in found if row is not None]


def _read(entry: JsonObject, key: str, shipped: bool) -> KeptRow | None:
    """What is in an entry; None where it is damaged, or another one's."""
    row, made = entry.get("row"), entry.get("made")
    if entry.get("key") != key or not isinstance(row, dict) or not isinstance(made, dict):
        return None
    if not isinstance(row.get("model"), str) or not all(isinstance(name, str) for name in row):
        return None
    if shipped:
        row = row | {"images_per_second": None}
    return KeptRow(Row(**row), made | {"key": key}, shipped)
