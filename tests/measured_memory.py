"""The memory that code takes, as torch's allocator for the CPU gives it out."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def real_peak(update: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at once during ``update()``, by torch's profiler."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        update()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest
