"""Noise and what a teacher's ODE makes of it: generated once, then read from the cache; the regression term on them.

The regression term is DMD's (Yin et al., arXiv 2311.18828), with the squared error where DMD has LPIPS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompts import PromptConditions
from flowdistill.teachers import Teacher
from flowdistill.utils.devices import sent
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import cache_folder, local_path, write_cache
from flowdistill.utils.hashing import json_sha256, module_sha256
from flowdistill.utils.logging import on_terminal, say
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import indexed_noise
from flowdistill.utils.tf32 import tf32_facts

BATCH, TEXT_BATCH = 250, 8
"""Samples at once; text-to-image networks are large."""


class Pairs(NamedTuple):
    """Unit noise (N, *shape), the ODE's latents from it (N, *shape), and what they are conditioned on: labels (N,), or
    numbers of prompts; None for an unconditional teacher. ``prompts``: those, where they are not the teacher's own."""

    noise: Tensor
    latents: Tensor
    labels: Tensor | None
    prompts: PromptConditions | None = None

    def rows(self, index: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor, Condition | None]:
        """Noise, latents and condition of pairs ``index`` (B,), on the teacher's device.

        The index is on the CPU like the pairs: one from a GPU would make every training step wait for it.
        """
        place = teacher.device
        noise, latents = sent(self.noise[index], place), sent(self.latents[index], place)
        if self.labels is None:
            return noise, latents, None
        labels = self.labels[index]
        if teacher.classes is not None:
            return noise, latents, teacher.classes.wrap(sent(labels, place))
        prompts = self.prompts or teacher.prompts
        assert prompts is not None
        return noise, latents, prompts.examples(labels.tolist()).to(place)

    def of(self, labels: Sequence[int], setting: str = "method.regression_pairs") -> Pairs:
        """Those with one of ``labels`` only.

        Args:
            setting: the one that says how many there are, for the message.

        Raises:
            UserError: there is none.
        """
        assert self.labels is not None
        mine = torch.isin(self.labels, torch.tensor(labels))
        if not mine.any():
            raise UserError(f"none of the {len(mine)} pairs has one of the labels {list(labels)}; raise {setting}")
        return Pairs(self.noise[mine], self.latents[mine], self.labels[mine], self.prompts)


def teacher_pairs(
    teacher: Teacher,
    count: int,
    steps: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    prompts: PromptConditions | None = None,
) -> Pairs:
    """``count`` pairs on the CPU; pair i depends on ``seed`` and i, and its label or prompt is i modulo their number.

    All classes of a teacher are there, whatever its own labels are.

    All processes must call this together; the main one generates what is missing.

    Args:
        steps: Euler steps of the teacher.
        folder: of the cache, by default ``~/.cache/flowdistill/pairs``. The file's name is a hash of the teacher's
            weights, its path, its classes or prompts and these arguments; a damaged file is made anew.
        prompts: other ones than the teacher's.

    Of a teacher on the meta device, which a plan has, the pairs have shapes and no content.
    """
    if teacher.device.type == "meta":
        empty = torch.empty(count, *teacher.shape, device="meta")
        return Pairs(empty, empty, _labels(teacher, count, prompts or teacher.prompts))
    # With another null label the same network has other classes.
    facts = [module_sha256(teacher.network), teacher.num_classes,
             *teacher_facts(teacher, count, steps, guidance_scale, seed, prompts=prompts)]
    key = json_sha256(facts)[:32]
    file = local_path(folder or cache_folder("pairs")) / f"{key}.safetensors"

    made: list[dict[str, Tensor]] = []

    def make() -> None:
        if _read(file) is None:
            made.append(_generate(teacher, count, steps, guidance_scale, seed, prompts or teacher.prompts))
            write_cache(file, save(made[0], metadata={"format": "pt"}), "teacher's pairs")

    Processes.current().on_main(make)
    content = made[0] if made else _read(file)
    if content is None:  # another machine's main process wrote it to another disk, or it could not be written
        content = _generate(teacher, count, steps, guidance_scale, seed, prompts or teacher.prompts)
    return Pairs(indexed_noise(teacher.shape, seed, range(count)), content["latents"], content.get("labels"), prompts)


def teacher_facts(
    teacher: Teacher, *settings: float | str, prompts: PromptConditions | None = None
) -> list[object]:
    """What decides a teacher's samples besides its weights: its path, its prompts (or others) and ``settings``, for a
    hash."""
    path = teacher.path
    facts: list[object] = [path.scheduler_name, path.kind, path.prediction, path.t_min, path.t_max]
    facts += [*teacher.shape, *settings]
    # The schedule itself, whatever it was made from.
    grid = path.time_grid(10)[:-1]
    facts += [*grid.tolist(), *path.coefficients(grid).timestep.tolist()]
    if path.clipping is not None:
        facts.append(repr(path.clipping))
    prompts = prompts or teacher.prompts
    if prompts is not None:
        facts += [prompts.text.fingerprint, prompts.negative, *prompts.image_size, *prompts.list_facts()]
    if teacher.guidance_norm is not None:
        facts.append(f"guidance_norm {teacher.guidance_norm}")
    return facts + tf32_facts(teacher.device)


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load(file.read_bytes())  # not mapped: the file may be replaced while its pairs are in use
    except (OSError, SafetensorError):
        return None


def _labels(teacher: Teacher, count: int, prompts: PromptConditions | None) -> Tensor | None:
    number = teacher.num_classes if prompts is None else len(prompts.prompts or [""])
    return None if number is None else torch.arange(count) % number


@torch.no_grad()
def _generate(
    teacher: Teacher, count: int, steps: int, guidance_scale: float, seed: int, prompts: PromptConditions | None
) -> dict[str, Tensor]:
    parts, batch = [], BATCH if prompts is None else TEXT_BATCH
    labels = _labels(teacher, count, prompts)
    if not on_terminal():
        say(f"making {count:,} pairs, {steps} teacher steps each")
    # As for images: None hides the bar where standard error is no terminal, which its redrawing would fill.
    for start in tqdm(range(0, count, batch), desc=f"pairs, {steps} teacher steps each", disable=None, leave=False):
        rows = range(start, min(start + batch, count))
        noise = indexed_noise(teacher.shape, seed, rows).to(teacher.device)
        condition: Condition | None = None
        if prompts is not None:
            condition = prompts.examples(rows).to(teacher.device)
        elif labels is not None:
            condition = teacher.encode(labels[rows.start : rows.stop])
        parts.append(teacher.sample(noise, condition, steps, guidance_scale=guidance_scale).cpu())
    return {"latents": torch.cat(parts)} | ({} if labels is None else {"labels": labels})
