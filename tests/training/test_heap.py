"""What malloc does with the memory of a step."""

import os
import platform
import subprocess
import sys

import pytest

from flowdistill.training import malloc as heap

STEPS = """
import resource, runpy, sys

def step(blocks, size):  # in MiB; all are alive together and freed at once
    return [b"x" * int(size * 2**20) for _ in range(blocks)]

if sys.argv[1] == "keep":
    assert runpy.run_path(sys.argv[2])["keep_freed_memory"]()
step(100, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in (2, 2.5, 3, 3.5, 4):
    step(20, size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings; elsewhere nothing is set")
def test_a_step_reuses_the_memory_of_the_last_one():
    """Counted in page faults, in a process without torch, whose import would change malloc's mind.

    Blocks larger than any before are what malloc by default takes from the system and gives back: 76,800 pages of 4 KiB
    in all. Whether it gives back smaller ones depends on what lies beside them.
    """
    environment = {name: value for name, value in os.environ.items() if name not in heap.OWN_CHOICE}
    faults = {}
    for mode in ("keep", "leave"):
        command = [sys.executable, "-c", STEPS, mode, heap.__file__]
        faults[mode] = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert faults["leave"] > 0 and faults["keep"] < faults["leave"] / 10, faults


def test_a_choice_of_ones_own_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("malloc was told something"))
    assert not heap.keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep_freed_memory()
