"""Distil any diffusers pipeline into a one-step generator that stock diffusers loads.

The names below load on first use, so that ``import flowdistill`` costs neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from flowdistill.utils.errors import UserError

if TYPE_CHECKING:
    from flowdistill.conditioning.conditions import Condition
    from flowdistill.evaluation.evaluate import evaluate
    from flowdistill.students import load_student
    from flowdistill.teachers import load_teacher
    from flowdistill.training.run import distill

# peft imports bitsandbytes where it is installed, which then says on every start of some processors that an optional
# kernel is missing. Setting a level imports nothing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

__all__ = ["Condition", "UserError", "__version__", "distill", "evaluate", "load_student", "load_teacher"]

_HOMES = {
    "Condition": "flowdistill.conditioning.conditions",
    "distill": "flowdistill.training.run",
    "evaluate": "flowdistill.evaluation",
    "load_student": "flowdistill.students",
    "load_teacher": "flowdistill.teachers",
}
_PARTS = frozenset("config data evaluation export features methods objectives paths students teachers training".split())


# Where it is installed, diffusers imports bitsandbytes, which says on some CPUs that it has not downloaded a kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PARTS})
