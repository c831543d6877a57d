"""What a seed may be, for every part that takes one; torch is not needed to know it."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from flowdistill.utils.errors import UserError, shown

SEEDS = 2**64
"""Seeds are 0 to 2^64 - 1, each different from every other."""


def check_seed(seed: SupportsIndex, name: str = "the seed") -> int:
    """``seed`` as a Python integer; UserError, with ``name`` in it, for anything but an integer of 0 to 2^64 - 1."""
    try:
        number = operator.index(seed)
    except TypeError:
        raise UserError(f"{name} must be an integer, not {shown(seed)}") from None
    if not 0 <= number < SEEDS:
        raise UserError(f"{name} must be an integer from 0 to 2**64 - 1 ({SEEDS - 1}), not {shown(number)}")
    return number
