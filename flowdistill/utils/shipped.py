"""What comes with flowdistill, configurations and small models: in the installed package, or beside it in a clone."""

from __future__ import annotations

import os
from pathlib import Path

from flowdistill.utils.files import local_path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("assets", "configs")
"""Top-level folders of a clone that a wheel carries inside the package."""


def shipped_folder(name: str) -> Path:
    """The shipped folder ``assets`` or ``configs``: in the package where a wheel was installed, else beside it."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def find_path(path: str | os.PathLike[str]) -> Path:
    """``path`` itself where it exists, else the shipped file or folder of that name, else ``path`` itself.

    So ``assets/digits-flow``, as shipped configurations write it, means the same in a clone and in any folder of a
    machine where only the wheel is installed.
    """
    given = local_path(path)
    if not given.exists() and not given.is_absolute() and given.parts and given.parts[0] in FOLDERS:
        shipped = shipped_folder(given.parts[0]).joinpath(*given.parts[1:])
        if shipped.exists():
            return shipped
    return given


def find_config(path: str | os.PathLike[str]) -> Path:
    """Find a path as :func:`find_path` does, and a shipped configuration by its name without folder and ending.

    ``digits/freeflow`` is ``configs/digits/freeflow.yaml``.
    """
    found = find_path(path)
    if not found.exists() and not found.is_absolute():
        for suffix in ("", ".yaml"):
            shipped = shipped_folder("configs") / f"{path}{suffix}"
            if shipped.is_file():
                return shipped
    return found
