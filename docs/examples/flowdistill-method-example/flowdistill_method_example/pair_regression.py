"""Regression on pairs: the student learns what its teacher's ODE makes of the same noise.

    loss = mean || G(n) - ODE(n) ||^2

The pairs (n, ODE(n)) are made once and kept. It is the simplest distillation there is (Luhman and Luhman, arXiv
2101.02388), needs no data, and blurs where a small change of the noise changes the image: a baseline, and a pattern for
methods of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from flowdistill.config import OptimizerConfig, option
from flowdistill.students import Generator, StudentInfo, generated
from flowdistill.teachers import Teacher
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.training.method import SingleStudentMethod, register_method
from flowdistill.utils.randomness import Draw


@dataclass
class PairRegressionConfig:
    """Settings of the regression: the section ``method`` of a configuration, checked before anything is loaded."""

    name: str = "pair_regression"
    pairs: int = option(1000, "samples of the teacher, made once", at_least=1)
    pair_steps: int = option(50, "Euler steps of the teacher that make them", at_least=1)
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the student")


@register_method
class PairRegression(SingleStudentMethod):
    """One network that trains, one loss."""

    name = "pair_regression"
    Config = PairRegressionConfig

    def __init__(
        self, config: PairRegressionConfig, teacher: Teacher, student_network: nn.Module | None = None
    ) -> None:
        """``student_network``: of one's own, ``(x, t, condition) -> velocity``; None: a copy of the teacher's."""
        self.config, self.teacher = config, teacher
        info = StudentInfo(self.name, teacher.source)
        self._student = Generator.from_teacher(teacher, info, network=student_network)
        self.samples = teacher_pairs(teacher, config.pairs, config.pair_steps)

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over the micro-batch, and the same as a figure to log."""
        index = draw.integers(len(self.samples.noise), on_cpu=True)
        noise, latents, condition = self.samples.rows(index, self.teacher)
        made = generated(networks["student"], noise, self.teacher.t_max, condition)
        error = (made - latents).square().mean()
        return error, {"error": error.detach()}
