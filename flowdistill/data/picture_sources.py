"""What stored pictures have in common, wherever they are stored: an order, a name each, captions and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.text import text_of

CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Where captions are looked for, in this order, if no column is named."""
LABEL_COLUMNS = ("label",)
SIDECAR, FOLDER = "sidecar", "folder"
"""Captions in text files, labels by subfolder: what may be named instead of a column."""

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


def class_numbers(labels: Labels, classes: Sequence[str] | None, count: int, source: str) -> list[int]:
    """Labels as a teacher of ``count`` classes has them, -1 for none.

    ``classes`` are the names of 0, 1, ...; without them, numbers and names that are numbers are labels, names of a
    table's own classes have its numbers, and other names stand in the order of the alphabet, if there are as many as
    the teacher has classes.

    Raises:
        UserError: a name that is none of ``classes``, another number of names than the teacher has classes, or a label
            that it does not have.
    """
    values: list[Label | None] = list(labels.values)
    if classes is not None and labels.names is not None:
        values = [labels.names[value] if isinstance(value, int) else value for value in values]
    elif labels.names is not None and len(labels.names) != count:
        raise UserError(f"{source} has {len(labels.names)} classes ({listed(labels.names)}), and the teacher {count}; "
                        "name all of the teacher's in data_options.classes, in the order of its labels")
    there = {value for value in values if value is not None}
    texts = {value for value in there if isinstance(value, str)}
    numbers: Mapping[Label, int] = {}
    if classes is not None:
        numbers = {name: number for number, name in enumerate(classes)}
        unknown = sorted({str(value) for value in there} - set(classes))
        if unknown:
            raise UserError(f"{source} has the labels {listed(unknown)}, which data_options.classes does not name")
        numbers = {value: numbers[str(value)] for value in there}
    elif texts and all(text.isdecimal() for text in texts):
        numbers = {value: int(value) for value in there}
    elif texts:
        ordered = sorted(str(value) for value in there)
        if len(ordered) != count:
            raise UserError(f"{source} has {len(ordered)} classes ({listed(ordered)}), and the teacher {count}; name "
                            "all of them in data_options.classes, in the order of the teacher's labels")
        numbers = {name: number for number, name in enumerate(ordered)}
    else:
        numbers = {value: int(value) for value in there}
    outside = sorted(number for number in numbers.values() if not 0 <= number < count)
    if outside:
        raise UserError(f"{source} has the label {outside[0]}, and the teacher has the labels 0 to {count - 1}")
    return [-1 if value is None else numbers[value] for value in values]
