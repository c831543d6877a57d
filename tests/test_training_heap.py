"""What malloc does with the memory of a step."""

import os
import platform
import subprocess
import sys

import pytest

from flowdistill.training import heap

STEPS = """
import resource, sys, torch
from flowdistill.training.heap import keep_freed_memory

def step():
    return [torch.ones(2**20) for _ in range(20)]  # 80 MiB, freed at once

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings; elsewhere nothing is set")
def test_a_step_reuses_the_memory_of_the_last_one():
    """Counted in page faults: 20,480 pages of 4 KiB a step where they are given back."""
    environment = {name: value for name, value in os.environ.items() if name not in heap.OWN_CHOICE}
    faults = {}
    for mode in ("keep", "leave"):
        command = [sys.executable, "-c", STEPS, mode]
        faults[mode] = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert faults["keep"] < 500 and faults["keep"] < faults["leave"] / 2, faults


def test_a_choice_of_ones_own_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("malloc was told something"))
    assert not heap.keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep_freed_memory()
