"""Errors that a user can act on, and the values in their sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable

VALUE = 80  # characters of a value that a sentence repeats
WORD = 400  # characters of a word, so that the paths of deep folders stay whole
NAMES = 16  # names that a sentence lists


class UserError(ValueError):
    """Bad input from outside: one sentence that says what is wrong, where, and what would be right.

    The command line prints the sentence without a traceback and exits with code 2; Python callers catch it as a
    ``ValueError``. Line breaks are escaped and words of more than 400 characters shortened; :func:`shown` and
    :func:`listed` shorten the rest.
    """

    def __init__(self, sentence: object = "") -> None:
        super().__init__(sentence_of(str(sentence)))


def sentence_of(text: str) -> str:
    """``text`` in one line, with the middle of its very long words left out, such as of a mistyped path of 5,000
    characters."""
    return re.sub(rf"\S{{{WORD + 1},}}", lambda word: shortened(word[0], WORD), one_line(text))


def one_line(text: str) -> str:
    """``text`` with its line breaks and control characters, which names of files have too, as Python writes them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def shortened(text: str, most: int = VALUE) -> str:
    """``text``, or its two ends in at most about ``most`` characters, and how long it is."""
    if len(text) <= most:
        return text
    return f"{text[: 2 * most // 3]}...{text[-(most // 4):]} ({len(text):,} characters)"


def shown(value: object, most: int = VALUE, quoted: bool = True) -> str:
    """A value in a sentence, shortened; ``quoted``: as Python writes it, else as a text is printed."""
    return shortened(repr(value) if quoted else str(value), most)


def listed(names: Iterable[object], most: int = NAMES) -> str:
    """Names in a sentence, separated by commas; of many, the first ones and how many more there are."""
    texts = [shortened(str(name)) for name in names]
    rest = len(texts) - most
    return ", ".join(texts) if rest <= 0 else f"{', '.join(texts[:most])} and {rest:,} more"
