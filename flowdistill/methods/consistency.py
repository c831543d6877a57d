"""Consistency distillation: a generator of one to eight steps whose jump is the same all along a teacher's trajectory.

With f(x, t) = x - (t - r) u(x, t) the student's jump from t to r, a training step is

    discrete       x_s = one step of the teacher's solver from x_t to the next time s of a grid, s >= r
                   loss = metric(f(x_t, t) - sg f(x_s, s))
                   CD (Song et al., arXiv 2303.01469), LCM (Luo et al., arXiv 2310.04378), LCM-LoRA (arXiv 2311.05556)
    continuous     R = u + (t - r) D u - v_teacher,  loss = <u, sg(weight R)>
                   sCM (Lu and Song, arXiv 2410.11081), D u by finite or forward-mode differentiation

where r = 0, the image, with one phase; with as many phases as the student has steps it is the time of the next step
(PCM, Wang et al., arXiv 2405.18407). The first are sampled with fresh noise between the steps, the second with Euler
steps: that is the rule by which either is exact at its optimum (``students/steps.py``).

States x_t = (1 - t) x_0 + t n are some of the teacher's own samples, made once, or the student's, or real images, with
fresh noise. The target is the teacher's velocity wherever the state is, so all three have the teacher's map as their
optimum. At the time of the first step, where sampling has noise alone, so has the training.

With ``correction_strength`` FreeFlow's correction works on the samples of the student's own calls
(``methods/correction.py``): Delta = v_critic - v_teacher at a noised sample says how the jump to the image is to move,
and (t - r) Delta how its velocity is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import OptimizerConfig, needs, option, validate
from flowdistill.export.pipelines import check_exportable
from flowdistill.methods.correction import Correction, Path, PathCorrection
from flowdistill.methods.states import NoisedSamples, draw_clean, noised_or_start
from flowdistill.networks.attention import allow_forward_mode, no_forward_mode
from flowdistill.networks.velocity import per_sample
from flowdistill.objectives import consistency as cm
from flowdistill.objectives import flow_map as fm
from flowdistill.students import START_UNITS, Generator, StudentInfo, given_times
from flowdistill.students.steps import MOST_STEPS, Steps, rollout, start_scale
from flowdistill.teachers import Teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.teachers.start_states import check_guidance
from flowdistill.training.average import follow
from flowdistill.training.method import (
    About,
    Method,
    Role,
    SingleStudentMethod,
    Suggestion,
    register_method,
    start_before_noise,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.numbers import MOST_CALLS
from flowdistill.utils.randomness import Draw

SAME_TIME = 1e-6
"""Times of the grid this near are one."""


@dataclass
class ConsistencyConfig(NoisedSamples, Correction):
    """Settings of consistency distillation. "(...: ...)" marks a published value; every other default is ours."""

    name: str = "consistency"
    steps: int = option(1, "calls of the student for an image", at_least=1, at_most=MOST_STEPS)
    step_times: list[float] | None = option(
        None, "times of the calls, falling, from the teacher's t_max on; null: those of the teacher's own sampler",
        at_least=0,
    )
    start_unit: str = option("linear", "unit of step_times: t, the network's timestep, or EDM's sigma",
                             choices=START_UNITS, only=needs("step_times"))
    phases: int = option(
        1, "1: every call aims at the image, and fresh noise comes between calls (stochastic steps); as many as steps: "
        "each aims at the time of the next call, by Euler steps (deterministic steps; PCM)", at_least=1,
        at_most=MOST_STEPS,
    )
    derivative: str = option(
        "discrete", "discrete: between neighbouring times of a grid (CD, LCM, PCM); finite_difference and jvp: along "
        "the trajectory's tangent (sCM)", choices=("discrete", "finite_difference", "jvp"),
    )
    points: int = option(
        50, "discrete: steps of the teacher's own sampler whose times are the grid, with those of the calls besides "
        "(authors of LCM: 50)", at_least=1, at_most=MOST_CALLS, only=needs("derivative", "discrete"))
    solver: str = option("euler", "discrete: the teacher's step (authors of LCM: euler, which is DDIM; of CD: heun)",
                         choices=("euler", "heun"), only=needs("derivative", "discrete"))
    loss: str = option("huber", "discrete: l2, or the pseudo-Huber loss of each element (authors of LCM: either)",
                       choices=("l2", "huber"), only=needs("derivative", "discrete"))
    huber_c: float = option(1e-3, "huber: difference below which it is a square (authors of LCM: 1e-3)", above=0,
                            only=needs("loss", "huber"))
    weight: str = option(
        "one", "discrete: weight of the loss at a time: one (authors of CD and LCM), or inverse_step, the grid's mean "
        "step over the step there", choices=("one", "inverse_step"), only=needs("derivative", "discrete"))
    target: str = option(
        "online", "discrete: network of the target: the student (authors of LCM-LoRA), or ema, a moving average of it, "
        "which is a network more in memory (authors of CD and LCM)", choices=("online", "ema"),
    )
    target_decay: float = option(0.95, "of that average (authors of CD and LCM: 0.95)", at_least=0, below=1)
    call_fraction: float = option(0.0, "share of the rows that are at times of the student's own calls", at_least=0,
                                  at_most=1)
    time: NoiseLevels = option(NoiseLevels, "finite_difference, jvp: times of the other rows",
                               only=needs("derivative", "finite_difference", "jvp"))
    data_std: float = option(1.0, "finite_difference, jvp: standard deviation of the data in sCM's weights", above=0,
                             only=needs("derivative", "finite_difference", "jvp"))
    tangent_warmup: int = option(
        0, "finite_difference, jvp: steps in which the derivative comes in, from regression to the teacher's velocity "
        "on (NVIDIA's FastGen: 10,000; SANA-Sprint: 4,000)", at_least=0,
        only=needs("derivative", "finite_difference", "jvp"))
    tangent_constant: float = option(
        0.1, "finite_difference, jvp: c of g / (rms(g) + c), which limits the tangent g (NVIDIA's FastGen: 0.1)",
        above=0, only=needs("derivative", "finite_difference", "jvp"))
    finite_difference_step: float = option(0.005, "finite_difference: step in t", above=0, at_most=1,
                                           only=needs("derivative", "finite_difference", "jvp"))
    states: str = option(
        "pairs", "what is noised: samples of the teacher, made once (no data); samples of the student, made anew; or "
        "real images of data", choices=("pairs", "student", "data"),
    )
    guidance_min: float = option(1.0, "smallest guidance scale of the teacher", at_least=0)
    guidance_max: float = option(
        1.0, "largest; above the smallest, each row has one of the range, and the student, which is not told, learns "
        "their mean (authors of LCM-LoRA: 4 to 16)", at_least=0,
    )
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the student")

    def validate(self) -> None:
        """UserError for values that make no sense together."""
        if self.phases not in (1, self.steps):
            raise UserError(f"method.phases is {self.phases} and method.steps {self.steps}, but every call aims either "
                            "at the image or at the time of the next call; set phases to 1 or to steps")
        if self.guidance_min > self.guidance_max:
            raise UserError(f"method.guidance_min is {self.guidance_min}, above method.guidance_max "
                            f"{self.guidance_max}")
        if self.derivative != "discrete" and self.target == "ema":
            raise UserError(f"method.target is ema, but with method.derivative={self.derivative} there is no target "
                            "network; set it to online")
        if self.target != "ema" and self.target_decay != ConsistencyConfig.target_decay:
            raise UserError(f"method.target_decay is {self.target_decay}, but method.target is {self.target}, which "
                            "has no average; set target to ema too")
        self.check_states(self.states)


Networks = Mapping[str, Callable[..., Tensor]]


class Learnt(NamedTuple):
    """Of the rows that are not for the correction: each one's loss (B,) with its gradient, figures, and a function of
    the signal (B, *shape) of which <u, sg(signal)> has that gradient."""

    losses: Tensor
    figures: dict[str, Tensor]
    signal: Callable[[], Tensor]


class Rows(NamedTuple):
    """States (B, *shape) at times t (B,), their conditions, and what is learnt there from the student's velocity."""

    x: Tensor
    t: Tensor
    condition: Condition | None
    learnt: Callable[[Tensor], Learnt]


def along(student: Callable[..., Tensor]) -> Callable[[Path], Tensor]:
    """The student's velocity of the jump that a path stands before."""
    return lambda path: student(path.x, path.t, path.condition)


@register_method
class Consistency(SingleStudentMethod):
    """One network that trains; with ``target: ema`` one that follows it, and with the correction a critic."""

    name = "consistency"
    Config = ConsistencyConfig
    about = About("a generator whose jump is the same all along a trajectory of the teacher",
                  "CD, arXiv 2303.01469; LCM, 2310.04378; PCM, 2405.18407; sCM, 2410.11081",
                  networks="critic, with correction_strength")

    def __init__(
        self, config: ConsistencyConfig, teacher: Teacher, student_network: nn.Module | None = None,
        images: tuple[Tensor, Tensor] | None = None, critic_network: nn.Module | None = None,
    ) -> None:
        """``student_network`` and ``critic_network``: of one's own, called as ``(x, t, condition) -> velocity``.
        ``images``: latents-to-be (N, C, H, W) in [0, 1] and labels (N,) instead of a named set."""
        validate(config, prefix="method.")
        self.config, self.teacher = config, teacher
        scales = (config.guidance_min, config.guidance_max)
        check_guidance(teacher, {"guidance_min": scales[0], "guidance_max": scales[1]})
        if config.derivative != "discrete":
            config.time.check(teacher)
        scale = sum(scales) / 2
        info = StudentInfo(self.name, teacher.source, guidance_scale=scale)
        self.steps = steps_of(config, teacher)
        self._student = Generator.from_teacher(teacher, info, None, student_network, config.student_lora, self.steps)
        self.target: nn.Module | None = None
        if config.target == "ema":
            frozen = {id(p): p for p in self._student.network.parameters() if not p.requires_grad}
            self.target = copy.deepcopy(self._student.network, frozen)
        self.forward_mode = config.derivative == "jvp"
        if self.forward_mode:
            allow_forward_mode(self._student.network, "method.derivative=jvp")
        self.grid, self.aims = grid_of(teacher, self.steps, config.points), aims_of(self.steps, config.phases)
        if config.derivative == "discrete" and config.solver == "euler" and len(self.grid) == len(self.aims):
            raise UserError(f"method.points is {config.points}, which puts no time between those of the calls, and a "
                            "step of method.solver=euler from one to the next is the untrained student's own: there is "
                            "nothing to learn; raise points, to LCM's 50 for example, or set solver to heun")
        self.calls = torch.tensor(self.steps.times, dtype=torch.float64)
        self.samples = config.samples(config.states, teacher, scale, images)
        self.scales = None if scales == (1.0, 1.0) else scales
        self.correction = PathCorrection(config, teacher, chains_of(self.steps), self.scales, False, critic_network)

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return [*start_before_noise(teacher), *super().suggest(teacher, guidance)]

    def to(self, device: torch.device | str) -> Method:
        self.grid, self.aims, self.calls = (times.to(device) for times in (self.grid, self.aims, self.calls))
        return super().to(device)

    def roles(self) -> dict[str, Role]:
        follower = {} if self.target is None else {"target": Role(self.target, self.config.optimizer)}
        return super().roles() | follower | self.correction.roles()

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student", *self.correction.schedule())

    def after_update(self, role: str) -> None:
        if self.target is not None and role == "student":
            follow(self.target, self._student.network, 1 - self.config.target_decay)

    def calls_without_gradient(self, role: str) -> float:
        states = float(len(self.steps)) if self.config.states == "student" else 0.0
        return self.correction.calls_without_gradient(role, states)

    def shown(self, role: str) -> str | None:
        if role != "student":
            return None
        if self.config.derivative != "discrete":
            return "residual"
        return "squared_error" if self.config.correction_strength else None

    # --- the algorithm

    def loss(self, role: str, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        student, config = networks["student"], self.config
        if role == "critic":
            return self.correction.critic_loss(networks, along(student), draw)
        corrected = config.corrected_rows(draw)
        count = draw.rows - corrected * draw.world
        # Passes without gradients come first: of the student the one with gradients is the last, but for the calls that
        # follow from it.
        rows = (self._discrete if config.derivative == "discrete" else self._continuous)(networks, draw, count)
        if not corrected:
            losses, figures, _ = rows.learnt(student(*rows[:3]))
            return losses.mean(), figures
        path = self.correction.draw_path(along(student), draw, corrected * draw.world)
        conditions = [one for one in (rows.condition, path.condition) if one is not None]
        velocity = student(torch.cat([rows.x, path.x]), torch.cat([rows.t, path.t]),
                           Condition.cat(conditions) if conditions else None)
        losses, figures, signal = rows.learnt(velocity[: len(rows.x)])
        last = velocity[len(rows.x) :]
        delta = self.correction.delta(networks, along(student), path, last.detach(), draw)
        moving = cm.velocity_signal(-delta, path.t - path.r)
        weight = self.correction.weight(signal(), moving, draw)
        figures |= {"correction_residual": delta.square().mean(), "correction_weight": weight}
        return torch.cat([losses, fm.velocity_matching_loss(last, weight * moving)]).mean(), figures

    def _discrete(self, networks: Networks, draw: Draw, rows: int) -> Rows:
        config, grid = self.config, self.grid
        t = self._at_calls(grid[draw.integers(len(grid) - 1, rows)], draw)
        s, aim = self._below(grid.flip(0), t), self.aim(t)
        state, condition = self.draw_states(networks, t, draw)
        scale = self._guidance(draw, rows)
        with torch.no_grad():
            later = cm.teacher_step(lambda x, time: self.teacher.velocity(x, time, condition, scale), state, t, s,
                                    config.solver, self.teacher.t_min)
            velocity = networks["student" if self.target is None else "target"](later, s, condition)
            goal = fm.end_point(later, s - aim, velocity)
        weight = grid[0] / (len(grid) - 1) / (t - s) if config.weight == "inverse_step" else torch.ones_like(t)

        def learnt(own: Tensor) -> Learnt:
            difference = fm.end_point(state, t - aim, own) - goal
            square = difference.square().flatten(1).mean(dim=1)
            losses = square if config.loss == "l2" else cm.pseudo_huber(difference, config.huber_c)

            def signal() -> Tensor:
                d = difference.detach()
                slope = 2 * d if config.loss == "l2" else cm.pseudo_huber_slope(d, config.huber_c)
                return cm.velocity_signal(slope, weight * (t - aim))

            return Learnt(weight.to(losses.dtype) * losses, {"squared_error": square.detach().mean()}, signal)

        return Rows(state, t, condition, learnt)

    def _continuous(self, networks: Networks, draw: Draw, rows: int) -> Rows:
        config = self.config
        t = config.time.draw(self.teacher, draw, rows).double().clamp(SAME_TIME, self.steps.times[0])
        t = self._at_calls(t, draw)
        duration = t - self.aim(t)
        state, condition = self.draw_states(networks, t, draw)
        slope = self.teacher.velocity(state, t, condition, self._guidance(draw, rows))
        derivative = self.derivative(networks["student"], state, t, condition, slope)

        def learnt(own: Tensor) -> Learnt:
            share = min(1.0, draw.step / config.tangent_warmup) if config.tangent_warmup else 1.0
            residual = cm.warmed_residual(own.detach(), derivative, duration, slope, t, config.data_std, share)
            m, kappa = cm.trigonometric(t, config.data_std)
            tangent = cm.normalized(per_sample(kappa, residual) * residual, config.tangent_constant)
            signal = tangent / per_sample(m, tangent)
            return Learnt(fm.velocity_matching_loss(own, signal), {"residual": residual.square().mean()},
                          lambda: signal)

        return Rows(state, t, condition, learnt)

    @torch.no_grad()
    def derivative(
        self, student: Callable[..., Tensor], state: Tensor, t: Tensor, condition: Condition | None, slope: Tensor
    ) -> Tensor:
        """D u (B, *shape), within the phase of each row."""
        if self.forward_mode:
            try:
                return fm.total_derivative_jvp(lambda x, time: student(x, time, condition), state, t, slope)
            except (NotImplementedError, RuntimeError) as error:
                self.forward_mode = no_forward_mode(error, "method.derivative=jvp", "finite differences are used")
        both = None if condition is None else Condition.cat([condition, condition])
        h, top = self.config.finite_difference_step, self.aims[torch.searchsorted(self.aims, t)]
        # An aim's own time belongs to the phase below it, so no row looks back as far as that.
        back, ahead = ((t - self.aim(t)) / 2).clamp(max=h), (top - t).clamp(max=h)
        return fm.total_derivative(lambda x, time: student(x, time, both), state, t, slope, back, ahead)

    def aim(self, t: Tensor) -> Tensor:
        """r (B,) for times t (B,) above 0, both float64."""
        return self._below(self.aims, t)

    @staticmethod
    def _below(rising: Tensor, t: Tensor) -> Tensor:
        """The largest of ``rising`` (N,) below each t (B,)."""
        return rising[torch.searchsorted(rising, t) - 1]

    # --- draws

    def draw_states(self, networks: Networks, t: Tensor, draw: Draw) -> tuple[Tensor, Condition | None]:
        """x_t (B, *shape) at times t (B,) and their conditions; at the time of the first call, what sampling starts
        from."""
        shape, rows = self.teacher.shape, len(t) * draw.world
        if self.samples is not None:
            clean, condition = draw_clean(self.samples, self.teacher, draw, rows)
        else:
            noise, condition = draw.normal(shape, rows), self.teacher.draw_condition(draw, rows)
            with torch.no_grad():
                clean = rollout(networks["student"], noise, self.steps, condition, lambda k: draw.normal(shape, rows))
        return noised_or_start(clean, draw.normal(shape, rows), t, self.steps), condition

    def _at_calls(self, t: Tensor, draw: Draw) -> Tensor:
        """Times (B,), of which a share of ``call_fraction`` is replaced by the student's own."""
        if not self.config.call_fraction:
            return t
        rows = len(t) * draw.world
        chosen = self.calls[draw.integers(len(self.calls), rows)]
        return torch.where(draw.uniform(rows=rows) < self.config.call_fraction, chosen, t)

    def _guidance(self, draw: Draw, rows: int) -> Tensor | float:
        low, high = self.config.guidance_min, self.config.guidance_max
        return draw.uniform(low, high, rows) if low < high else low


def steps_of(config: ConsistencyConfig, teacher: Teacher) -> Steps:
    """The student's times, and the rule between them.

    Raises:
        UserError: see :func:`flowdistill.students.given_times`; or times that do not begin where the teacher's
            trajectories do; or several steps that no stock pipeline takes.
    """
    times = given_times(teacher, config.steps, None, config.start_unit, config.step_times)
    if abs(times[0] - teacher.t_max) > SAME_TIME:
        raise UserError(f"method.step_times begins at t = {times[0]:.6g}, but the teacher's trajectories begin at its "
                        f"t_max, {teacher.t_max:.6g}; begin there, or set teacher.t_max")
    stepping = "stochastic" if config.phases == 1 else "deterministic"
    scale = start_scale(teacher.path, times, stepping, teacher.prompts is not None)
    steps = Steps(times, stepping, scale, whole=config.phases > 1)
    if len(steps) > 1:
        try:
            check_exportable(teacher, steps)
        except UserError as error:
            raise UserError(f"{error}; method.phases=1 makes stochastic steps, phases={len(steps)} deterministic "
                            "ones") from None
    return steps


def chains_of(steps: Steps) -> list[Steps]:
    """The calls after which a student of ``steps`` has a sample: any number of the first ones, but of a whole chain
    all."""
    counts = [len(steps)] if steps.whole else range(1, len(steps) + 1)
    return [replace(steps, times=steps.times[:count]) for count in counts]


def grid_of(teacher: Teacher, steps: Steps, points: int) -> Tensor:
    """Falling times (N + 1,), float64, from the first call's to 0: those of the teacher's sampler of ``points`` steps,
    and of the calls."""
    own = torch.tensor([*steps.times, 0.0], dtype=torch.float64)
    times = teacher.path.time_grid(points)
    others = times[((times[:, None] - own).abs() > SAME_TIME).all(dim=1) & (times < own[0])]
    return torch.cat([own, others]).sort(descending=True).values


def aims_of(steps: Steps, phases: int) -> Tensor:
    """What the calls aim at, rising, float64, with the first call's time at the end: 0, and the times between the
    phases."""
    between = steps.times if phases > 1 else steps.times[:1]
    return torch.tensor([0.0, *reversed(between)], dtype=torch.float64)
