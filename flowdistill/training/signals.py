"""SIGTERM and SIGINT as a wish to stop after the current step, to which all processes agree.

No library that flowdistill uses has it: launchers kill what does not stop by itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

GRACE = 2.0
"""Seconds in which a second signal is taken for the first one's echo: launchers pass on what the terminal sent too."""


class Interrupts:
    """While entered, the first signal is noted and a later one acts at once, as it did before.

    Signals can be caught in the main thread only; elsewhere this does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device, world: int) -> int:
        """The signal that any process received, 0 for none; with several processes a collective, which waits."""
        if world == 1:
            return self.received
        flag = torch.tensor(self.received, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
        elif now - self._since > GRACE:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
