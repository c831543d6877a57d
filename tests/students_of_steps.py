"""Students of several calls on tiny teachers, and the noises that one generator draws for them in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowdistill.students import Generator, StudentInfo
from flowdistill.students.steps import Steps, start_scale, teacher_times
from flowdistill.teachers import load_teacher
from flowdistill.teachers.teacher import Teacher
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline


def steps_of(teacher: Teacher, count: int, stepping: str, times: tuple[float, ...] | None = None) -> Steps:
    """The teacher's own times, or others, from the start that the stock pipeline has."""
    times = times or teacher_times(teacher.path, count)
    return Steps(times, stepping, start_scale(teacher.path, times, stepping, teacher.prompts is not None))


def moved(student: Generator, size: float = 0.05) -> Generator:
    """The student with weights that are not its teacher's; of adapters, with these."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.network.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return student


def pixel_student(
    scheduler: Any, stepping: str = "stochastic", count: int = 4, labels: list[int] | None = None, dit: bool = False,
    **unet: Any,
) -> Generator:
    """A student of a tiny UNet2DModel of three classes with a null label, or as ``unet`` says; or of a tiny DiT."""
    null_label = None if dit or "num_class_embeds" in unet else 3
    pipeline = tiny_dit_pipeline(scheduler) if dit else tiny_unet_pipeline(scheduler, **unet)
    teacher = load_teacher(pipeline, null_label=null_label, labels=labels)
    steps = steps_of(teacher, count, stepping)
    return moved(Generator.from_teacher(teacher, StudentInfo("dmd2", "tiny"), steps=steps))


def noises(student: Generator, rows: int = 2, seed: int = 1) -> list[Tensor]:
    """Of the start and of each later step: what one generator draws in turn."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, *student.shape, generator=generator) for _ in range(student.num_steps)]
