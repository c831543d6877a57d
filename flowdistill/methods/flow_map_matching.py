"""Flow maps between any two times, matched to a teacher: a student of one to eight calls from one training.

The student's average velocity u(x, t, r) learns that its jump X(x, t, r) = x - (t - r) u(x, t, r) goes along the
teacher's ODE, by one of the identities of such maps (``objectives/flow_map.py``):

    lagrangian    R = u - (t - r) du/dr - v_teacher(X, r)    along the end of the jump, which is the student's own
                  (LMD of Boffi et al., arXiv 2406.07507; at t = t_max it is FreeFlow's, arXiv 2511.19428, Eqs. 7 to 9)
    eulerian      R = u + (t - r) D u - v_teacher(x, t)      along its start (MeanFlow, arXiv 2505.13447, and AYF, arXiv
                  2506.14603, with the teacher's velocity)
    semigroup     R = u - the average of two jumps with the middle time between (Shortcut, arXiv 2410.12557)

    loss = mean <u, sg(R)>, with R damped

and on a share of the rows r = t, where R = u - v_teacher(x, t). States x are the student's own, X(n, t_max, t), so
that no data is needed; or noised samples of the teacher, or noised real images. With a velocity of the teacher's and
not of a pair of image and noise the optimum is the same on all of them.

With ``correction_strength`` FreeFlow's correction works on the samples of several jumps (``methods/correction.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import OptimizerConfig, needs, option, validate
from flowdistill.export.pipelines import check_exportable
from flowdistill.methods.correction import Correction, Path, PathCorrection
from flowdistill.methods.states import NoisedSamples, draw_clean, noised_or_start
from flowdistill.networks.attention import allow_forward_mode, no_forward_mode
from flowdistill.objectives import flow_map as fm
from flowdistill.students import START_UNITS, FlowMap, StudentInfo, given_times
from flowdistill.students.steps import MOST_STEPS, STEPPINGS, Steps, start_scale
from flowdistill.teachers import Teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.teachers.start_states import check_guidance
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
from flowdistill.utils.randomness import Draw

SAME_TIME = 1e-6
"""Times this near are one."""
STEP = {"lagrangian": 0.02, "eulerian": 0.005}
"""Default of finite_difference_step. Only the second moves the teacher's own embedding of the time, whose fastest wave
has a period of 0.006."""

STILL = {"lagrangian": 0.25, "eulerian": 0.25, "semigroup": 0.75}
"""Default of velocity_fraction. With a quarter and damped rows a semigroup student follows its own extrapolations away
from the teacher: what pulls it back does not grow with its error."""


@dataclass
class FlowMapMatchingConfig(NoisedSamples, Correction):
    """Settings of flow maps between any two times; all defaults are ours."""

    name: str = "flow_map_matching"
    steps: int = option(8, "most calls for an image; the student takes any number up to it", at_least=1,
                        at_most=MOST_STEPS)
    step_times: list[float] | None = option(
        None, "times of the calls, falling from the teacher's t_max on, where the student is for these alone (fewer "
        "calls: the first of them); null: any times, and for each number of calls those of the teacher's own sampler",
        at_least=0,
    )
    start_unit: str = option("linear", "unit of step_times: t, the network's timestep, or EDM's sigma",
                             choices=START_UNITS, only=needs("step_times"))
    stepping: str = option("deterministic", "between calls: each jumps to the time of the next (deterministic), or to "
                           "the image, and fresh noise comes between (stochastic)", choices=STEPPINGS)
    objective: str = option("lagrangian", "identity that is matched", choices=("lagrangian", "eulerian", "semigroup"))
    derivative: str = option(
        "finite_difference", "du/dr or D u; discrete: one Euler step of the teacher in its place, with the weight of "
        "the others", choices=("finite_difference", "jvp", "discrete"),
    )
    finite_difference_step: float | None = option(
        None, "step of the difference, and of the teacher's in discrete, in units of t; null: 0.02 for lagrangian, "
        "0.005 for eulerian", above=0, at_most=1)
    states: str = option("own", "own: the student's map from noise to t; noised samples of the teacher, made once "
                         "(pairs); or noised real images of data", choices=("own", "pairs", "data"))
    time: NoiseLevels = option(NoiseLevels, "times t of the states that are not noise alone")
    start_fraction: float = option(0.5, "share of the rows with r < t that begin at noise alone, t = t_max", at_least=0,
                                   at_most=1)
    velocity_fraction: float | None = option(
        None, "share of all rows that have r = t, where u is the teacher's velocity; null: 0.25, and 0.75 for "
        "semigroup, whose other rows do not ask the teacher", at_least=0, at_most=1,
    )
    endpoint_fraction: float = option(0.25, "share of the other rows that end at the image, r = 0; with step_times, at "
                                      "0 or a time of a call", at_least=0, at_most=1)
    damping: float = option(0.5, "power of the damping of each row's residual", at_least=0)
    damping_epsilon: float = option(1e-3, "added to the squared size that damps", above=0)
    guidance_min: float = option(1.0, "smallest guidance scale the student learns", at_least=0)
    guidance_max: float = option(1.0, "largest; above the smallest, the scale is an input of the student", at_least=0)
    guidance_interval: list[float] = option([0.0, 1.0], "times with guidance: the teacher's own recipe", length=2,
                                            at_least=0, at_most=1)
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the student")

    @property
    def velocity_share(self) -> float:
        """``velocity_fraction``, or what stands for null."""
        return STILL[self.objective] if self.velocity_fraction is None else self.velocity_fraction

    def validate(self) -> None:
        """UserError for values that make no sense together."""
        self.check_states(self.states)
        if self.guidance_min > self.guidance_max:
            raise UserError(f"method.guidance_min is {self.guidance_min}, above method.guidance_max "
                            f"{self.guidance_max}")
        low, high = self.guidance_interval
        if low >= high:
            raise UserError(f"method.guidance_interval is [{low}, {high}]; the first must be below the second")
        if self.velocity_fraction == 1:
            raise UserError("method.velocity_fraction is 1, so that no row has a jump to learn; lower it")
        if self.objective != "semigroup":
            return
        if self.velocity_fraction == 0:
            raise UserError("method.velocity_fraction is 0, but with method.objective=semigroup the teacher is in its "
                            "rows only; raise it")
        for key in ("derivative", "finite_difference_step", "step_times"):
            if getattr(self, key) != getattr(FlowMapMatchingConfig, key):
                raise UserError(f"method.{key} is {getattr(self, key)}, but method.objective=semigroup learns long "
                                "jumps from short ones between any times, without a derivative; leave it out")


class Rows(NamedTuple):
    """States (B, *shape) at times t, from which jumps go to times r, with conditions and guidance scales (B,)."""

    x: Tensor
    t: Tensor
    r: Tensor
    condition: Condition | None
    guidance: Tensor | None

    def part(self, rows: slice) -> Rows:
        """Some of them."""
        condition = None if self.condition is None else self.condition[rows]
        return Rows(self.x[rows], self.t[rows], self.r[rows], condition,
                    None if self.guidance is None else self.guidance[rows])

    @classmethod
    def of(cls, path: Path) -> Rows:
        """The states of a path, and the jump that it stands before."""
        return cls(path.x, path.t, path.r, path.condition, path.guidance)

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """One after the other."""
        conditions = [part.condition for part in parts if part.condition is not None]
        scales = [part.guidance for part in parts if part.guidance is not None]
        x, t, r = (torch.cat(values) for values in zip(*(part[:3] for part in parts), strict=True))
        return cls(x, t, r, Condition.cat(conditions) if conditions else None, torch.cat(scales) if scales else None)


Student = Callable[..., Tensor]


@register_method
class FlowMapMatching(SingleStudentMethod):
    """One network that trains, and with the correction a critic."""

    name = "flow_map_matching"
    Config = FlowMapMatchingConfig
    about = About("a flow map between any two times: one training, and the number of calls is chosen afterwards",
                  "LMD, arXiv 2406.07507; AYF, 2506.14603; Shortcut, 2410.12557",
                  networks="critic, with correction_strength")

    def __init__(
        self, config: FlowMapMatchingConfig, teacher: Teacher, student_network: nn.Module | None = None,
        images: tuple[Tensor, Tensor] | None = None, critic_network: nn.Module | None = None,
    ) -> None:
        """``student_network``: of one's own, called as ``(x, t, condition, duration=, guidance=) -> velocity``, as
        ``critic_network`` without the duration.
        ``images``: latents-to-be (N, C, H, W) in [0, 1] and labels (N,) instead of a named set."""
        validate(config, prefix="method.")
        self.config, self.teacher = config, teacher
        scales = (config.guidance_min, config.guidance_max)
        check_guidance(teacher, {"guidance_min": scales[0], "guidance_max": scales[1]})
        config.time.check(teacher)
        self.scales, self.guidance_input = None if scales == (1.0, 1.0) else scales, scales[0] < scales[1]
        info = StudentInfo(self.name, teacher.source, guidance_range=scales if self.guidance_input else None,
                           guidance_scale=sum(scales) / 2)
        self.chains = chains_of(config, teacher)
        self.start = self.chains[-1]
        self._student = FlowMap.from_teacher(teacher, info, student_network, lora=config.student_lora,
                                             chains=self.chains)
        self.forward_mode = config.derivative == "jvp"
        if self.forward_mode:
            allow_forward_mode(self._student.network, "method.derivative=jvp")
        self.step = config.finite_difference_step or STEP.get(config.objective, 0.0)
        own = None if config.step_times is None else self.start.times
        self.calls = None if own is None else torch.tensor(own, dtype=torch.float64)
        self.samples = config.samples(config.states, teacher, info.guidance_scale, images)
        self.correction = PathCorrection(config, teacher, self.chains, self.scales, self.guidance_input, critic_network)

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return [*start_before_noise(teacher), *super().suggest(teacher, guidance)]

    def to(self, device: torch.device | str) -> Method:
        self.calls = None if self.calls is None else self.calls.to(device)
        return super().to(device)

    def roles(self) -> dict[str, Role]:
        return super().roles() | self.correction.roles()

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student", *self.correction.schedule())

    def calls_without_gradient(self, role: str) -> float:
        config = self.config
        moved = 1 - (1 - config.velocity_share) * config.start_fraction if config.states == "own" else 0.0
        return self.correction.calls_without_gradient(role, moved)

    def shown(self, role: str) -> str | None:
        return "residual" if role == "student" else None

    # --- the algorithm

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student, config = networks["student"], self.config
        if role == "critic":
            return self.correction.critic_loss(networks, self._along(student), draw)
        corrected = config.corrected_rows(draw)
        count = draw.rows - corrected * draw.world
        rows, still = self.draw_rows(student, draw, count)
        # Passes without gradients come first: of the student the one with gradients is the last, but for the jumps that
        # follow from it.
        residual = self._residual(student, rows, still)
        path = None
        if corrected:
            path = self.correction.draw_path(self._along(student), draw, corrected * draw.world)
        velocity = self._velocity(student, rows if path is None else Rows.joined([rows, Rows.of(path)]))
        own = velocity.detach()
        signal = residual(own[: len(rows.x)])
        metrics = {"residual": signal[still:].square().mean()}
        if still:
            metrics["velocity_error"] = signal[:still].square().mean()
        damped = fm.damp(signal, config.damping, config.damping_epsilon)
        if path is None:
            return fm.velocity_matching_loss(velocity, damped).mean(), metrics
        delta = self.correction.delta(networks, self._along(student), path, own[len(rows.x) :], draw)
        weight = self.correction.weight(damped, delta, draw)
        metrics |= {"correction_residual": delta.square().mean(), "correction_weight": weight}
        return fm.velocity_matching_loss(velocity, torch.cat([damped, weight * delta])).mean(), metrics

    # --- the map

    def draw_rows(self, student: Student, draw: Draw, count: int | None = None) -> tuple[Rows, int]:
        """``count`` rows over all processes (None: all), and the number of the first of them here, which have r = t.

        After them come those that begin at noise alone. Both parts are told by position, so that a row is in the same
        one for any number of processes that divides them.
        """
        config, count = self.config, draw.rows if count is None else count
        local = count // draw.world
        still = min(round(config.velocity_share * local), local - 1)
        starting = still + round(config.start_fraction * (local - still))
        t = self._times(draw, count)
        t[still:starting] = self.start.times[0]
        r = self._ends(t, draw, count)
        r[:still] = t[:still]
        guidance = None if self.scales is None else draw.uniform(*self.scales, rows=count)
        noise = draw.normal(self.teacher.shape, rows=count)
        if self.samples is not None:
            clean, condition = draw_clean(self.samples, self.teacher, draw, count)
            return Rows(noised_or_start(clean, noise, t, self.start), t, r, condition, guidance), still
        condition = self.teacher.draw_condition(draw, count)
        x = self.start.start(noise)
        rows = Rows(x, t, r, condition, guidance)
        moving = [slice(0, still), slice(starting, local)]
        return rows._replace(x=self._moved(student, rows, moving)), still

    @torch.no_grad()
    def _moved(self, student: Student, rows: Rows, parts: list[slice]) -> Tensor:
        """The start states, of which those in ``parts`` are moved to their times t by the student's own map."""
        pieces = [rows.part(part) for part in parts if part.stop > part.start]
        if not pieces:
            return rows.x
        moving = Rows.joined(pieces)
        moving = moving._replace(t=torch.full_like(moving.t, self.start.times[0]), r=moving.t)
        ended = fm.jump(moving.x, moving.t, moving.r, self._velocity(student, moving))
        made, first = rows.x.clone(), 0
        for part in parts:
            count = part.stop - part.start
            made[part] = ended[first : first + count]
            first += count
        return made

    @torch.no_grad()
    def _residual(self, student: Student, rows: Rows, still: int) -> Callable[[Tensor], Tensor]:
        """R (B, *shape) as a function of the student's own u, known only after its pass with gradients."""
        if self.config.objective == "lagrangian":
            return self._lagrangian(student, rows, still)
        if self.config.objective == "eulerian":
            return self._eulerian(student, rows, still)
        first, later = rows.part(slice(0, still)), rows.part(slice(still, None))
        goals = [self._teacher(first.x, first.t, first), self._halves(student, later)]
        return lambda own: own - torch.cat(goals)

    def _halves(self, student: Student, rows: Rows) -> Tensor:
        """Two jumps, to the middle time and on, as one velocity."""
        middle = (rows.t + rows.r) / 2
        one = self._velocity(student, rows._replace(r=middle))
        state = fm.jump(rows.x, rows.t, middle, one)
        two = self._velocity(student, rows._replace(x=state, t=middle))
        return fm.semigroup_target(one, two, rows.t, middle, rows.r)

    def _lagrangian(self, student: Student, rows: Rows, still: int) -> Callable[[Tensor], Tensor]:
        later = rows.part(slice(still, None))
        if self.config.derivative == "discrete":
            step = (later.t - later.r).clamp(max=self.step)
            shorter = self._velocity(student, later._replace(r=later.r + step))
            ends = torch.cat([rows.r[:still], later.r + step])
            moved = fm.jump(later.x, later.t, later.r + step, shorter)
            slope = self._teacher(torch.cat([rows.x[:still], moved]), ends, rows)
            goal = fm.discrete_target(shorter, slope[still:], later.t - later.r, step)
            return lambda own: torch.cat([
                own[:still] - slope[:still],
                fm.discrete_residual(own[still:], goal, later.t - later.r, step),
            ])
        derivative = self._with_zeros(self.duration_derivative(student, later), still)

        def residual(own: Tensor) -> Tensor:
            with torch.no_grad():
                slope = self._teacher(fm.jump(rows.x, rows.t, rows.r, own), rows.r, rows)
            return fm.lagrangian_residual(own, derivative, rows.t, rows.r, slope)

        return residual

    def _eulerian(self, student: Student, rows: Rows, still: int) -> Callable[[Tensor], Tensor]:
        slope = self._teacher(rows.x, rows.t, rows)
        later, along = rows.part(slice(still, None)), slope[still:]
        if self.config.derivative == "discrete":
            step = (later.t - later.r).clamp(max=self.step)
            before = later._replace(x=later.x - fm.column(step, later.x) * along, t=later.t - step)
            goal = fm.discrete_target(self._velocity(student, before), along, later.t - later.r, step)
            return lambda own: torch.cat([
                own[:still] - slope[:still],
                fm.discrete_residual(own[still:], goal, later.t - later.r, step),
            ])
        derivative = self._with_zeros(self.total_derivative(student, later, along), still)
        return lambda own: fm.eulerian_residual(own, derivative, rows.t, rows.r, slope)

    @staticmethod
    def _with_zeros(derivative: Tensor, still: int) -> Tensor:
        """The derivatives with those of ``still`` rows before them, which their duration of 0 multiplies."""
        return torch.cat([derivative.new_zeros(still, *derivative.shape[1:]), derivative])

    @torch.no_grad()
    def duration_derivative(self, student: Student, rows: Rows) -> Tensor:
        """du/dd (B, *shape) of the duration d = t - r, with x and t fixed."""
        duration = rows.t - rows.r
        if self.forward_mode:
            try:
                return fm.duration_derivative_jvp(lambda d: self._velocity(student, rows, d), duration)
            except (NotImplementedError, RuntimeError) as error:
                self.forward_mode = no_forward_mode(error, "method.derivative=jvp", "finite differences are used")
        both = Rows.joined([rows, rows])
        return fm.duration_derivative(lambda d: self._velocity(student, both, d), duration, self.step, rows.t)

    @torch.no_grad()
    def total_derivative(self, student: Student, rows: Rows, slope: Tensor) -> Tensor:
        """D u (B, *shape) along the teacher's velocity, with r fixed."""
        if self.forward_mode:
            try:
                return fm.total_derivative_jvp(
                    lambda x, time: self._velocity(student, rows._replace(x=x, t=time)), rows.x, rows.t, slope
                )
            except (NotImplementedError, RuntimeError) as error:
                self.forward_mode = no_forward_mode(error, "method.derivative=jvp", "finite differences are used")
        both = Rows.joined([rows, rows])
        back = (rows.t - rows.r).clamp(max=self.step)
        ahead = (self.start.times[0] - rows.t).clamp(min=0, max=self.step)
        return fm.total_derivative(lambda x, time: self._velocity(student, both._replace(x=x, t=time)), rows.x, rows.t,
                                   slope, back, ahead)

    # --- passes and draws

    def _along(self, student: Student) -> Callable[[Path], Tensor]:
        """u (B, *shape) of the jump that a path stands before."""
        return lambda path: self._velocity(student, Rows.of(path))

    def _velocity(self, student: Student, rows: Rows, duration: Tensor | None = None) -> Tensor:
        """u (B, *shape) from t over ``duration``, or to r."""
        return student(rows.x, rows.t, rows.condition, **self._guided(rows),
                       duration=rows.t - rows.r if duration is None else duration)

    def _guided(self, rows: Rows) -> dict[str, Tensor]:
        return {} if rows.guidance is None or not self.guidance_input else {"guidance": rows.guidance}

    def _teacher(self, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
        low, high = self.config.guidance_interval
        with torch.no_grad():
            if rows.guidance is None:
                return self.teacher.velocity(x, t, rows.condition)
            return self.teacher.velocity(x, t, rows.condition, rows.guidance, (low, high))

    def _times(self, draw: Draw, count: int) -> Tensor:
        """Times t (B,), float64, above 0; those of calls where the student is for these alone and t is what stays."""
        if self.calls is not None and self.config.objective == "lagrangian":
            return self.calls[draw.integers(len(self.calls), rows=count)]
        return self.config.time.draw(self.teacher, draw, count).double().clamp(SAME_TIME, self.start.times[0])

    def _ends(self, t: Tensor, draw: Draw, count: int) -> Tensor:
        """Times r (B,) from 0 to below t, uniform but for the share of the end points."""
        share = draw.uniform(rows=count).double()
        chosen = draw.uniform(rows=count) < self.config.endpoint_fraction
        if self.calls is None:
            ends = torch.zeros_like(t)
        else:
            aims = torch.cat([self.calls.new_zeros(1), self.calls.flip(0)])
            below = torch.searchsorted(aims, t)
            ends = aims[(draw.uniform(rows=count) * below).long().clamp(max=len(aims) - 1)]
            if self.config.objective == "eulerian":  # r is what stays, so that others teach it nothing
                return ends
        return torch.where(chosen, ends, share * t)


def chains_of(config: FlowMapMatchingConfig, teacher: Teacher) -> tuple[Steps, ...]:
    """The student's steps, of one call, of two and so on.

    Raises:
        UserError: see :func:`flowdistill.students.given_times`; or times that do not begin where the teacher's
            trajectories do, or that no stock pipeline takes.
    """
    prompts = teacher.prompts is not None

    def chain(times: tuple[float, ...]) -> Steps:
        return Steps(times, config.stepping, start_scale(teacher.path, times, config.stepping, prompts))

    def refused(steps: Steps) -> UserError | None:
        try:
            check_exportable(teacher, steps)
        except UserError as error:
            return error
        return None

    if config.step_times is None:
        check_exportable(teacher)
        chains = tuple(chain(given_times(teacher, count, None, "linear", None)) for count in range(1, config.steps + 1))
        refusals = [found for found in map(refused, chains[1:]) if found is not None]
        if refusals and len(refusals) == len(chains) - 1:  # of some numbers of calls a scheduler may have no grid
            raise refusals[0]
        return chains
    times = given_times(teacher, config.steps, None, config.start_unit, config.step_times)
    if abs(times[0] - teacher.t_max) > SAME_TIME:
        raise UserError(f"method.step_times begins at t = {times[0]:.6g}, but the teacher's trajectories begin at its "
                        f"t_max, {teacher.t_max:.6g}; begin there, or set teacher.t_max")
    times = (teacher.t_max, *times[1:])
    check_exportable(teacher, chain(times))
    return tuple(chain(times[:count]) for count in range(1, config.steps + 1))
