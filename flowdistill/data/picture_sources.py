"""What stored pictures have in common, wherever they are stored: an order, a name each, captions and labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.text import text_of

CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Where captions are looked for, in this order, if no column is named."""
LABEL_COLUMNS = ("label",)
SIDECAR, FOLDER = "sidecar", "folder"
"""Captions in text files, labels by subfolder: what may be named instead of a column."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE)
"""A text that is a number and so no name; not "nan" and "inf", which float takes too."""

Label = int | str


class Labels(NamedTuple):
    """A label of each picture, None where it has none, and the names of 0, 1, ... where the source says them."""

    values: list[Label | None]
    names: Sequence[str] | None = None


class Pictures(Protocol):
    """Pictures in a fixed order, each of which is read alone.

    Attributes:
        name: what the user has named.
        place: what tells them from others on this machine.
        left_out: what looks like pictures and is not read, in words.
        options: the fields of ``DataOptions`` that mean something here.
    """

    name: str
    place: str
    left_out: str | None
    options: frozenset[str]

    def __len__(self) -> int: ...

    def title(self, index: int) -> str:
        """Words for a picture."""

    def facts(self, index: int) -> str:
        """What changes when a picture does: its name, size and time of change."""

    def open(self, index: int) -> Image.Image:
        """A picture as it is meant to be seen, grey or RGB.

        Raises:
            UserError: it cannot be read.
        """

    def captions(self, column: str | None) -> list[list[str]] | None:
        """The captions of each picture; None where there is no place for captions.

        Raises:
            UserError: no such column, or what is in it is no caption.
        """

    def labels(self, column: str | None) -> Labels | None:
        """The same of labels."""


def chosen_column(names: Iterable[str], column: str | None, usual: Sequence[str], source: str, key: str) -> str | None:
    """The column that is named, or the first of the usual ones that is there; None without any.

    Args:
        key: of ``DataOptions``, for errors.

    Raises:
        UserError: there is no such column.
    """
    there = list(names)
    if column is None:
        return next((name for name in usual if name in there), None)
    if column not in there:
        raise UserError(f"{source} has no column '{column}', but {listed(there) or 'none'}; name one in "
                        f"data_options.{key}")
    return column


def captions_of(value: object, where: str) -> list[str]:
    """The captions in a value: a text, or a list of texts; none where it is null or blank.

    Raises:
        UserError: it is something else.
    """
    try:
        texts = [] if value is None else [text_of(one) for one in (value if isinstance(value, list) else [value])]
    except ValueError:
        raise UserError(f"{where} has {shown(value)} for a caption; it must be a text, or a list of texts") from None
    return [text.strip() for text in texts if text.strip()]


def label_of(value: object, where: str) -> Label | None:
    """A label: a whole number or a name; None where it is null or blank.

    Raises:
        UserError: it is something else.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(f"{where} has {shown(value)} for a label; it must be a whole number or a name")
    return value.strip() if isinstance(value, str) else value


def class_numbers(
    labels: Labels, classes: Sequence[str] | None, count: int, source: str, title: Callable[[int], str] | None = None
) -> list[int]:
    """Labels as a teacher of ``count`` classes has them, -1 for none.

    ``classes`` are the names of 0, 1, ...; without them, numbers and texts that are whole numbers ("1", "+1", "1.0")
    are labels, names of a table's own classes have its numbers, and other names stand in the order of the alphabet, if
    there are as many as the teacher has classes. In a table that names its classes, -1 stands for no label, as it does
    in the sets of the hub.

    Args:
        title: words for a picture by its place, for errors.

    Raises:
        UserError: a name that is none of ``classes``; two equal names in ``classes``, or more than the teacher has
            classes; another number of names than that; numbers among names, negative numbers or fractions; or a label
            that the table or the teacher does not have.
    """
    if classes is not None:
        _check_names(classes, count)
    values: list[Label | None] = list(labels.values)
    numbers: dict[Label, int]

    def has(value: Label) -> str:
        place = values.index(value)
        return f"{source} has the label {value}" + ("" if title is None else f" ({title(place)})")

    if labels.names is not None:
        values = [None if value == -1 else value for value in values]
        for value in values:
            if isinstance(value, int) and not 0 <= value < len(labels.names):
                raise UserError(f"{has(value)}, and its own labels are 0 to {len(labels.names) - 1} "
                                f"({listed(labels.names)})")
        if classes is not None:
            values = [labels.names[value] if isinstance(value, int) else value for value in values]
        elif len(labels.names) != count:
            raise UserError(f"{source} has {len(labels.names)} classes ({listed(labels.names)}), and the teacher "
                            f"{count}; name all of the teacher's in data_options.classes, in the order of its labels")
    there = list(dict.fromkeys(value for value in values if value is not None))
    if classes is not None:
        known = {name: number for number, name in enumerate(classes)}
        unknown = sorted({str(value) for value in there} - set(classes))
        if unknown:
            raise UserError(f"{source} has the labels {listed(unknown)}, which data_options.classes does not name")
        numbers = {value: known[str(value)] for value in there}
    else:
        named = [value for value in there if isinstance(value, str) and not _NUMBER.fullmatch(value)]
        numbered = [value for value in there if isinstance(value, int) or _NUMBER.fullmatch(value)]
        if named and numbered:
            raise UserError(f"{has(numbered[0])}, a number, and {has(named[0]).removeprefix(source + ' has ')}, a "
                            "name; use only one of the two, or name all of them in data_options.classes, in the order "
                            "of the teacher's labels")
        if named:
            ordered = sorted(named)
            if len(ordered) != count:
                raise UserError(f"{source} has {len(ordered)} classes ({listed(ordered)}), and the teacher {count}; "
                                "name all of them in data_options.classes, in the order of the teacher's labels")
            numbers = {name: number for number, name in enumerate(ordered)}
        else:
            numbers = {}
            for value in numbered:
                number = value if isinstance(value, int) else float(value)
                if number not in range(count):
                    raise UserError(f"{has(value)}, and the teacher has the labels 0 to {count - 1}")
                numbers[value] = int(number)
    return [-1 if value is None else numbers[value] for value in values]


def _check_names(classes: Sequence[str], count: int) -> None:
    twice = [name for name, times in Counter(classes).items() if times > 1]
    if twice:
        raise UserError(f"data_options.classes names {listed(twice)} more than once; each label needs a name of its "
                        "own")
    if len(classes) > count:
        raise UserError(f"data_options.classes has {len(classes)} names, and the teacher {count} classes; name only "
                        "those")
