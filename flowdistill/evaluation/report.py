"""What an evaluation measured: rows of a table, their protocol, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flowdistill.config.checks import shown
from flowdistill.evaluation.metrics import ARROWS, Column, all_metrics
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, local_path
from flowdistill.utils.text import JsonObject, check_json_place, read_json_object

DIRECTIONS = f"{ARROWS['lower'].strip()} lower is better, {ARROWS['higher'].strip()} higher is better"
ABOUT_FLOOR = ("That is what perfect images come to with half as many on either side; with more the figure falls, so "
               "rows may be below it")


@dataclass(init=False)
class Row:
    """One model at one number of network calls, with what was measured of it.

    Every figure of a known metric is an attribute, such as ``row.fid``, and a key in JSON; None: not measured.

    Attributes:
        model: what it is called.
        calls: network calls of an image; None where they are not known.
        images_per_second: sampling only, over all processes.
        stored_parameters: of all networks of a student.
        active_parameters: of the largest network that makes one image.
        figures: by name, see :mod:`flowdistill.evaluation.metrics`.
    """

    model: str
    calls: int | None
    images_per_second: float | None
    stored_parameters: int | None
    active_parameters: int | None
    figures: JsonObject

    def __init__(
        self,
        model: str,
        calls: int | None,
        images_per_second: float | None = None,
        stored_parameters: int | None = None,
        active_parameters: int | None = None,
        **figures: object,
    ) -> None:
        self.model, self.calls, self.images_per_second = model, calls, images_per_second
        self.stored_parameters, self.active_parameters = stored_parameters, active_parameters
        self.figures = {name: value for name, value in figures.items() if value is not None}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "figures":  # asked for while the object is being restored
            raise AttributeError(name)
        if name in self.figures or any(name in metric.figures for metric in all_metrics()):
            return self.figures.get(name)
        raise AttributeError(f"a row has no {name!r}, and no known metric measures it")

    def to_dict(self) -> JsonObject:
        """JSON values, null for what was not measured."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "figures"}
        known = [name for metric in all_metrics() for name in metric.figures]
        return values | {name: self.figures.get(name) for name in [*known, *self.figures]}


def check_report_place(path: str | os.PathLike[str]) -> None:
    """Refuse a file to write a report to that could not be written, or that is there and is no report, of this or
    another version.

    Raises:
        UserError: so.
    """
    keys = ("rows", "num_images", "features", "reference", "seed")
    check_json_place(path, keys, "the report of an evaluation")


@dataclass
class Report:
    """The rows of one evaluation and how they were measured; ``str(report)`` is the table."""

    rows: list[Row]
    num_images: int
    features: str | None
    reference: str | None
    seed: int
    fid_floor: float | None = None
    protocol: JsonObject = field(default_factory=dict)

    def to_dict(self) -> JsonObject:
        """The JSON shape of ``evaluate --json`` and ``report.json``."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, values: JsonObject) -> Report:
        """The inverse of ``to_dict``; keys that are not known are left out."""
        known = {item.name for item in dataclasses.fields(cls)}
        rows = [Row(**row) for row in values["rows"]]
        return cls(**{**{name: value for name, value in values.items() if name in known}, "rows": rows})

    def write_json(self, path: str | os.PathLike) -> None:
        """Write the report, complete or not at all."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        with atomic_write(path) as file:
            file.write(text.encode())

    @classmethod
    def read_json(cls, path: str | os.PathLike) -> Report:
        """Read what ``write_json`` wrote.

        Raises:
            UserError: there is no such file, or it holds something of which no table can be made.
        """
        values = read_json_object(path)
        try:
            report = cls.from_dict(values)
            report._check()
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            # The message of a KeyError is the key alone.
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) and error.args else str(error)
            raise UserError(f"{local_path(path)} is no report of an evaluation, or one of another version: "
                            f"{reason}") from error
        return report

    def _check(self) -> None:
        """ValueError, TypeError or another error where what a file gave is not what a report has."""
        for name, number in (("num_images", self.num_images), ("seed", self.seed)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"{name} is {shown(number)}")
        for name, text in (("features", self.features), ("reference", self.reference)):
            if not isinstance(text, (str, type(None))):
                raise ValueError(f"{name} is {shown(text)}")
        if not isinstance(self.protocol, dict):
            raise ValueError(f"protocol is {shown(self.protocol)}")
        for row in self.rows:
            if not isinstance(row.model, str):
                raise ValueError(f"model is {shown(row.model)}")
            if row.calls is not None and (isinstance(row.calls, bool) or not 1 <= row.calls < 2**63):
                raise ValueError(f"calls is {shown(row.calls)}")
            for name, value in (("fid_floor", self.fid_floor), *row.to_dict().items()):
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name} is {value}")
        self.table()  # whatever else stands in it, a table and its remarks can be made of it

    def cells(self) -> list[list[str]]:
        """The head of the table and its rows, as texts; ``-`` for what was not measured."""
        shown = [(metric.head(column), column) for metric in all_metrics() for column in metric.shown(self.protocol)
                 if metric.default and metric.position < 100
                 or any(row.figures.get(column.name) is not None for row in self.rows)]
        columns = [column for _, column in shown]
        header = ["model", "calls", *(head for head, _ in shown), f"images/s{ARROWS['higher']}"]
        lines = [
            [
                row.model,
                _cell(row.calls, "d"),
                *(_figure(row, column) for column in columns),
                _cell(row.images_per_second, ".1f"),
            ]
            for row in self.rows
        ]
        return [header, *lines]

    def remarks(self) -> list[str]:
        """The lines under the table."""
        text = []
        for row in self.rows:
            if row.stored_parameters != row.active_parameters:
                text.append(f"{row.model}: {row.stored_parameters:,} parameters stored, {row.active_parameters:,} used "
                            "for an image")
        notes = [*self.protocol.get("teacher_remarks", []), self.protocol.get("pipeline_note")]
        text += [f"teacher: {note}" for note in notes if note]
        measured_with = [f"{what} {name}" for what, name in (("features", self.features), ("reference", self.reference))
                         if name is not None]
        text.append(", ".join([f"{self.num_images} images", *measured_with, f"seed {self.seed}"]) + f"; {DIRECTIONS}")
        text += lines_of(self.protocol)
        if self.protocol.get("note"):
            text.append(self.protocol["note"])
        if self.protocol.get("rows_not_measured_here"):
            text += ["not measured here:", *(f"  {row}" for row in _by_origin(self.protocol["rows_not_measured_here"]))]
        if self.protocol.get("rows_not_finite"):
            rows = "; ".join(_by_origin(self.protocol["rows_not_finite"]))
            text.append("not measured, for the images are not finite (the model diverged, or overflows in its "
                        f"precision): {rows}")
        if self.protocol.get("not_measured"):
            text.append(self.protocol["not_measured"])
        for metric in all_metrics():
            text += metric.remarks(self.rows, self.protocol)
        if self.fid_floor is not None:
            distance = self.protocol.get("distance", "FID")
            text.append(f"{distance} of two random halves of the reference: {self.fid_floor:.3f}. {ABOUT_FLOOR}")
        return text

    def table(self) -> str:
        """The rows as aligned text, one line a row, then the remarks."""
        cells = self.cells()
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        text = []
        for line in cells:
            aligned = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            text.append("  ".join([line[0].ljust(widths[0]), *aligned[1:]]))
        text.insert(1, "-" * len(text[0]))
        return "\n".join([*text, *self.remarks()])

    def protocol_text(self) -> str:
        """How it was measured, one ``name: value`` a line."""
        width = max((len(name) for name in self.protocol), default=0)
        return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in self.protocol.items())

    def __str__(self) -> str:
        return self.table()


def lines_of(entries: JsonObject) -> list[str]:
    """A claim in words, a line each; none where ``entries``, a report's protocol, has no claim."""
    if "protocol" not in entries:
        return []
    if entries["protocol"] is not None:
        lines = [f"protocol {entries['protocol']}"]
    else:
        lines = [f"not the protocol {entries['protocol_tried_out']}, but what it comes to where "
                 f"{'; '.join(entries['protocol_departures'])}"]
    order = ("source", "images", "captions", "reference", "resize", "figures", "free")
    return lines + [f"  {name}: {entries[f'protocol_{name}']}" for name in order
                    if entries.get(f"protocol_{name}") is not None]


def _by_origin(entries: Sequence[str]) -> list[str]:
    """Sentences 'teacher at 4 calls: from the cache, ...', those of one origin as one line."""
    rows: dict[str, list[str]] = {}
    for entry in entries:
        found = re.fullmatch(r"(.* at \d+ calls?): (.*)", entry, re.S)
        name, origin = found.groups() if found else (entry, "")
        rows.setdefault(origin, []).append(name)
    return [", ".join(names) + (f": {origin}" if origin else "") for origin, names in rows.items()]


def _figure(row: Row, column: Column) -> str:
    """A figure with its standard deviation, where there is one, without a space: a cell is one word."""
    value = _cell(row.figures.get(column.name), column.form, column.scale)
    std = None if column.spread is None else row.figures.get(column.spread)
    return value if std is None or value == "-" else f"{value}±{_cell(std, column.form, column.scale)}"


def _cell(value: float | int | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value if scale == 1 else scale * value, form)
