"""One picture that says what a distillation did: teacher and student from the same noise."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.utils.images import grid, save_picture, stacked
from flowdistill.utils.randomness import indexed_noise


@torch.no_grad()
def save_comparison(
    teacher: Teacher,
    student: Student,
    path: str | os.PathLike[str],
    teacher_steps: Sequence[int] = (50, 1),
    rows_each: int = 3,
    columns: int = 10,
    seed: int = 0,
) -> None:
    """Write a PNG of blocks with titles: the teacher at each number of Euler steps, then the student at one call.

    Every block starts from the same noise and labels or prompts (in turn), so an image can be compared from block to
    block.
    """
    count = rows_each * columns
    noise = indexed_noise(student.shape, seed, range(count)).to(student.device)
    condition = student.examples(range(count))
    blocks = {}
    for steps in teacher_steps:
        title = f"teacher, {steps} call{'s' if steps > 1 else ''}"
        blocks[title] = teacher.decode(teacher.sample(noise, condition, steps=steps))
    blocks["student, 1 call"] = student.decode(student(noise, condition))
    save_picture(stacked({title: grid(images, columns) for title, images in blocks.items()}), path)
