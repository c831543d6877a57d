"""The log, plain lines of progress, and loading models without the noise of their libraries."""

from __future__ import annotations

import logging as python_logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

_log = python_logging.getLogger("flowdistill")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A block without the bars of diffusers and transformers over a few files, their remarks on parts left out on
    purpose and on new words, and the warning of torch_dtype, the name every version knows."""
    both = logging, transformers_logging
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in both]
    for library in both:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            yield
    finally:
        for library, (shown, level) in zip(both, before, strict=True):
            library.set_verbosity(level)
            if shown:
                library.enable_progress_bar()


class _CutPrompts(python_logging.Filter):
    """Drops what diffusers and transformers say of each prompt that is too long; of the first a line says it."""

    said = False

    def filter(self, record: python_logging.LogRecord) -> bool:
        text = record.getMessage()
        if "was truncated because" not in text:
            return "Token indices sequence length is longer than" not in text
        if not self.said:
            self.said = True
            most = re.search(r"(\d+) tokens", text)
            log_once("some prompts are too long for a text encoder and lose their ends"
                     + (f": it reads {most[1]} tokens" if most else ""))
        return False


_cut_prompts = _CutPrompts()


@contextmanager
def cut_prompts_said_once() -> Iterator[None]:
    """A block in which one line says that prompts are too long for a text encoder, and not one for each."""
    libraries = [python_logging.getLogger(name) for name in ("diffusers", "transformers")]
    handlers = [handler for library in libraries for handler in library.handlers]
    for handler in handlers:
        handler.addFilter(_cut_prompts)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_cut_prompts)


def on_terminal() -> bool:
    """Whether standard error is a terminal, where a bar is redrawn; a log file gets plain lines by :func:`say`."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """A plain line of progress on standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def log_once(message: str) -> None:
    """Write one line to the log, from the first of all processes only."""
    if os.environ.get("RANK", "0") == "0":
        _log.warning(message)
