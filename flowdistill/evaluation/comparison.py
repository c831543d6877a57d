"""Pictures of the same noise: teacher and student, which says what a distillation did; a teacher by its calls."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from flowdistill.evaluation.evaluate import pipeline_sampler, student_sampler, teacher_sampler
from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.teachers.codec import VaeCodec
from flowdistill.teachers.pipeline_call import not_measured
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import grid, save_picture, stacked
from flowdistill.utils.randomness import indexed_noise

TEACHER_STEPS = 50
"""Calls of the teacher at its best, in the picture."""


@torch.no_grad()
def save_comparison(
    teacher: Teacher,
    student: Student,
    path: str | os.PathLike[str],
    teacher_steps: Sequence[int] | None = None,
    rows_each: int | None = None,
    columns: int = 10,
    seed: int = 0,
) -> None:
    """Write a PNG of blocks with titles: the teacher at each number of Euler steps, then the student at each of calls.

    Every block starts from the same noise and labels or prompts (in turn), so an image can be compared from block to
    block.

    Args:
        teacher_steps: None for ``TEACHER_STEPS`` and as many as the student has calls.
        rows_each: of a block; None for three, and for one of a student of several calls, which has several blocks.
    """
    if teacher_steps is None:
        teacher_steps = (TEACHER_STEPS, student.num_steps)
    if rows_each is None:
        rows_each = 3 if student.num_steps == 1 else 1
    count = rows_each * columns
    noise = indexed_noise(student.shape, seed, range(count)).to(student.device)
    condition = student.examples(range(count))
    blocks = {}
    for steps in teacher_steps:
        blocks[f"teacher, {calls_in_words(steps)}"] = teacher.decode(teacher.sample(noise, condition, steps=steps))
    for steps in student.step_counts:
        blocks[f"student, {calls_in_words(steps)}"] = student_sampler(student, steps=steps)(noise, condition)
    save_picture(stacked({title: grid(images, columns) for title, images in blocks.items()}), path)


def check_prompts(prompts: Sequence[str] | None, takes: bool | None, name: str) -> None:
    """Refuse prompts for a pipeline that takes none, and none for one that takes them.

    Args:
        takes: whether it takes them; None: not known yet.
        name: of the pipeline.

    Raises:
        UserError: so.
    """
    if takes and not prompts:
        raise UserError(f"{name} takes prompts; give --prompt TEXT, once or several times")
    if takes is False and prompts:
        raise UserError(f"--prompt needs a text-to-image pipeline, and {name} takes no prompts")


@torch.no_grad()
def save_teacher_calls(
    teacher: Teacher, path: str | os.PathLike[str], prompts: Sequence[str] | None = None, guidance_scale: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Write a PNG with a row of the teacher's images at 1, 4 and 50 Euler steps, and one of its pipeline's own call.

    All rows start from the same noise and labels or prompts. Where the last two look alike the teacher is read rightly;
    the first is what a student of one call has to make better.

    Args:
        prompts: a column each, for a teacher that takes them.
        guidance_scale: of all rows.

    Returns:
        Lines that say what is in the picture, and why the pipeline's own call is not where it is not.

    Raises:
        UserError: a teacher that takes prompts without any, prompts for another, or guidance that it cannot give.
    """
    check_prompts(prompts, teacher.prompts is not None, teacher.source)
    count = len(prompts) if prompts else 4 if isinstance(teacher.codec, VaeCodec) else 10
    condition = teacher.encode(prompts=prompts) if prompts else teacher.examples(range(count))
    samplers = {calls_in_words(steps): teacher_sampler(teacher, steps, guidance_scale=guidance_scale)
                for steps in (1, 4, TEACHER_STEPS)}
    lines = [f"from top to bottom: {', '.join(samplers)} of the teacher"]
    noise = indexed_noise(teacher.shape, seed, range(count))
    rows = {title: grid(sampler(noise, condition), count) for title, sampler in samplers.items()}
    if (reason := not_measured(teacher)) is None:
        own = f"the pipeline's own call, {TEACHER_STEPS} steps"
        try:
            rows[own] = grid(pipeline_sampler(teacher, TEACHER_STEPS, guidance_scale)(noise, condition), count)
        except UserError as error:
            reason = str(error)
    if reason is None:
        lines[0] += f"; {own}"
    else:
        lines.append(f"without the pipeline's own call: {reason}")
    if prompts:
        lines.append(f"from left to right: {'; '.join(prompts)}")
    elif teacher.classes is not None:
        shown = [teacher.classes.shown[i % len(teacher.classes.shown)] for i in range(count)]
        lines.append(f"from left to right: the labels {', '.join(map(str, shown))}")
    save_picture(stacked(rows), path)
    return lines


def save_by_calls(student: Student, path: str | os.PathLike[str], count: int, seed: int = 0) -> None:
    """Write a PNG with a row of ``count`` images for each number of calls of a student, each row from the same noise
    and labels or prompts."""
    rows = {calls_in_words(steps): grid(student.generate(num_images=count, seed=seed, steps=steps), count)
            for steps in student.step_counts}
    save_picture(stacked(rows), path)


def calls_in_words(count: int) -> str:
    """``1 call``, ``2 calls``."""
    return f"{count} call{'' if count == 1 else 's'}"
