"""How large numbers may be that somebody sets, for every part that takes some; torch is not needed to know it."""

LARGEST_INTEGER = 2**63 - 1
"""Of 64 bits, as torch and files have integers."""
LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32, in which networks and what is added to them are computed: about 3.4e38."""
MOST_CALLS = 1_000_000
"""Of a network for one image. The times of all of them are in memory, and no sampler gets better by as many."""
