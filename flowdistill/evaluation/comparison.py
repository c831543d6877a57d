"""One picture that says what a distillation did: teacher and student from the same noise."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from flowdistill.evaluation.evaluate import student_sampler
from flowdistill.students import Student
from flowdistill.teachers import Teacher
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


def save_by_calls(student: Student, path: str | os.PathLike[str], count: int, seed: int = 0) -> None:
    """Write a PNG with a row of ``count`` images for each number of calls of a student, each row from the same noise
    and labels or prompts."""
    rows = {calls_in_words(steps): grid(student.generate(num_images=count, seed=seed, steps=steps), count)
            for steps in student.step_counts}
    save_picture(stacked(rows), path)


def calls_in_words(count: int) -> str:
    """``1 call``, ``2 calls``."""
    return f"{count} call{'' if count == 1 else 's'}"
