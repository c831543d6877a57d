"""Memory that one training step on the CPU frees is kept for the next one."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of mallopt(3), from glibc's malloc.h, and the largest values it takes.
TRIM_THRESHOLD, LARGEST_TRIM_THRESHOLD = -1, 2**31 - 1
MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = -3, 32 * 2**20
OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to give freed memory back to the system; True when it was told so.

    A step frees its activations, and by default malloc returns most of them to the system, which must hand out and
    clear every page again in the next step. Where several networks are alive at once (score distillation) that was 5 to
    9 % of a step on two cores. The price is that the process keeps its peak. It holds for the whole process; blocks
    above 32 MiB, other systems and other allocators stay as they are, and so does a choice in malloc's own environment
    variables.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN_CHOICE):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((TRIM_THRESHOLD, LARGEST_TRIM_THRESHOLD), (MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
    return all([mallopt(name, value) == 1 for name, value in settings])
