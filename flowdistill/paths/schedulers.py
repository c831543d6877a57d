"""Schedulers as they are saved in a pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers

from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.utils.errors import UserError

__all__ = ["load_scheduler", "path_from_scheduler"]


def load_scheduler(folder: Path) -> Any:
    """The scheduler saved in ``folder``, of exactly the class its config names."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no scheduler_config.json, so the teacher's schedule is unknown")
    name = _read_json(file).get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UserError(f"{file} names the scheduler '{name}', which diffusers does not have")
    return cls.from_pretrained(folder)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
