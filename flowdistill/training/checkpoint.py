"""Checkpoint folders that are complete or absent.

accelerate's ``save_state`` knows one gradient scaler for all networks, and here each has its own; nor is its folder
complete or absent when the process dies while it writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import atomic_write, disk_errors
from flowdistill.utils.text import JsonObject, read_json_object

STATE = "state.json"
NEEDED = ("seconds", "roles", "meters", "lap", "method")
COUNTS = ("average_count", "skipped", "consecutive")
"""Of every role."""
_COMPLETE = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.step-\d{6,}\.(partial|old)")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    named = [(_COMPLETE.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return sorted((int(match[1]), entry) for match, entry in named if match)


def remove_leftovers(folder: Path) -> None:
    """Delete what a process that died while writing or deleting has left behind."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry)


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: JsonObject, keep: int
) -> Path:
    """Write ``step-000500/`` and then delete all but the ``keep`` newest.

    Everything is written to a hidden sibling and is on the disk before the folder takes its name.

    Args:
        tensors: file name without suffix -> named CPU tensors.
        state: JSON values.

    Raises:
        UserError: the disk is full, read-only or forbidden; older checkpoints are as they were.
    """
    target = folder / f"step-{step:06d}"
    partial = folder / f".{target.name}.partial"
    with disk_errors(f"the checkpoint {target} (older ones are intact)"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, content in tensors.items():
                write_tensors(partial / f"{name}.safetensors", content)
            (partial / STATE).write_text(_json(state), encoding="utf-8")
            for entry in (*partial.iterdir(), partial):
                _sync(entry)
            partial.rename(target)
            _sync(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for _, old in checkpoints(folder)[:-keep]:
            gone = old.with_name(f".{old.name}.old")  # deleting takes time: half a checkpoint must not have its name
            old.rename(gone)
            shutil.rmtree(gone)
    return target


def rewrite_state(folder: Path, step: int, state: JsonObject) -> None:
    """Give the checkpoint of ``step`` other JSON values, in one move."""
    file = folder / f"step-{step:06d}" / STATE
    with disk_errors(str(file)), atomic_write(file) as output:
        output.write(_json(state).encode())


def read_state(checkpoint: Path, step: int | None = None) -> JsonObject:
    """The JSON values of a checkpoint; ``step``: of a run that is to go on from there, which looks at what they are."""
    with _damage(checkpoint / STATE):
        state = read_json_object(checkpoint / STATE)
        if step is not None:
            _check_state(state, step)
        return state


def _check_state(state: JsonObject, step: int) -> None:
    """ValueError where these are not the values of a run at ``step``."""
    if missing := [key for key in NEEDED if key not in state]:
        raise ValueError(f"it has no {missing[0]}")
    if state.get("step", step) != step:
        raise ValueError(f"its step is {shown(state['step'])}, not {step}")
    roles, lap = state["roles"], state["lap"]
    if not isinstance(roles, dict) or not all(isinstance(role, dict) for role in roles.values()):
        raise ValueError("its roles are no objects")
    if not isinstance(lap, list) or len(lap) != 2:
        raise ValueError(f"its lap is {shown(lap)}")
    numbers = {"seconds": state["seconds"], "lap": lap[0], "lap's seconds": lap[1]}
    counts = {"lap": lap[0]} | {f"{key} of the role '{name}'": role.get(key)
                                for name, role in roles.items() for key in COUNTS}
    for name, value in (numbers | counts).items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or isinstance(value, float) and name not in counts) or not 0 <= value < math.inf:
            raise ValueError(f"its {name} is {shown(value)}")


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The named tensors of one file of a checkpoint."""
    file = checkpoint / f"{name}.safetensors"
    with _damage(file):
        return load_file(file)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file of a checkpoint; tests slow it down or let it fail."""
    save_file(dict(tensors), path, metadata={"format": "pt"})


def _json(state: JsonObject) -> str:
    return json.dumps(state, indent=2, allow_nan=False) + "\n"


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        folder = file.parent
        if folder in [path for _, path in checkpoints(folder.parent)][1:]:
            way_out = f"delete {folder} to resume from the checkpoint before it"
        else:
            way_out = ("there is no checkpoint before it: put it back, choose another output_dir, or remove the run "
                       "folder to begin anew")
        raise UserError(f"{file} is missing or damaged ({reason}); {way_out}") from error


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
