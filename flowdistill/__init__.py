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

# diffusers and peft import packages where they are installed: bitsandbytes, which then says on every start of some
# processors that an optional kernel is missing, and torchao, of which torch says that it calls something deprecated and
# diffusers that it lacks classes which are not needed here. Setting a level imports nothing.
for _noisy in ("bitsandbytes.backends.cpu.ops", "torch.utils._pytree",
               "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

__version__ = "0.2.0"

__all__ = ["Condition", "UserError", "__version__", "distill", "evaluate", "load_student", "load_teacher"]

_HOMES = {
    "Condition": "flowdistill.conditioning.conditions",
    "distill": "flowdistill.training.run",
    "evaluate": "flowdistill.evaluation",
    "load_student": "flowdistill.students",
    "load_teacher": "flowdistill.teachers",
}
_PARTS = frozenset("config data evaluation export features methods objectives paths students teachers training".split())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PARTS})
