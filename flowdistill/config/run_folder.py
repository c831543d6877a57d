"""A run folder's record of its settings, read wherever a command runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowdistill.config.checks import leaf_types, with_texts
from flowdistill.config.schema import EvaluationConfig, TeacherConfig
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.text import JsonObject, parse_yaml, read_text

CONFIG = "config.yaml"
TEACHER_PATHS = ("source", "lora", "vae", "prompts", "start")


def run_settings(folder: str | os.PathLike[str]) -> JsonObject:
    """The settings in a run folder's ``config.yaml``, as they are there: also of another version, and unchecked.

    Raises:
        UserError: no such file, or it is damaged.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = local_path(folder) / CONFIG
    text = read_text(file)
    values, texts = (parse_yaml(text, str(file), as_written) for as_written in (False, True))
    if not isinstance(values, dict):
        raise UserError(f"{file} is not the configuration of a run")
    hints: dict[str, object] = {"output_dir": str, "started_in": str}
    for section, schema in (("teacher", TeacherConfig), ("evaluation", EvaluationConfig)):
        hints |= dict(leaf_types(schema, schema, f"{section}."))
    values = with_texts(values, texts, hints)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def found_again(path: str, folder: str | os.PathLike[str]) -> str:
    """A path among a run's settings as it is reached from here.

    Relative paths are relative to the folder in which ``distill`` was started. Where the run folder lies at its
    ``output_dir`` below some folder, that is taken for it, so that a project may move as a whole; else the folder that
    ``distill`` has recorded (``started_in``), so that a run may move alone; else the present one.

    Args:
        path: absolute, beginning with ``~``, or relative, maybe with ``*``; a name or a hub id stays as it is, and so
            does an empty text, of what is not known.
        folder: the run folder, or the student's in it.
    """
    if not path:
        return path
    place = local_path(path)
    if place.is_absolute():
        return path
    for start in _starts(local_path(folder)):
        if (start / place).exists() or "*" in path and any(start.glob(path)):
            return path if start == Path.cwd() else str(start / place)
    return path


def teacher_found_again(section: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's ``teacher`` settings with the paths among them as they are reached from here; see :func:`found_again`."""
    paths = {key: found_again(section[key], folder) for key in TEACHER_PATHS if isinstance(section.get(key), str)}
    return {**section, **paths}


def _starts(folder: Path) -> Iterator[Path]:
    """Where the relative paths of the run in ``folder``, or right above it, may begin."""
    run = next((run for run in (folder, folder.parent) if (run / CONFIG).is_file()), None)
    if run is None:
        return
    try:
        settings = run_settings(run)
    except UserError:
        return
    output_dir, started_in = (settings.get(key) for key in ("output_dir", "started_in"))
    here = run.resolve()
    if isinstance(output_dir, str) and output_dir and not os.path.isabs(os.path.expanduser(output_dir)):
        below = Path(os.path.normpath(output_dir)).parts
        if here.parts[-len(below):] == below:
            yield Path(*here.parts[: -len(below)])
    if isinstance(started_in, str):
        yield Path(started_in)
