"""What students are trained on that look at noised samples: of the teacher, made once, or real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import DataOptions, needs, option
from flowdistill.networks.velocity import per_sample
from flowdistill.students.steps import Steps
from flowdistill.teachers import Teacher
from flowdistill.teachers.pairs import Pairs, teacher_pairs
from flowdistill.teachers.real_data import RealData
from flowdistill.utils.errors import UserError
from flowdistill.utils.numbers import MOST_CALLS
from flowdistill.utils.randomness import Draw


@dataclass
class NoisedSamples:
    """Settings of the samples; methods' settings inherit them and have a setting ``states`` beside."""

    pairs: int = option(4096, "states=pairs: samples of the teacher", at_least=1, only=needs("states", "pairs"))
    pairs_steps: int = option(50, "states=pairs: the teacher's steps to make them", at_least=1, at_most=MOST_CALLS,
                              only=needs("states", "pairs"))
    data: str | None = option(None, "states=data: images: a named set, a folder, tars, a table or a hub id")
    data_options: DataOptions = option(DataOptions, "how they are read", only=needs("data"))

    def check_states(self, states: str) -> None:
        """UserError for real images without a set, or a set that nothing looks at."""
        if (states == "data") != (self.data is not None):
            raise UserError(f"method.states is {states} and method.data {self.data or 'null'}; set states to data "
                            "and data to an image set, such as digits, or data to null")

    def samples(
        self, states: str, teacher: Teacher, guidance_scale: float, images: tuple[Tensor, Tensor] | None = None
    ) -> Pairs | RealData | None:
        """Those of ``states``; None where it names neither pairs nor data.

        Args:
            guidance_scale: of the teacher, for its samples.
            images: see :class:`RealData`.
        """
        if states == "data":
            assert self.data is not None
            return RealData(teacher, self.data, images, self.data_options)
        if states != "pairs":
            return None
        pairs = teacher_pairs(teacher, self.pairs, self.pairs_steps, guidance_scale)
        if teacher.classes is not None and teacher.classes.own is not None:
            return pairs.of(teacher.classes.own, "method.pairs")
        return pairs


def draw_clean(
    samples: Pairs | RealData, teacher: Teacher, draw: Draw, rows: int | None = None
) -> tuple[Tensor, Condition | None]:
    """Random ones of the samples (B, *shape), and their conditions; ``rows`` over all processes, None: all."""
    if isinstance(samples, Pairs):
        _, clean, condition = samples.rows(draw.integers(len(samples.latents), rows, on_cpu=True), teacher)
        return clean, condition
    return samples.draw(draw, rows)


def noised_or_start(clean: Tensor, noise: Tensor, t: Tensor, steps: Steps) -> Tensor:
    """x_t = (1 - t) x_0 + t n at times t (B,), and at the first time of ``steps`` what sampling starts from."""
    start = t >= steps.times[0]
    signal = torch.where(start, torch.zeros_like(t), 1 - t)
    level = torch.where(start, torch.full_like(t, steps.start_scale), t)
    return per_sample(signal, clean) * clean + per_sample(level, clean) * noise
