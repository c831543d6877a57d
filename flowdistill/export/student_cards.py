"""The model card of a student folder, which flowdistill loads; pipelines have theirs from their export."""

from __future__ import annotations

from pathlib import Path

from flowdistill.export.card_data import HERE, add_run, write_card
from flowdistill.export.cards import four_labels, origin
from flowdistill.students.description import describe
from flowdistill.students.student import Student


def write_student_card(folder: Path, student: Student, run: Path | None = None) -> None:
    """Write ``README.md`` into a student's folder, replacing an older one.

    Args:
        run: the run folder, whose samples, figures and settings go into it.
    """
    count = student.num_steps
    about = describe(student).split("\n", 1)[1]  # the first line says where it comes from, with paths of this machine
    calls = "one network call" if count == 1 else f"{count} network calls"
    what = 'prompts=["a prompt"] * 4' if student.prompts is not None else (
        "num_images=4" if student.classes is None else f"labels={four_labels(student)}")
    write_card(
        folder, f"# A student of {calls} an image\n\n{origin(student)} This folder is its trained form, which "
        "flowdistill loads; `flowdistill export` makes a stock diffusers pipeline of it.\n\n"
        f'```python\nfrom flowdistill import load_student\n\nstudent = load_student("{HERE}")\n'
        f"images = student.generate({what}, seed=0)  # (4, channels, height, width) in [0, 1]\n```\n\n"
        f"```\n{about}\n```\n", student, count, library="flowdistill")
    if run is not None:
        add_run(folder, run, count)
