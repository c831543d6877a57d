"""The command line's parser, and what its arguments are read by."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from flowdistill.utils.errors import sentence_of, shown
from flowdistill.utils.numbers import LARGEST, LARGEST_INTEGER
from flowdistill.utils.seeds import SEEDS

SETTING = "key=value"
"""How an argument is shown that takes settings."""


class Parser(argparse.ArgumentParser):
    """argparse with this command's own form of an error, without the usage text before it, and without abbreviations:
    what is nearly the name of an option is an error, not another option. An argument may be an empty text where its
    ``type`` is ``str``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))
        self.register("type", None, given)  # of every argument without a type of its own

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, which takes the arguments without a name of one place only: where the last of them may be
        many, those behind an option belong to it too. ``key=value`` settings are known by their form."""
        known, rest = super().parse_known_args(args, namespace)
        nameless = self._positionals._group_actions
        many = next((action for action in nameless if action.nargs in ("*", "+")), None)
        if many is None or any(text.startswith("-") or many.metavar == SETTING and "=" not in text for text in rest):
            return known, rest
        try:
            setattr(known, many.dest, [*getattr(known, many.dest), *map(given, rest)])
        except argparse.ArgumentTypeError as error:
            self.error(f"argument {many.metavar}: {error}")
        return known, []

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flowdistill: error: {sentence_of(message)} (see '{self.prog} --help')\n")


def given(text: str) -> str:
    """A text that is not empty: an empty path would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be an empty text")
    return text


def texts(text: str) -> list[str]:
    """Texts separated by commas, none of them empty."""
    parts = text.split(",")
    if "" in parts:
        raise argparse.ArgumentTypeError(f"must be texts separated by commas, none of them empty, not {shown(text)}")
    return parts


def at_least(low: int, most: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """A converter of texts to integers from ``low`` to ``most``."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, not {shown(text)}") from None
        if number < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {shown(number)}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, not {shown(number)}")
        return number

    return convert


def seed_number(below: int = SEEDS) -> Callable[[str], int]:
    """Of a seed: an integer from 0 on, below 2^64 or a smaller number."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = -1
        if not 0 <= number < below:
            largest = f"2**{below.bit_length() - 1} - 1 ({below - 1})"
            raise argparse.ArgumentTypeError(f"must be an integer from 0 to {largest}, not {shown(text, quoted=False)}")
        return number

    return convert


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, not {shown(text)}")
    return number


def positives(text: str) -> list[float]:
    """Finite numbers above 0, separated by commas."""
    return [positive(part) for part in text.split(",")]


def image_size(text: str) -> int | list[int]:
    """The side of a square in pixels (1024), or height and width (832x1216)."""
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(
            side.strip().isdecimal() and len(side) < 10 and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be the side of a square in pixels, such as 1024, or height x width, "
                                         f"such as 832x1216, not {shown(text)}")
    return int(sides[0]) if len(sides) == 1 else [int(side) for side in sides]


def guidance(text: str) -> float:
    """A guidance scale: a finite number of 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {shown(text)}")
    if number > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST:.1e}, not {shown(text)}")
    return number


def integers(low: int, most: int = LARGEST_INTEGER) -> Callable[[str], list[int]]:
    """A converter of texts to lists of integers from ``low`` to ``most``, separated by commas."""

    def convert(text: str) -> list[int]:
        parts = text.split(",")
        digits = all(part.strip().isdecimal() for part in parts)
        if digits and any(len(part.strip().lstrip("0")) > len(str(most)) or int(part) > most for part in parts):
            raise argparse.ArgumentTypeError(f"must be integers of at most {most:,}, not {shown(text)}")
        if not digits or any(int(part) < low for part in parts):
            raise argparse.ArgumentTypeError(f"must be integers of at least {low} such as 1,2,4, not {shown(text)}")
        return [int(part) for part in parts]

    return convert
