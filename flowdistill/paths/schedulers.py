"""Schedulers as they are saved in a pipeline folder."""

from __future__ import annotations

from pathlib import Path

import diffusers

from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import read_json_object

__all__ = ["load_scheduler", "path_from_scheduler"]


def load_scheduler(folder: Path) -> Scheduler:
    """The scheduler saved in ``folder``, of exactly the class its config names."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no scheduler_config.json, so the teacher's schedule is unknown")
    name = read_json_object(file).get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UserError(f"{file} names the scheduler '{name}', which diffusers does not have")
    return cls.from_pretrained(folder)
