"""The same flow map distilled from data instead of from the prior: what FreeFlow does without, as a baseline.

The two-time average velocity V(x_t, t, d) of MeanFlow (Geng et al., arXiv 2505.13447), with the teacher's velocity in
the place of the conditional one. On the teacher's trajectories, with the end time t - d fixed,

    V + d D V = v_teacher(x_t, t),     D = v_teacher . d/dx + d/dt + d/dd

and x_t = (1 - t) x + t n is a noised data sample. One call at t = t_max, d = t_max is the generator, as in FreeFlow.
The states come from the data: where the data is not what the teacher models, they are not the teacher's states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import MISSING, DataOptions, OptimizerConfig, option, validate
from flowdistill.networks.lora import StudentKind
from flowdistill.networks.velocity import per_sample
from flowdistill.objectives import distribution_matching as dm
from flowdistill.objectives import flow_map as fm
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import Teacher
from flowdistill.teachers.real_data import RealData
from flowdistill.training.method import (
    About,
    SingleStudentMethod,
    Suggestion,
    register_method,
    start_before_noise,
)
from flowdistill.utils.randomness import Draw


@dataclass
class DataFlowMapConfig(StudentKind):
    """Settings of the data-based baseline; all defaults are ours."""

    name: str = "data_flow_map"
    data: str = option(MISSING, "images to distil on: a named set, a folder, tars, a table or a hub id")
    data_options: DataOptions = option(DataOptions, "how they are read")
    shift_pixels: int = option(0, "random translation of the data by up to so many pixels, each way", at_least=0)
    damping: float = option(1.0, "power of the damping (MeanFlow's adaptive weight)", at_least=0)
    damping_epsilon: float = option(1e-3, "added to the squared size that damps", above=0)
    finite_difference_step: float = option(0.02, "step of the derivative, in t", above=0, at_most=1)
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the student")


@register_method
class DataFlowMap(SingleStudentMethod):
    """One network, one objective, states from data."""

    name = "data_flow_map"
    Config = DataFlowMapConfig
    about = About("the same flow map learnt on noised images: a baseline with data", "MeanFlow, arXiv 2505.13447, with "
                  "the teacher's velocity")

    def __init__(
        self, config: DataFlowMapConfig, teacher: Teacher, student_network: nn.Module | None = None,
        images: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``images``: latents-to-be (N, C, H, W) in [0, 1] and labels (N,) instead of a named set."""
        validate(config, prefix="method.")
        self.config, self.teacher = config, teacher
        self.data = RealData(teacher, config.data, images, config.data_options)
        info = StudentInfo(method=self.name, base_model=teacher.source)
        self._student = FlowMap.from_teacher(teacher, info, student_network, lora=config.student_lora)

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return [*start_before_noise(teacher), *super().suggest(teacher, guidance)]

    def shown(self, role: str) -> str | None:
        return "residual"

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clean, condition = self.draw_data(draw)
        t_min, t_max, h = self.teacher.t_min, self.teacher.t_max, self.config.finite_difference_step
        time = t_min + (t_max - t_min) * (1 - draw.uniform())
        duration = time * (1 - draw.uniform())
        state = dm.noised(clean, draw.normal(self.teacher.shape), time)
        student = networks["student"]
        with torch.no_grad():
            slope = self.teacher.velocity(state, time, condition)
            # Along the trajectory, the end time time - duration staying where it is.
            back, ahead = torch.minimum(torch.full_like(time, h), duration), (t_max - time).clamp(max=h)
            both = None if condition is None else Condition.cat([condition, condition])
            times, lengths = torch.cat([time - back, time + ahead]), torch.cat([duration - back, duration + ahead])
            states = torch.cat([state - per_sample(back, state) * slope, state + per_sample(ahead, state) * slope])
            before, after = student(states, times, both, duration=lengths).chunk(2)
            derivative = (after - before) / per_sample(back + ahead, state)
        velocity = student(state, time, condition, duration=duration)
        residual = fm.generating_residual(velocity.detach(), derivative, duration, slope)
        damped = fm.damp(residual, self.config.damping, self.config.damping_epsilon)
        return fm.velocity_matching_loss(velocity, damped).mean(), {"residual": residual.square().mean()}

    def draw_data(self, draw: Draw) -> tuple[Tensor, Condition | None]:
        """Latents (B, *shape) of random images, translated; the border is filled with the image's own edge."""
        clean, condition = self.data.draw(draw)
        if self.config.shift_pixels:
            k = self.config.shift_pixels
            rows, columns = draw.integers(2 * k + 1), draw.integers(2 * k + 1)
            padded = nn.functional.pad(clean, (k, k, k, k), mode="replicate")
            height, width = clean.shape[-2:]
            y = rows[:, None] + torch.arange(height, device=clean.device)
            x = columns[:, None] + torch.arange(width, device=clean.device)
            batch = torch.arange(len(clean), device=clean.device)
            clean = padded[batch[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        return clean, condition
