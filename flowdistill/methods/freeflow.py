"""FreeFlow: flow-map distillation without data (Tong, Ma, Xie, Jaakkola; arXiv 2511.19428).

The student's average velocity V(n, d) learns on its own states only. Each batch of prior noise is split:

    prediction   d ~ p(d):  Delta_G = V + d dV/dd - v_teacher(f(n, d), t_max - d)          (Eqs. 7-9)
    correction   d = t_max: Delta_N = v_critic(x_r, r) - v_teacher(x_r, r)                 (Eqs. 10, 11)

    loss = mean <V, sg(Delta)>, with Delta_G damped and Delta_N scaled to its size         (section 5)

and the critic, an online velocity network, follows the student's samples by flow matching. No data anywhere. The
paired regression of DMD (arXiv 2311.18828) on the teacher's own samples can be added; it is no part of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import OptimizerConfig, needs, option, validate
from flowdistill.methods.regression import Regression, regression_error
from flowdistill.networks.attention import allow_forward_mode, no_forward_mode
from flowdistill.networks.critic import critic_loss, make_critic
from flowdistill.networks.lora import CriticKind
from flowdistill.objectives import distribution_matching as dm
from flowdistill.objectives import flow_map as fm
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import Teacher
from flowdistill.teachers.start_states import StartStates, at_t_max, check_guidance, draw_start_states
from flowdistill.training.method import (
    About,
    Role,
    SingleStudentMethod,
    Suggestion,
    register_method,
    start_before_noise,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw


@dataclass
class FreeFlowConfig(Regression, CriticKind):
    """Settings of FreeFlow. "(paper: ...)" marks a value its authors report; every other default is ours."""

    name: str = "freeflow"
    prediction_fraction: float = option(0.75, "share of the batch for Delta_G (paper: 0.75)", at_least=0, at_most=1)
    prediction_only_steps: int = option(0, "steps at the start without Delta_N; the critic learns in them", at_least=0)
    damping: float = option(1.0, "k of the power-law damping of Delta_G (paper: 1 with both objectives)", at_least=0)
    damping_epsilon: float = option(1e-3, "added to the squared size that damps", above=0)
    correction_strength: float = option(1.0, "alpha, size of Delta_N against Delta_G (paper: stable 0.3-3)", above=0)
    balance_epsilon: float = option(1e-8, "added to the size of Delta_N that it is divided by", above=0)
    balance_after_damping: bool = option(True, "take the size of Delta_G after the damping")
    derivative: str = option("finite_difference", "dV/dd; discrete: one teacher Euler step from the shorter map",
                             choices=("finite_difference", "jvp", "discrete"))
    finite_difference_step: float = option(0.02, "step in duration, in units of t", above=0, at_most=1)
    duration_sampling: str = option("uniform", "durations of Delta_G", choices=("uniform", "logit_normal"))
    duration_mean: float = option(0.0, "mean of the logit-normal durations",
                                  only=needs("duration_sampling", "logit_normal"))
    duration_std: float = option(1.0, "standard deviation of the logit-normal durations", above=0,
                                 only=needs("duration_sampling", "logit_normal"))
    noising_mean: float = option(0.8, "mean of the logit-normal noise level of Delta_N (paper: 0.8)")
    noising_std: float = option(1.0, "standard deviation of the logit-normal noise level of Delta_N", above=0)
    critic_noising_sampling: str = option("uniform", "noise levels the critic learns at",
                                          choices=("uniform", "logit_normal"))
    critic_updates: int = option(1, "critic steps a student step", at_least=1)
    critic_fraction: float = option(1.0, "rows of a critic step, as a share of the batch", above=0, at_most=1)
    guidance_min: float = option(1.0, "smallest guidance scale the student learns", at_least=0)
    guidance_max: float = option(1.0, "largest; above the smallest, the scale is an input of the student", at_least=0)
    guidance_interval: list[float] = option([0.0, 1.0], "times with guidance in Delta_G: the teacher's own recipe",
                                            length=2, at_least=0, at_most=1)
    correction_guidance_interval: list[float] = option([0.0, 0.7], "times with guidance in Delta_N (paper: 0 to 0.7)",
                                                       length=2, at_least=0, at_most=1)
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the student")
    critic_optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the critic")

    def validate(self) -> None:
        """Raise a :class:`UserError` for values that make no sense together."""
        if self.guidance_min > self.guidance_max:
            raise UserError(f"method.guidance_min is {self.guidance_min}, above method.guidance_max "
                            f"{self.guidance_max}")
        for key in ("guidance_interval", "correction_guidance_interval"):
            low, high = getattr(self, key)
            if low >= high:
                raise UserError(f"method.{key} is [{low}, {high}]; the first must be below the second")
        self.check_regression(self.guidance_min, self.guidance_max, self.guidance_interval)


Networks = Mapping[str, Callable[..., Tensor]]


@register_method
class FreeFlow(SingleStudentMethod):
    """The method: which networks train, in which order, on which objective."""

    name = "freeflow"
    Config = FreeFlowConfig
    about = About("a flow map from noise that predicts the teacher's trajectory and corrects its own samples",
                  "FreeFlow, arXiv 2511.19428")

    def __init__(
        self, config: FreeFlowConfig, teacher: Teacher, student_network: nn.Module | None = None,
        critic_network: nn.Module | None = None,
    ) -> None:
        """Networks of one's own (for teachers without a backbone) take the signatures of ``ExtendedVelocity``."""
        validate(config, prefix="method.")
        self.config, self.teacher = config, teacher
        scales = (config.guidance_min, config.guidance_max)
        self.scales, self.guidance_input = None if scales == (1.0, 1.0) else scales, scales[0] < scales[1]
        check_guidance(teacher, {"guidance_min": config.guidance_min, "guidance_max": config.guidance_max})
        info = StudentInfo(self.name, teacher.source, guidance_range=scales if self.guidance_input else None,
                           guidance_scale=sum(scales) / 2)
        self._student = FlowMap.from_teacher(teacher, info, student_network, lora=config.student_lora)
        self.pairs = config.make_pairs(teacher, info.guidance_scale)
        self.forward_mode = config.derivative == "jvp"
        if self.forward_mode:
            allow_forward_mode(self._student.network, "method.derivative=jvp")
        self.critic = None
        if config.prediction_fraction < 1:
            scalars = ("guidance",) if self.guidance_input else ()
            self.critic = critic_network or make_critic(teacher.network, config.critic_lora, scalars)

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return [*start_before_noise(teacher), *super().suggest(teacher, guidance)]

    def roles(self) -> dict[str, Role]:
        critic = {} if self.critic is None else {"critic": Role(self.critic, self.config.critic_optimizer)}
        return super().roles() | critic

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student",) + ("critic",) * (self.config.critic_updates if self.critic is not None else 0)

    def shown(self, role: str) -> str | None:
        if role != "student":
            return None
        return "prediction_residual" if self.config.prediction_fraction else "correction_residual"

    def loss(self, role: str, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        return self._student_loss(networks, draw) if role == "student" else self._critic_loss(networks, draw)

    # --- the algorithm

    def _student_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        local = draw.rows // draw.world
        alone = draw.step < self.config.prediction_only_steps
        predicted = local if alone else round(self.config.prediction_fraction * local)
        prior = draw_start_states(self.teacher, draw, draw.rows, self.scales)
        duration = self._durations(draw)
        duration[predicted:] = self.teacher.t_max
        prediction, correction = slice(0, predicted), slice(predicted, local)
        # Passes without gradients come first: the one with gradients is the last before the backward pass.
        target = self._target(networks["student"], prior.rows(prediction), duration[prediction]) if predicted else None
        velocity = self._average_velocity(networks["student"], prior, duration)
        own = velocity.detach()

        parts, metrics = [], {}
        if target is not None:
            residual = target(own[prediction])
            damped = fm.damp(residual, self.config.damping, self.config.damping_epsilon)
            metrics["prediction_residual"] = residual.square().mean()
            parts.append(damped)
        if predicted < local:
            noising = self._correction(networks["critic"], prior.rows(correction), own[correction], draw)
            metrics["correction_residual"] = noising.square().mean()
            if target is not None:
                reference = damped if self.config.balance_after_damping else residual
                one, other = (draw.mean(r.flatten(1).norm(dim=1)) for r in (reference, noising))
                weight = dm.balance(one, other, self.config.correction_strength, self.config.balance_epsilon)
                metrics["correction_weight"], noising = weight, weight * noising
            parts.append(noising)
        loss = fm.velocity_matching_loss(velocity, torch.cat(parts)).mean()
        if self.pairs is not None:
            error = regression_error(self.pairs, self.teacher, draw, partial(self._generate, networks["student"]))
            metrics["regression_error"] = error.detach()
            loss = loss + self.config.regression_weight * error
        return loss, metrics

    @torch.no_grad()
    def _target(
        self, student: Callable[..., Tensor], prior: StartStates, duration: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Delta_G as a function of the student's own velocity V(n, d), known only after its pass with gradients."""
        t_max, interval, step = self.teacher.t_max, self.config.guidance_interval, self.config.finite_difference_step
        if self.config.derivative == "discrete":
            steps = duration.clamp(max=step)
            before = duration - steps
            shorter = self._average_velocity(student, prior, before)
            state = fm.end_point(prior.start, before, shorter)
            teacher = self._teacher_velocity(state, t_max - before, prior, interval)
            goal = fm.discrete_target(shorter, teacher, duration, steps)
            return lambda own: own - goal
        derivative = self.derivative(student, prior, duration)

        def residual(own: Tensor) -> Tensor:
            state = fm.end_point(prior.start, duration, own)
            teacher = self._teacher_velocity(state, t_max - duration, prior, interval)
            return fm.generating_residual(own, derivative, duration, teacher)

        return residual

    @torch.no_grad()
    def derivative(self, student: Callable[..., Tensor], prior: StartStates, duration: Tensor) -> Tensor:
        """dV/dd, start fixed."""
        if self.forward_mode:
            try:
                return fm.duration_derivative_jvp(lambda d: self._average_velocity(student, prior, d), duration)
            except (NotImplementedError, RuntimeError) as error:
                self.forward_mode = no_forward_mode(error, "method.derivative=jvp", "finite differences are used")
        both, step = prior.twice(), self.config.finite_difference_step
        return fm.duration_derivative(
            lambda d: self._average_velocity(student, both, d), duration, step, self.teacher.t_max
        )

    @torch.no_grad()
    def _correction(self, critic: Callable[..., Tensor], prior: StartStates, velocity: Tensor, draw: Draw) -> Tensor:
        """Delta_N at the student's noised one-step samples."""
        sample, count = prior.start - self.teacher.t_max * velocity, len(velocity) * draw.world
        time = self._noise_levels(draw, count, "logit_normal")
        state = dm.noised(sample, draw.normal(self.teacher.shape, rows=count), time)
        teacher = self._teacher_velocity(state, time, prior, self.config.correction_guidance_interval)
        return dm.noising_residual(critic(state, time, prior.condition, **self._scalars(prior)), teacher)

    def _critic_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        rows = max(1, round(self.config.critic_fraction * draw.rows / draw.world)) * draw.world
        prior = draw_start_states(self.teacher, draw, rows, self.scales)
        with torch.no_grad():
            sample = self._sample(networks["student"], prior)
        time = self._noise_levels(draw, rows, self.config.critic_noising_sampling)
        noise = draw.normal(self.teacher.shape, rows=rows)
        velocity = networks["critic"](dm.noised(sample, noise, time), time, prior.condition, **self._scalars(prior))
        return critic_loss(velocity, sample, noise, time, self.teacher.path).mean(), {}

    # --- passes

    def _average_velocity(self, student: Callable[..., Tensor], prior: StartStates, duration: Tensor) -> Tensor:
        time = at_t_max(self.teacher, prior.start)
        return student(prior.start, time, prior.condition, **self._scalars(prior), duration=duration)

    def _sample(self, student: Callable[..., Tensor], prior: StartStates) -> Tensor:
        """f(n, t_max)."""
        whole = torch.full((len(prior.start),), self.teacher.t_max, device=prior.start.device)
        return prior.start - self.teacher.t_max * self._average_velocity(student, prior, whole)

    def _generate(self, student: Callable[..., Tensor], noise: Tensor, condition: Condition | None) -> Tensor:
        return self._sample(student, StartStates(self.teacher.t_max * noise, condition))

    def _scalars(self, prior: StartStates) -> dict[str, Tensor]:
        return {"guidance": prior.guidance} if self.guidance_input and prior.guidance is not None else {}

    def _teacher_velocity(self, x: Tensor, t: Tensor, prior: StartStates, interval: list[float]) -> Tensor:
        with torch.no_grad():
            if prior.guidance is None:
                return self.teacher.velocity(x, t, prior.condition)
            return self.teacher.velocity(x, t, prior.condition, prior.guidance, (interval[0], interval[1]))

    # --- draws

    def _durations(self, draw: Draw) -> Tensor:
        if self.config.duration_sampling == "logit_normal":
            return self.teacher.t_max * draw.logit_normal(self.config.duration_mean, self.config.duration_std)
        return self.teacher.t_max * (1 - draw.uniform())  # in (0, 1]: at 0 the boundary holds already

    def _noise_levels(self, draw: Draw, rows: int, sampling: str) -> Tensor:
        mean, std = self.config.noising_mean, self.config.noising_std
        share = draw.uniform(rows=rows) if sampling == "uniform" else draw.logit_normal(mean, std, rows)
        return self.teacher.t_min + (self.teacher.t_max - self.teacher.t_min) * share
