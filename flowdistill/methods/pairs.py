"""Noise and what a teacher's ODE makes of it: generated once, then read from the cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flowdistill.conditions import Condition
from flowdistill.errors import UserError
from flowdistill.evaluation.features import module_sha256
from flowdistill.evaluation.files import atomic_write, cache_folder
from flowdistill.evaluation.processes import Processes
from flowdistill.noise import indexed_noise
from flowdistill.teacher import Teacher

BATCH = 250


class Pairs(NamedTuple):
    """Unit noise (N, *shape), the ODE's latents from it (N, *shape), and labels (N,) of a conditional teacher."""

    noise: Tensor
    latents: Tensor
    labels: Tensor | None


def teacher_pairs(
    teacher: Teacher,
    count: int,
    steps: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Pairs:
    """``count`` pairs on the CPU; pair i depends on ``seed`` and i, and its label is i modulo the classes.

    All processes must call this together; the main one generates what is missing.

    Args:
        steps: Euler steps of the teacher.
        folder: of the cache, by default ``~/.cache/flowdistill/pairs``. The file's name is a hash of the teacher's
            weights, its path and these arguments; a damaged file is made anew.

    Raises:
        UserError: the teacher takes prompts.
    """
    if teacher.prompts is not None:
        raise UserError("method.regression_weight needs a teacher with class labels or without conditions, and this "
                        "one takes prompts; set it to 0")
    file = Path(folder or cache_folder("pairs")) / f"{_key(teacher, count, steps, guidance_scale, seed)}.safetensors"

    def make() -> None:
        if _read(file) is None:
            content = _generate(teacher, count, steps, guidance_scale, seed)
            with atomic_write(file) as output:
                output.write(save(content, metadata={"format": "pt"}))

    Processes.current().on_main(make)
    content = _read(file)
    if content is None:  # another machine's main process wrote it to another disk
        content = _generate(teacher, count, steps, guidance_scale, seed)
    return Pairs(indexed_noise(teacher.shape, seed, range(count)), content["latents"], content.get("labels"))


def _key(teacher: Teacher, *settings: float) -> str:
    path = teacher.path
    facts = [path.scheduler_name, path.kind, path.prediction, path.t_min, path.t_max, *teacher.shape, *settings]
    # The schedule itself, whatever it was made from.
    grid = path.time_grid(10)[:-1]
    facts += [*grid.tolist(), *path.coefficients(grid).timestep.tolist()]
    weights = module_sha256(teacher.network)
    return hashlib.sha256(json.dumps([weights, *facts]).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load(file.read_bytes())  # not mapped: the file may be replaced while its pairs are in use
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def _generate(teacher: Teacher, count: int, steps: int, guidance_scale: float, seed: int) -> dict[str, Tensor]:
    parts, classes = [], teacher.num_classes
    labels = None if classes is None else torch.arange(count) % classes
    for start in range(0, count, BATCH):
        rows = range(start, min(start + BATCH, count))
        noise = indexed_noise(teacher.shape, seed, rows).to(teacher.device)
        condition: Condition | None = None if labels is None else teacher.encode(labels[rows.start : rows.stop])
        parts.append(teacher.sample(noise, condition, steps, guidance_scale=guidance_scale).cpu())
    return {"latents": torch.cat(parts)} | ({} if labels is None else {"labels": labels})
