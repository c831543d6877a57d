"""The end of a process that a launcher started beside others, or that serves until a signal comes."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn


def exit_process(code: int) -> NoReturn:
    """End the process with this exit code, as ``sys.exit`` does, but safely where gloo connects several processes.

    gloo's threads race with the interpreter's end: whether the group is closed first or left open, some processes abort
    (SIGABRT, "terminate called without an active exception") after all their work is done, and the launcher reports a
    failure. So such a process flushes what it has written and ends without the interpreter's clean-up. Call it last,
    when files and trackers are closed. nccl has no such race and wants its group closed.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    if distributed.get_backend() != "gloo":
        distributed.destroy_process_group()
        sys.exit(code)
    exit_at_once(code)


def exit_at_once(code: int) -> NoReturn:
    """End the process with this exit code, whatever its other threads are at: the interpreter's clean-up would wait for
    those of them that are no daemons. What was written is flushed; nothing else is closed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class EndSignals:
    """While entered, SIGINT and SIGTERM are noted and interrupt nothing; in the main thread only."""

    def __init__(self) -> None:
        self._received = 0

    def __enter__(self) -> EndSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """The number of the first that comes, or has come."""
        while not self._received:
            time.sleep(0.1)
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
