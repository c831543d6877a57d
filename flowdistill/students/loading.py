"""Loading a :class:`Student` from a run folder, a student folder, a hub repository or its exported pipeline."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowdistill.conditioning.text_encoders import INDEX
from flowdistill.networks.storage import SIDECAR, locate, read_description
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.students.generator import Generator
from flowdistill.students.info import StudentInfo
from flowdistill.students.steps import Steps
from flowdistill.students.student import STUDENT_KINDS, Student
from flowdistill.teachers.loading import load_pipeline, load_teacher, read_record
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.text import read_json_object


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


def exported_student(path: str | os.PathLike[str], device: str | torch.device | None = None) -> Student | None:
    """The student of several calls in a folder that it was exported to; None where there is none.

    Its network is in the pipeline as it was, and flowdistill.json says its steps. Between them flowdistill draws noise
    of its own, so that its images are those of the student folder and not of the pipeline's call.

    Raises:
        UserError: the folder is damaged.
    """
    folder = local_path(path)
    record = read_record(folder) if (folder / INDEX).is_file() else {}
    if "student_steps" not in record:
        return None
    steps = Steps.from_json(record["student_steps"], folder / SIDECAR)
    source: Any = folder
    written = read_json_object(folder / "scheduler" / "scheduler_config.json")
    if written.get("_class_name") == "FlowMapEulerDiscreteScheduler":  # a velocity network, for all that, at any time
        plain = FlowMatchEulerDiscreteScheduler(written.get("num_train_timesteps", 1000))
        source = load_pipeline(folder, torch.float32, scheduler=plain)
    sides = [record.get("call", {}).get(side) for side in ("height", "width")]
    teacher = load_teacher(
        source, null_label=record.get("null_label"), labels=record.get("labels"), t_max=steps.times[0],
        image_size=None if None in sides else sides,
    )
    info = StudentInfo(record.get("method", ""), record.get("base_model", ""),
                       guidance_scale=record.get("guidance_scale", 1.0))
    student = Generator.around(ExtendedVelocity(teacher.network), teacher, steps.times[0], info)
    student.steps = steps
    return student.requires_grad_(False).eval().to(device or "cpu")
