"""What an evaluation measured: rows of a table, their protocol, JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowdistill.utils.files import atomic_write


@dataclass
class Row:
    """One model at one number of network calls. None: not measured.

    ``fid``, ``kid``: lower is better. ``accuracy``: share of images, in [0, 1], that the classifier takes for the
    class asked for. ``images_per_second``: sampling only, over all processes. ``per_class_fid``: by class label.
    ``precision``, ``recall``: in [0, 1], higher is better; see ``precision_recall``.

    Of students: ``stored_parameters`` of all networks and ``active_parameters`` of the largest that makes one image; of
    several students with classes, ``per_part_fid`` by student.
    """

    model: str
    calls: int | None
    fid: float | None = None
    kid: float | None = None
    accuracy: float | None = None
    images_per_second: float | None = None
    per_class_fid: dict[str, float | None] | None = None
    precision: float | None = None
    recall: float | None = None
    per_part_fid: dict[str, float | None] | None = None
    stored_parameters: int | None = None
    active_parameters: int | None = None


@dataclass
class Report:
    """The rows of one evaluation and how they were measured; ``str(report)`` is the table."""

    rows: list[Row]
    num_images: int
    features: str
    reference: str
    seed: int
    fid_floor: float | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON shape of ``evaluate --json`` and ``report.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The inverse of ``to_dict``; keys that are not known are left out."""
        known = {item.name for item in dataclasses.fields(cls)}
        columns = {item.name for item in dataclasses.fields(Row)}
        rows = [Row(**{name: value for name, value in row.items() if name in columns}) for row in values["rows"]]
        return cls(**{**{name: value for name, value in values.items() if name in known}, "rows": rows})

    def write_json(self, path: str | os.PathLike) -> None:
        """Write the report, complete or not at all."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        with atomic_write(path) as file:
            file.write(text.encode())

    @classmethod
    def read_json(cls, path: str | os.PathLike) -> Report:
        """Read what ``write_json`` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def table(self) -> str:
        """The rows as aligned text, one line a row, ``-`` for what was not measured, then the floor."""
        header = ["model", "calls", "FID", "KID x 1000", "precision", "recall", "accuracy", "images/s"]
        lines = [
            [
                row.model,
                _cell(row.calls, "d"),
                _cell(row.fid, ".3f"),
                _cell(None if row.kid is None else 1000.0 * row.kid, ".3f"),
                _cell(row.precision, ".3f"),
                _cell(row.recall, ".3f"),
                _cell(row.accuracy, ".2%"),
                _cell(row.images_per_second, ".1f"),
            ]
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
        text = []
        for line in [header, *lines]:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        text.insert(1, "-" * len(text[0]))
        for row in self.rows:
            if row.per_part_fid is not None:
                parts = ", ".join(f"{part}: {_cell(fid, '.3f')}" for part, fid in row.per_part_fid.items())
                text.append(f"{row.model}, {_cell(row.calls, 'd')} calls, FID of each student's part: {parts}")
            if row.stored_parameters != row.active_parameters:
                text.append(f"{row.model}: {row.stored_parameters:,} parameters stored, {row.active_parameters:,} used "
                            "for an image")
        text.append(f"{self.num_images} images, features {self.features}, reference {self.reference}, seed {self.seed}")
        copies = self.protocol.get("kid_of_copies")
        if copies is not None and any(row.kid is not None and row.kid < 0 for row in self.rows):
            text.append(f"KID x 1000 of a model that only copies the reference's images: {1000 * copies:.3f}; figures "
                        "well below 0 are a sign of copying")
        if self.fid_floor is not None:
            text.append(f"FID of two random halves of the reference: {self.fid_floor:.3f}")
        return "\n".join(text)

    def protocol_text(self) -> str:
        """How it was measured, one ``name: value`` a line."""
        width = max((len(name) for name in self.protocol), default=0)
        return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in self.protocol.items())

    def __str__(self) -> str:
        return self.table()


def _cell(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)
