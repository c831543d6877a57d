"""FreeFlow: flow-map distillation without data (Tong, Ma, Xie, Jaakkola; arXiv 2511.19428).

The student's average velocity V(n, d) learns on its own states only. Each batch of prior noise is split:

    prediction   d ~ p(d):  Delta_G = V + d dV/dd - v_teacher(f(n, d), t_max - d)          (Eqs. 7-9)
    correction   d = t_max: Delta_N = v_critic(x_r, r) - v_teacher(x_r, r)                 (Eqs. 10, 11)

    loss = mean <V, sg(Delta)>, with Delta_G damped and Delta_N scaled to its size         (section 5)

and the critic, an online velocity network, follows the student's samples by flow matching. No data anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowdistill.conditions import Condition
from flowdistill.config import OptimizerConfig
from flowdistill.errors import UserError
from flowdistill.methods.base import Draw, Role
from flowdistill.objectives import distribution_matching as dm
from flowdistill.objectives import flow_map as fm
from flowdistill.student import FlowMap, StudentInfo
from flowdistill.teacher import Teacher
from flowdistill.teacher.lora import add_lora
from flowdistill.teacher.velocity import ExtendedVelocity


@dataclass
class FreeFlowConfig:
    """Settings of FreeFlow. "Paper" marks a value its authors report; every other default is ours, not the paper's."""

    name: str = "freeflow"
    prediction_fraction: float = 0.75  # share of the batch for Delta_G; the rest is Delta_N. Paper: 0.75
    damping: float = 1.0  # k of the power-law damping of Delta_G. Paper: 1 with both objectives
    damping_epsilon: float = 1e-3  # ours (not in any readable source)
    correction_strength: float = 1.0  # alpha. Paper: stable over 0.3 to 3
    balance_after_damping: bool = True  # ours: E||Delta_G|| is taken after the damping
    derivative: str = "finite_difference"  # of V in duration: finite_difference, jvp, or discrete (one Euler step)
    finite_difference_step: float = 0.02  # ours, in units of t
    duration_sampling: str = "uniform"  # uniform or logit_normal; ours (not in any readable source)
    duration_mean: float = 0.0  # of the logit-normal
    duration_std: float = 1.0
    noising_mean: float = 0.8  # of the logit-normal noise level r of Delta_N. Paper: 0.8
    noising_std: float = 1.0  # ours
    critic_noising_sampling: str = "uniform"  # noise level for the critic's own loss; ours
    critic_updates: int = 1  # critic steps a student step; ours
    critic_fraction: float = 1.0  # rows of the critic's batch, as a share of the batch; ours
    critic: str = "full"  # full copy of the teacher, or lora
    critic_lora_rank: int = 16
    guidance_min: float = 1.0  # guidance scales the student learns, uniform in [min, max]; ours
    guidance_max: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times with guidance in Delta_G: the teacher's own recipe
    correction_guidance_interval: tuple[float, float] = (0.0, 0.7)  # in Delta_N. Paper: cut the high-noise side, 0.7
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))

    def validate(self) -> None:
        """Raise a :class:`UserError` for values that make no sense together."""
        choices = {
            "derivative": ("finite_difference", "jvp", "discrete"),
            "duration_sampling": ("uniform", "logit_normal"),
            "critic_noising_sampling": ("uniform", "logit_normal"),
            "critic": ("full", "lora"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"method.{key} is '{getattr(self, key)}'; allowed are {', '.join(allowed)}")
        if not 0 <= self.prediction_fraction <= 1:
            raise UserError(f"method.prediction_fraction is {self.prediction_fraction}; it must lie in [0, 1]")
        if not 0 < self.critic_fraction <= 1:
            raise UserError(f"method.critic_fraction is {self.critic_fraction}; it must lie in (0, 1]")
        if self.guidance_min > self.guidance_max:
            raise UserError(f"method.guidance_min is {self.guidance_min}, above method.guidance_max "
                            f"{self.guidance_max}")
        for key in ("damping_epsilon", "finite_difference_step", "noising_std", "duration_std", "correction_strength"):
            if getattr(self, key) <= 0:
                raise UserError(f"method.{key} is {getattr(self, key)}; it must be positive")
        for key in ("critic_updates", "critic_lora_rank"):
            if getattr(self, key) < 1:
                raise UserError(f"method.{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("guidance_interval", "correction_guidance_interval"):
            low, high = getattr(self, key)
            if not 0 <= low < high <= 1:
                raise UserError(f"method.{key} is [{low}, {high}]; it needs 0 <= low < high <= 1")


class FreeFlow:
    """The method: which networks train, in which order, on which objective."""

    name = "freeflow"
    Config = FreeFlowConfig

    def __init__(
        self,
        config: FreeFlowConfig,
        teacher: Teacher,
        student_network: nn.Module | None = None,
        critic_network: nn.Module | None = None,
    ) -> None:
        """Networks of one's own (for teachers without a backbone) take the signatures of :class:`ExtendedVelocity`."""
        config.validate()
        self.config, self.teacher = config, teacher
        self.guided = (config.guidance_min, config.guidance_max) != (1.0, 1.0)
        self.guidance_input = config.guidance_min < config.guidance_max
        if self.guided and teacher.null_label is None:
            raise UserError("method.guidance_min and method.guidance_max ask for classifier-free guidance, but the "
                            "teacher has no null label; set both to 1, or teacher.null_label")
        info = StudentInfo(
            method=self.name,
            base_model=teacher.source,
            guidance_range=(config.guidance_min, config.guidance_max) if self.guidance_input else None,
            guidance_scale=(config.guidance_min + config.guidance_max) / 2,
        )
        self._student = FlowMap.from_teacher(teacher, info, student_network)
        self.critic = None
        if config.prediction_fraction < 1:
            self.critic = critic_network or self._make_critic()

    def _make_critic(self) -> ExtendedVelocity:
        scalars = ("guidance",) if self.guidance_input else ()
        if self.config.critic == "full":
            return ExtendedVelocity(self.teacher.network.trainable_copy(), scalars)
        critic = ExtendedVelocity(self.teacher.network.frozen_copy(), scalars)
        add_lora(critic.velocity.backbone, self.config.critic_lora_rank)
        return critic

    # --- what the trainer asks for

    def roles(self) -> dict[str, Role]:
        roles = {"student": Role(self._student.network, self.config.optimizer, ema=True)}
        if self.critic is not None:
            roles["critic"] = Role(self.critic, self.config.critic_optimizer)
        return roles

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student",) + ("critic",) * (self.config.critic_updates if self.critic is not None else 0)

    def student(self, network: nn.Module | None = None) -> FlowMap:
        return self._student if network is None else self._student.with_network(network)

    def to(self, device: torch.device | str) -> FreeFlow:
        self.teacher.to(device)
        self._student.to(device)
        if self.critic is not None:
            self.critic.to(device)
        return self

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._student_loss(networks, draw) if role == "student" else self._critic_loss(networks, draw)

    # --- the algorithm

    def _student_loss(
        self, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw.rows // draw.world
        predicted = round(self.config.prediction_fraction * rows)
        noise, condition, guidance = self._prior(draw, draw.rows)
        start = self.teacher.t_max * noise
        duration = self._durations(draw)
        duration[predicted:] = self.teacher.t_max

        prediction = slice(0, predicted)
        derivative = None
        if predicted and self.config.derivative != "discrete":  # before the pass with gradients: see ExtendedVelocity
            derivative = self._derivative(
                networks["student"], start[prediction], duration[prediction],
                _rows(condition, prediction), _rows(guidance, prediction),
            )
        discrete = None
        if predicted and derivative is None:
            discrete = self._discrete_residual(networks["student"], start, duration, condition, guidance, prediction)
        velocity = self._average_velocity(networks["student"], start, duration, condition, guidance)
        fixed = velocity.detach()

        parts, metrics, damped = [], {}, None
        if predicted:
            own = fixed[prediction]
            if derivative is not None:
                state = fm.end_point(start[prediction], duration[prediction], own)
                target = self._teacher_velocity(
                    state, self.teacher.t_max - duration[prediction], _rows(condition, prediction),
                    _rows(guidance, prediction), self.config.guidance_interval,
                )
                residual = fm.generating_residual(own, derivative, duration[prediction], target)
            else:
                residual = own - discrete
            damped = fm.damp(residual, self.config.damping, self.config.damping_epsilon)
            parts.append(damped)
            metrics["prediction_residual"] = residual.square().mean()
        if predicted < rows:
            corrected = slice(predicted, rows)
            residual = self._correction(
                networks["critic"], fixed[corrected], start[corrected], _rows(condition, corrected),
                _rows(guidance, corrected), draw,
            )
            metrics["correction_residual"] = residual.square().mean()
            if damped is not None:
                reference = damped if self.config.balance_after_damping else parts[0]
                weight = dm.balance(
                    draw.mean(_norms(reference)), draw.mean(_norms(residual)), self.config.correction_strength, 1e-8
                )
                metrics["correction_weight"] = weight
                residual = weight * residual
            parts.append(residual)
        return fm.velocity_matching_loss(velocity, torch.cat(parts)).mean(), metrics

    @torch.no_grad()
    def _correction(
        self, critic: Callable[..., Tensor], velocity: Tensor, start: Tensor, condition: Condition | None,
        guidance: Tensor | None, draw: Draw,
    ) -> Tensor:
        """Delta_N at the student's noised one-step samples."""
        whole = torch.full((len(start),), self.teacher.t_max, device=start.device)
        sample = fm.end_point(start, whole, velocity)
        count = len(start) * draw.world
        time = self._noise_levels(draw, count, "logit_normal")
        state = dm.noised(sample, draw.normal(self.teacher.shape, rows=count), time)
        teacher = self._teacher_velocity(state, time, condition, guidance, self.config.correction_guidance_interval)
        return dm.noising_residual(self._critic_velocity(critic, state, time, condition, guidance), teacher)

    def _critic_loss(
        self, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = max(1, round(self.config.critic_fraction * draw.rows / draw.world)) * draw.world
        noise, condition, guidance = self._prior(draw, rows)
        with torch.no_grad():
            start = self.teacher.t_max * noise
            whole = torch.full((len(start),), self.teacher.t_max, device=start.device)
            velocity = self._average_velocity(networks["student"], start, whole, condition, guidance)
            sample = fm.end_point(start, whole, velocity)
        time = self._noise_levels(draw, rows, self.config.critic_noising_sampling)
        fresh = draw.normal(self.teacher.shape, rows=rows)
        state = dm.noised(sample, fresh, time)
        predicted = self._critic_velocity(networks["critic"], state, time, condition, guidance)
        return dm.flow_matching_loss(predicted, sample, fresh).mean(), {}

    # --- passes

    def _average_velocity(
        self, student: Callable[..., Tensor], start: Tensor, duration: Tensor, condition: Condition | None,
        guidance: Tensor | None,
    ) -> Tensor:
        time = torch.full((len(start),), self.teacher.t_max, dtype=torch.float64, device=start.device)
        return student(start, time, condition, **self._scalars(guidance), duration=duration)

    def _critic_velocity(
        self, critic: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition | None, guidance: Tensor | None
    ) -> Tensor:
        return critic(x, t, condition, **self._scalars(guidance))

    def _scalars(self, guidance: Tensor | None) -> dict[str, Tensor]:
        return {"guidance": guidance} if self.guidance_input and guidance is not None else {}

    @torch.no_grad()
    def _teacher_velocity(
        self, x: Tensor, t: Tensor, condition: Condition | None, guidance: Tensor | None,
        interval: tuple[float, float],
    ) -> Tensor:
        if guidance is None:
            return self.teacher.velocity(x, t, condition)
        return self.teacher.velocity(x, t, condition, guidance, (interval[0], interval[1]))

    @torch.no_grad()
    def _derivative(
        self, student: Callable[..., Tensor], start: Tensor, duration: Tensor, condition: Condition | None,
        guidance: Tensor | None,
    ) -> Tensor:
        if self.config.derivative == "jvp":
            return fm.duration_derivative_jvp(
                lambda d: self._average_velocity(student, start.contiguous(), d, condition, guidance), duration
            )
        twice = None if condition is None else Condition.cat([condition, condition])
        both = None if guidance is None else torch.cat([guidance, guidance])
        return fm.duration_derivative(
            lambda d: self._average_velocity(student, torch.cat([start, start]), d, twice, both),
            duration, self.config.finite_difference_step, self.teacher.t_max,
        )

    @torch.no_grad()
    def _discrete_residual(
        self, student: Callable[..., Tensor], start: Tensor, duration: Tensor, condition: Condition | None,
        guidance: Tensor | None, rows: slice,
    ) -> Tensor:
        """The target V*(d) of one teacher Euler step from the student's shorter map."""
        start, duration = start[rows], duration[rows]
        condition, guidance = _rows(condition, rows), _rows(guidance, rows)
        step = duration.clamp(max=self.config.finite_difference_step)
        before = duration - step
        shorter = self._average_velocity(student, start, before, condition, guidance)
        state = fm.end_point(start, before, shorter)
        teacher = self._teacher_velocity(
            state, self.teacher.t_max - before, condition, guidance, self.config.guidance_interval
        )
        return fm.discrete_target(shorter, teacher, duration, step)

    # --- draws

    def _prior(self, draw: Draw, rows: int) -> tuple[Tensor, Condition | None, Tensor | None]:
        noise = draw.normal(self.teacher.shape, rows=rows)
        classes = self.teacher.classes
        condition = None if classes is None else classes.wrap(draw.integers(classes.num_classes, rows=rows))
        guidance = None
        if self.guided:
            guidance = draw.uniform(self.config.guidance_min, self.config.guidance_max, rows=rows)
        return noise, condition, guidance

    def _durations(self, draw: Draw) -> Tensor:
        if self.config.duration_sampling == "uniform":
            share = 1 - draw.uniform()  # in (0, 1]: duration 0 teaches nothing but the boundary, which holds already
        else:
            share = torch.sigmoid(self.config.duration_mean + self.config.duration_std * draw.normal(()))
        return self.teacher.t_max * share

    def _noise_levels(self, draw: Draw, rows: int, sampling: str) -> Tensor:
        if sampling == "uniform":
            share = draw.uniform(rows=rows)
        else:
            share = torch.sigmoid(self.config.noising_mean + self.config.noising_std * draw.normal((), rows=rows))
        return self.teacher.t_min + (self.teacher.t_max - self.teacher.t_min) * share


def _rows(value, rows: slice):
    return None if value is None else value[rows]


def _norms(residual: Tensor) -> Tensor:
    return residual.flatten(1).norm(dim=1)
