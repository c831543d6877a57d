"""Teacher score matching (MSD, arXiv 2410.23274, Eq. 8): a network of another shape learns the teacher's velocity.

    L = E_{x_0, t, n} lambda(t) || v_phi(x_t, t) - v_teacher(x_t, t) ||^2,   x_t = (1 - t) x_0 + t n

so that a small student starts as a denoiser. With an exact teacher this has the gradient of training on the data, and
less variance: the targets have no noise. x_0 are real images (as in the paper) or, without data, the teacher's own
samples, made once. lambda is 1 over the square of what the network's output is multiplied by: for EDM
1 / sigma^2 + 1 / sigma_data^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import DataOptions, OptimizerConfig, option, validate
from flowdistill.networks.resizing import reshaped, smaller
from flowdistill.networks.velocity import ExtendedVelocity, VelocityNetwork
from flowdistill.paths.native_path import NativePath
from flowdistill.students import Generator, StudentInfo
from flowdistill.teachers import Teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.teachers.pairs import Pairs, teacher_pairs
from flowdistill.teachers.real_data import RealData
from flowdistill.training.method import About, SingleStudentMethod, Suggestion, register_method
from flowdistill.utils.errors import UserError
from flowdistill.utils.numbers import MOST_CALLS
from flowdistill.utils.randomness import Draw


@dataclass
class ScoreMatchingConfig:
    """Settings of teacher score matching; the paper's values for its steps and learning rate could not be found."""

    name: str = "teacher_score_matching"
    student_size: float | None = option(None, "the student's parameters, as a share of the teacher's", above=0, below=1)
    student_shape: dict[str, Any] | None = option(None, "settings of its network that differ from the teacher's")
    data: str | None = option(None, "images: a named set, a folder, tars, a table or a hub id; null: the teacher's own "
                                    "samples")
    data_options: DataOptions = option(DataOptions, "how they are read")
    samples: int = option(2000, "samples of the teacher, made once", at_least=1)
    sample_steps: int = option(20, "the teacher's steps to make them", at_least=1, at_most=MOST_CALLS)
    time: NoiseLevels = option(NoiseLevels, "noise levels of the loss")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the student")

    def validate(self) -> None:
        """UserError unless the student's network is given in one way."""
        if (self.student_size is None) == (self.student_shape is None):
            raise UserError("the student's network is given by either method.student_size, such as 0.3, or "
                            "method.student_shape, such as {block_out_channels: [16, 32]}; set one of them")


@register_method
class TeacherScoreMatching(SingleStudentMethod):
    """The method; its student is a generator that starts other methods' students (``teacher.start``)."""

    name = "teacher_score_matching"
    former_names = ("tsm",)
    Config = ScoreMatchingConfig
    about = About("a smaller network that learns the teacher's velocity, for other methods' students to start as",
                  "MSD, arXiv 2410.23274, Eq. 8", calls="as the teacher")

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return [Suggestion("method.student_size", 0.5, "parameters of the student as a share of the teacher's")]

    def __init__(self, config: ScoreMatchingConfig, teacher: Teacher, student_network: nn.Module | None = None) -> None:
        """``student_network``: of one's own, called as ``(x, t, condition) -> velocity``."""
        validate(config, prefix="method.")
        config.time.check(teacher)
        self.config, self.teacher = config, teacher
        network = student_network or ExtendedVelocity(student_velocity(teacher, config.student_size,
                                                                       config.student_shape))
        self._student = Generator.from_teacher(teacher, StudentInfo(self.name, teacher.source), network=network)
        self.data = None if config.data is None else RealData(teacher, config.data, options=config.data_options)
        self.pairs: Pairs | None = None

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clean, condition = self.draw_samples(draw) if self.data is None else self.data.draw(draw)
        time, noise = self.config.time.draw(self.teacher, draw), draw.normal(self.teacher.shape)
        state = clean + time.reshape(-1, *[1] * (clean.ndim - 1)) * (noise - clean)
        with torch.no_grad():
            goal = self.teacher.velocity(state, time, condition)
        velocity = networks["student"](state, time, condition)
        loss = matching_loss(velocity, goal, time, self.teacher.path).mean()
        return loss, {"velocity_error": (velocity - goal).detach().square().mean()}

    def draw_samples(self, draw: Draw) -> tuple[Tensor, Condition | None]:
        """Samples of the teacher (B, *shape) with the conditions they were made for."""
        if self.pairs is None:  # at the first step: an untrained student needs none
            self.pairs = teacher_pairs(self.teacher, self.config.samples, self.config.sample_steps)
        index = draw.integers(len(self.pairs.latents), on_cpu=True)
        _, latents, condition = self.pairs.rows(index, self.teacher)
        return latents, condition


def matching_loss(velocity: Tensor, goal: Tensor, t: Tensor, path: NativePath) -> Tensor:
    """lambda(t) mean (v - goal)^2, per sample (B,), for velocities (B, ...) at linear times (B,)."""
    weight = path.coefficients(t).output.pow(-2).to(velocity.dtype)
    return weight * (velocity - goal).square().flatten(1).mean(dim=1)


def student_velocity(
    teacher: Teacher, size: float | None = None, shape: Mapping[str, object] | None = None
) -> VelocityNetwork:
    """A random network of the teacher's family, of ``size`` times its parameters or of a given ``shape``, that trains.

    Raises:
        UserError: a teacher without a diffusers backbone, or a network that cannot be built.
    """
    velocity = teacher.network
    if not isinstance(velocity, VelocityNetwork):
        raise UserError("only teachers with a diffusers backbone have students of another shape")
    backbone = velocity.backbone
    changes = shape if size is None else smaller(backbone, size)
    assert changes is not None
    network = VelocityNetwork(reshaped(backbone, changes), teacher.path, velocity.family)
    if velocity.family.shape(network.backbone) != velocity.family.shape(backbone):
        raise UserError(f"method.student_shape {dict(changes)} makes samples of another shape than the teacher's "
                        f"{velocity.family.shape(backbone)}")
    return network.requires_grad_(True).eval()
