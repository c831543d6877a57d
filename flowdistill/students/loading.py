"""Loading a :class:`Student` from a run folder, a student folder or a hub repository."""

from __future__ import annotations

import os

import torch

from flowdistill.networks.storage import SIDECAR, locate, read_description
from flowdistill.students.student import STUDENT_KINDS, Student
from flowdistill.utils.errors import UserError


def load_student(
    path: str | os.PathLike[str], device: str | torch.device | None = None, resident: int | None = None
) -> Student:
    """The student in a run folder, a student folder or a hub repository; several students with a manifest are one.

    Args:
        device: where to put it; the CPU by default.
        resident: of several students, how many are on the device at a time; None: all. It means nothing for one.

    Raises:
        UserError: nothing there, a student that is incomplete or damaged, or one made by a newer format.
    """
    folder = locate(path)
    description = read_description(folder)
    kind = description["kind"]
    if kind not in STUDENT_KINDS:
        raise UserError(f"{folder / SIDECAR} describes a '{kind}' student; this version loads "
                        f"{', '.join(STUDENT_KINDS)} students")
    student = STUDENT_KINDS.get(kind).load(folder, description, resident)
    return student if device is None else student.to(device)
