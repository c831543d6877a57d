"""The memory that code takes, as torch's allocator for the CPU gives it out."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from tests.quick import usual_kernels

BACKWARD = "backward"


def real_peak(update: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at once during ``update()``, by torch's profiler."""
    return real_peaks(update)[1]


def real_peaks(update: Callable[[], object]) -> tuple[int, int]:
    """The most before it comes to a ``torch.profiler.record_function(BACKWARD)``, and the most in all."""
    gc.collect()
    with (
        usual_kernels(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        update()
    events = profile.profiler.kineto_results.events()
    start = min((event.start_ns() for event in events if event.name() == BACKWARD), default=None)
    alive = highest = ahead = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
        if start is None or event.start_ns() < start:
            ahead = highest
    return ahead, highest
