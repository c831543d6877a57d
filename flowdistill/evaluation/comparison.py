"""One picture that says what a distillation did: teacher and student from the same noise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from flowdistill.images import save_grid
from flowdistill.noise import indexed_noise


@torch.no_grad()
def save_comparison(
    teacher: Any,
    student: Any,
    path: str | os.PathLike[str],
    teacher_steps: Sequence[int] = (50, 1),
    rows_each: int = 3,
    columns: int = 10,
    seed: int = 0,
) -> None:
    """Write a PNG of stacked blocks: the teacher at each number of Euler steps, then the student at one call.

    Every block starts from the same noise and labels or prompts (in turn), so a column can be compared from
    block to block; a blank row lies between blocks.
    """
    count = rows_each * columns
    noise = indexed_noise(student.shape, seed, range(count)).to(student.device)
    condition = student.examples(range(count))
    blocks = [teacher.decode(teacher.sample(noise, condition, steps=steps)).cpu() for steps in teacher_steps]
    blocks.append(student.decode(student(noise, condition)).cpu())
    blank = torch.ones(columns, *blocks[0].shape[1:])
    parts = [blocks[0]]
    for block in blocks[1:]:
        parts += [blank, block]
    save_grid(torch.cat(parts), path, columns)
