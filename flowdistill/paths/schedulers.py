"""Schedulers as they are saved in a pipeline folder."""

from __future__ import annotations

from pathlib import Path

import diffusers

from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.text import JsonObject, read_json_object

__all__ = ["load_scheduler", "make_scheduler", "path_from_scheduler"]


def load_scheduler(folder: Path) -> Scheduler:
    """The scheduler saved in ``folder``, of exactly the class its config names."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no scheduler_config.json, so the teacher's schedule is unknown")
    return make_scheduler(read_json_object(file), str(file))


def make_scheduler(config: JsonObject, place: str) -> Scheduler:
    """The scheduler of a configuration, of exactly the class that it names.

    Args:
        place: where the configuration is, for errors.

    Raises:
        UserError: no such scheduler, one that needs a package that is not installed, or values that it does not take.
    """
    name = config.get("_class_name", "")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not hasattr(kind, "from_config") or not name.endswith("Scheduler"):
        raise UserError(f"{place} names the scheduler {shown(name)}, which diffusers does not have")
    try:
        return kind.from_config(config)
    except ImportError as error:  # of a stand-in for a class with further requirements
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{place} names a scheduler that cannot be used here: {reason}") from error
    except Exception as error:  # schedulers raise anything for values that they do not take
        raise UserError(f"{place} has values of which no {name} can be made: "
                        f"{' '.join(str(error).split()) or type(error).__name__}") from error
