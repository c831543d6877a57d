"""BOOT: data-free distillation by bootstrapping (Gu, Zhai, Zhang, Liu, Susskind; arXiv 2306.05544).

From the noise n and a target time, the student predicts the teacher's trajectory there. Each step, for s = t - h:

    y_t  = student(n, t), no gradient                        the trajectory a little earlier
    f    = teacher's denoised estimate at x_t = (1 - t) y_t + t n        [Heun: averaged with the one at s]
    y*   = y_t + rho (f - y_t),  rho = 1 - exp(lambda_s - lambda_t)      a DDIM step
    loss = min(1 / rho^2, cap) || student(n, s) - sg(y*) ||^2 + beta || student(n, t_max) - f(n, t_max) ||^2

The student is FreeFlow's flow map, y = n - V, so the same loss reads V(d) - V* in velocities (``form``): no division by
the data's share 1 - t. Where t_max < 1 the two weigh the times differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowdistill.config import OptimizerConfig, needs, option, validate
from flowdistill.networks.lora import StudentKind
from flowdistill.networks.velocity import per_sample
from flowdistill.objectives import bootstrap as bs
from flowdistill.objectives import flow_map as fm
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import Teacher
from flowdistill.teachers.codec import PixelCodec
from flowdistill.teachers.start_states import StartStates, at_t_max, check_guidance, draw_start_states
from flowdistill.training.method import (
    About,
    Method,
    SingleStudentMethod,
    Suggestion,
    register_method,
    start_before_noise,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.objects import is_object, load_object
from flowdistill.utils.randomness import Draw


@dataclass
class BootConfig(StudentKind):
    """Settings of BOOT. No readable source has the paper's values: every default is ours."""

    name: str = "boot"
    form: str = option("velocity", "quantity that the loss compares", choices=("velocity", "signal"))
    solver: str = option("euler", "teacher step of the target (euler is DDIM)", choices=("euler", "heun"))
    step_size: float = option(0.04, "h, as a share of the teacher's range", above=0, at_most=1)
    weight: str = option("one", "weight of the bootstrapping loss", choices=("one", "inverse_rho_squared"))
    weight_cap: float = option(100.0, "largest 1 / rho^2", above=0, only=needs("weight", "inverse_rho_squared"))
    boundary_weight: float = option(1.0, "beta of the boundary loss; 0 leaves it out", at_least=0)
    target_time: str = option("separate", "how the student learns the target time: an embedding of its own that "
                                          "starts at zero, or the teacher's own time channel",
                              choices=("separate", "reuse"))
    guidance_scale: float = option(1.0, "classifier-free guidance that is distilled in", at_least=0)
    threshold: str = option(
        "none", "how the teacher's estimate is kept in range (pixels only)", choices=("none", "static", "dynamic"),
    )
    threshold_percentile: float = option(0.995, "percentile of the dynamic threshold", above=0, at_most=1,
                                         only=needs("threshold", "dynamic"))
    metric: str = option("l2", "l2, or 'package.module:factory' of a module called as metric(signal, target), "
                               "both (B, *shape), that returns (B,) or (B, ...)")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the student")


@register_method
class Boot(SingleStudentMethod):
    """One network, one bootstrapping loss, one boundary loss."""

    name = "boot"
    Config = BootConfig
    about = About("a flow map that bootstraps along the teacher's trajectory from noise, by one loss and without a "
                  "critic", "BOOT, arXiv 2306.05544")

    def __init__(
        self, config: BootConfig, teacher: Teacher, student_network: nn.Module | None = None,
        metric: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """``metric``: a module of one's own instead of ``config.metric``; it must be frozen.

        ``student_network``: of one's own, called as ``ExtendedVelocity`` is; it takes the duration as it likes, so
        ``config.target_time`` must stay at its default.
        """
        validate(config, prefix="method.")
        self.config, self.teacher = config, teacher
        check_guidance(teacher, {"guidance_scale": config.guidance_scale})
        if config.threshold != "none" and not isinstance(teacher.codec, PixelCodec):
            raise UserError(f"method.threshold is '{config.threshold}', but the teacher's samples are latents, which "
                            "have no range; set it to none")
        self.metric = metric or _metric(config.metric)
        if isinstance(self.metric, nn.Module):
            self.metric.requires_grad_(False).eval()
        if config.target_time != "separate" and student_network is not None:
            raise UserError(f"method.target_time is '{config.target_time}', but the student's network was given, and "
                            "that decides its wiring; leave it at separate")
        info = StudentInfo(method=self.name, base_model=teacher.source, guidance_scale=config.guidance_scale)
        self._student = FlowMap.from_teacher(teacher, info, student_network, config.target_time, config.student_lora)

    def to(self, device: torch.device | str) -> Method:
        if isinstance(self.metric, nn.Module):
            self.metric.to(device)
        return super().to(device)

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return [*start_before_noise(teacher), *super().suggest(teacher, guidance)]

    # --- the algorithm

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student, t_max = networks["student"], self.teacher.t_max
        prior = draw_start_states(self.teacher, draw)
        h = self.config.step_size * t_max
        # Of the prediction at s: uniform, not from the noise downwards; float64, as every time (t_max - d) needs it.
        duration = h + (t_max - h) * draw.uniform().double()
        before = (duration - h).clamp(min=0)
        with torch.no_grad():
            goal = self.bootstrap_target(student, prior, before, duration)
        bounded = self.config.boundary_weight > 0
        # The boundary's rows ride in the same pass, so that the networks are called once with gradients.
        both, lengths = prior, duration
        if bounded:
            both = prior.twice()
            lengths = torch.cat([duration, torch.zeros_like(duration)])
        own = self._velocity(student, both, lengths)
        velocity, boundary = own.chunk(2) if bounded else (own, None)

        rho = bs.step_share(t_max - before, t_max - duration)
        error = self._error(velocity, goal, prior, duration)
        if self.config.weight == "inverse_rho_squared":
            error = bs.step_weight(rho, self.config.weight_cap).to(error.dtype) * error
        loss, metrics = error.mean(), {"bootstrap_error": (velocity - goal).detach().square().mean()}
        if boundary is not None:
            # t_max (V(0) - v) is the difference of the two estimates of the signal at the prior.
            with torch.no_grad():
                first = self.teacher_velocity(prior, prior.start, torch.full_like(duration, t_max))
            off = (t_max * (boundary - first)).square().mean()
            metrics["boundary_error"] = off.detach()
            loss = loss + self.config.boundary_weight * off
        return loss, metrics

    def bootstrap_target(
        self, student: Callable[..., Tensor], prior: StartStates, before: Tensor, duration: Tensor
    ) -> Tensor:
        """V*(d): one step of the teacher's solver from the student's own state after ``before``."""
        t, s = self.teacher.t_max - before, self.teacher.t_max - duration
        shorter = self._velocity(student, prior, before)
        state = fm.end_point(prior.start, before, shorter)
        slope = self.teacher_velocity(prior, state, t)
        step = duration - before
        if self.config.solver == "heun":
            # Averaged in the denoised estimates, as in the Signal-ODE: f = x - t v, and back by v = (x - f) / t. At
            # s = 0 the second estimate is the state itself, so the pair stays meaningful at the end of the range.
            ahead = state - per_sample(step, state) * slope
            first = state - per_sample(t, state) * slope
            late = self.teacher_velocity(prior, ahead, s.clamp(min=self.teacher.t_min))
            second = ahead - per_sample(s, state) * late
            slope = (state - (first + second) / 2) / per_sample(t, state)
        return fm.discrete_target(shorter, slope, duration, step)

    def _error(self, velocity: Tensor, goal: Tensor, prior: StartStates, duration: Tensor) -> Tensor:
        """Per sample (B,)."""
        if self.config.form == "velocity" and self.metric is None:
            return (velocity - goal).square().flatten(1).mean(dim=1)
        s = self.teacher.t_max - duration
        noise = prior.start / self.teacher.t_max
        own, wanted = (bs.signal(fm.end_point(prior.start, duration, v), noise, s) for v in (velocity, goal))
        if self.metric is None:
            return (own - wanted).square().flatten(1).mean(dim=1)
        found = self.metric(own, wanted)
        if found.ndim == 0 or len(found) != len(own):
            raise UserError(f"method.metric returned the shape {tuple(found.shape)} for {len(own)} samples; it must "
                            "return one figure a sample, (B,) or (B, ...), not their mean")
        return found.reshape(len(own), -1).mean(dim=1)

    # --- passes and draws

    def _velocity(self, student: Callable[..., Tensor], prior: StartStates, duration: Tensor) -> Tensor:
        return student(prior.start, at_t_max(self.teacher, prior.start), prior.condition, duration=duration)

    def teacher_velocity(self, prior: StartStates, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's guided velocity, through its thresholded estimate of the data when that is asked for."""
        velocity = self.teacher.velocity(x, t, prior.condition, self.config.guidance_scale)
        if self.config.threshold == "none":
            return velocity
        time = per_sample(t, x)
        clean = bs.threshold(x - time * velocity, self.config.threshold, self.config.threshold_percentile)
        return (x - clean) / time.clamp(min=1e-6)


def _metric(name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """None for ``l2``, else what the named factory makes."""
    if name == "l2":
        return None
    if not is_object(name):
        raise UserError(f"method.metric is '{name}'; it must be l2 or 'package.module:factory'")
    try:
        return load_object(name, "method.metric")()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise UserError(f"method.metric is '{name}', and what it names could not be made: {error}") from error
