"""What a run was trained with: a line of versions and devices for its start, and for each resume with other ones."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from flowdistill.utils.environment import collected
from flowdistill.utils.files import disk_errors
from flowdistill.utils.text import read_lines

FILE = "environment.jsonl"


class Start(NamedTuple):
    """Training began, or went on, at ``step`` in an environment: name -> version or description."""

    step: int
    environment: dict[str, str]


def record_start(folder: Path, step: int) -> None:
    """Add a line to ``environment.jsonl`` of a run folder, unless the last one says the same of where training runs
    already.

    Args:
        step: steps done when training begins or goes on.

    Raises:
        UserError: the file cannot be written.
    """
    file, here = folder / FILE, collected()
    if (known := _lines(file)) and known[-1].environment == here and known[-1].step <= step:
        return
    line = {"step": step, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "environment": here}
    with disk_errors(str(file)), open(file, "a+b") as output:
        output.seek(0)
        broken = output.read()[-1:] not in (b"", b"\n")  # a crash has cut its last line short
        output.write(b"\n" * broken + json.dumps(line).encode() + b"\n")


def recorded_starts(folder: Path) -> list[Start]:
    """Where a run folder's present training was done, in the order of steps; steps that were made again do not count.

    Empty for a run of an older version; a line that cannot be read is left out.
    """
    found: list[Start] = []
    for one in _lines(folder / FILE):
        found = [*(earlier for earlier in found if earlier.step < one.step), one]
    return found


def _lines(file: Path) -> list[Start]:
    found: list[Start] = []
    for text in read_lines(file, strict=False) if file.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            line = json.loads(text)
            found.append(Start(int(line["step"]), {str(k): str(v) for k, v in line["environment"].items()}))
    return found
