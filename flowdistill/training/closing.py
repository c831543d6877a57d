"""The last words of a run: the picture to look at, and the commands that go on from it."""

from __future__ import annotations

import shlex
from pathlib import Path

from flowdistill.students import is_student_folder

PICTURES = ("comparison.png", "final.png")
"""In ``samples/``, the most telling one first."""


def closing(folder: Path) -> str:
    """What to look at in a run folder and what to do with it, a line each; a command can be pasted into a shell."""
    run = shlex.quote(str(folder))
    found = [folder / "samples" / name for name in PICTURES if (folder / "samples" / name).is_file()]
    commands = [f"flowdistill report {run}"]
    if is_student_folder(folder):
        commands += [f"flowdistill sample {run} --num-images 40 --out grid.png", f"flowdistill evaluate {run}",
                     f"flowdistill export {run} exported/"]
    lines = [f"picture  {found[0]}"] if found else []
    return "\n".join([*lines, *(f"{'next' if not number else '':<7}  {text}" for number, text in enumerate(commands))])
