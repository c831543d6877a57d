"""What may give way to an export: an earlier one, and nothing that the run is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowdistill.config.run_folder import CONFIG, TEACHER_PATHS, found_again, run_settings
from flowdistill.export.hub import INDEX, MANIFEST
from flowdistill.networks.storage import SIDECAR
from flowdistill.teachers.weight_files import FILE as WEIGHTS
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import read_json_object


def check_overwritable(target: Path, source: str | os.PathLike[str]) -> None:
    """Refuse to put an export in the place of what flowdistill has not exported, or of what its run needs.

    Args:
        target: what would be replaced.
        source: the run folder, or the student's in it.

    Raises:
        UserError: so.
    """
    if not is_export(target):
        raise UserError(f"{target} is no pipeline that flowdistill has exported, so --overwrite leaves it alone; "
                        "choose a new folder, or remove it yourself")
    here = target.resolve()
    for what, path in _needed(local_path(source)):
        there = path.resolve()
        if here == there or here in there.parents:  # an export may well lie in its run's folder
            how = "is" if here == there else "has in it"
            raise UserError(f"{target} {how} {what}, {path}, so --overwrite leaves it alone; choose another folder")


def is_export(folder: Path) -> bool:
    """Whether ``folder`` holds a pipeline that flowdistill has exported, or a manifest with nothing but such."""
    manifest = _object(folder / MANIFEST).get("pipelines")
    if isinstance(manifest, list) and manifest:
        names = [entry.get("folder") if isinstance(entry, dict) else None for entry in manifest]
        return all(isinstance(name, str) and _is_pipeline(folder / name) for name in names)
    return _is_pipeline(folder)


def _is_pipeline(folder: Path) -> bool:
    """Its record has the arguments of the call, which that of no other pipeline has."""
    return (folder / INDEX).is_file() and "call" in _object(folder / SIDECAR)


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none that can be read."""
    try:
        return read_json_object(file) if file.is_file() else {}
    except UserError:
        return {}


def _needed(source: Path) -> Iterator[tuple[str, Path]]:
    """What a run is made of, in words, and where it is: its folder, and what its settings name."""
    run = next((run for run in (source, source.absolute().parent) if (run / CONFIG).is_file()), None)
    yield ("the student's folder", source) if run is None else ("the run folder", run)
    if run is None:
        return
    settings, recorded = run_settings(run), _object(run / WEIGHTS)
    for key, value in _texts(settings):
        # A bare word may be one of a setting's choices, and a folder here may have the same name.
        named = key in recorded or key.startswith("method.") and os.sep in value
        if value and (named or key in [f"teacher.{name}" for name in TEACHER_PATHS]):
            path = find_path(found_again(value, run))
            if path.exists():
                yield f"the run's {key}", path


def _texts(values: object, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts among settings, also those in lists, with their keys."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, key)
    elif isinstance(values, str):
        yield key, values
