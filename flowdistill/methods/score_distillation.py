"""Score distillation: a generator of one to eight steps that matches the teacher's distribution at every noise level.

Each step, with an online critic v_phi that follows the generator's samples x = G(n):

    critic      mean || v_phi(x_t, t) - (n' - x) ||^2,  x_t = (1 - t) x + t n'       (a few times)
    generator   <x, sg(g)>,  g a weight of Delta = v_phi(x_t, t) - v_teacher(x_t, t)

    diff_instruct  g = -t Delta                       Diff-Instruct (Luo et al., arXiv 2305.18455)
    dmd            g = -Delta / mean |e|              DMD2 (Yin et al., arXiv 2405.14867), e = v_teacher - (n' - x)
    sid            g = d/dx of -t <Delta, e + alpha Delta> / mean |e|, through both networks
                                                      SiD (Zhou et al., arXiv 2404.04057)

A generator of K steps makes x by backward simulation (DMD2, section 4.5): one k an update, the states before step k by
the generator's own steps and without a gradient, x its estimate of the image at step k. The losses see x alone, so what
they train is the mixture of the K estimates.

With ``decoupled_guidance`` the part of Delta that guidance makes is taken at a noise level of its own, below that of
the call that made x (arXiv 2511.22677); with ``divergence`` the gradient is weighted by what the discriminator of the
adversarial term takes for the ratio of the densities (arXiv 2502.15681); with ``critic_follow`` the critic takes a
share of the generator's weights after each of its updates (arXiv 2506.00523).

Guidance is the teacher's only. Without the adversarial term (DMD2) no data is seen; the regression term (DMD, arXiv
2311.18828) is on some of the teacher's own trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import DataOptions, OptimizerConfig, needs, option, validate
from flowdistill.export.pipelines import check_exportable
from flowdistill.methods.regression import Regression, regression_error
from flowdistill.networks.critic import Discriminator, critic_loss, make_critic
from flowdistill.networks.lora import CriticKind
from flowdistill.networks.velocity import per_sample
from flowdistill.objectives import adversarial
from flowdistill.objectives import distribution_matching as dm
from flowdistill.students import START_UNITS, Generator, StudentInfo, given_times
from flowdistill.students.steps import MOST_STEPS, STEPPINGS, Steps, estimate, rollout, start_scale
from flowdistill.teachers import Teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.teachers.real_data import RealData
from flowdistill.teachers.start_states import check_guidance
from flowdistill.training.average import follow
from flowdistill.training.method import (
    About,
    Role,
    SingleStudentMethod,
    Suggestion,
    guidance_for,
    register_method,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw

WEIGHTINGS = ("diff_instruct", "dmd", "sid")
STEP_INPUTS = ("simulated", "data")


@dataclass
class HostConfig(Regression, CriticKind):
    """Settings of score distillation. "(authors: ...)" marks a published value; every other default is ours."""

    weighting: str = option("dmd", "weighting of the matching gradient", choices=WEIGHTINGS)
    sid_alpha: float = option(1.2, "alpha of sid (authors: 1.2, and 1 for AFHQ)", only=needs("weighting", "sid"))
    start: float | None = option(None, "time of the generator's first call; null: the teacher's t_max", above=0)
    start_unit: str = option("linear", "unit of start and step_times: t, the network's timestep, or EDM's sigma",
                             choices=START_UNITS)
    steps: int = option(1, "calls of the generator for an image (authors of DMD2: 1 or 4)", at_least=1,
                        at_most=MOST_STEPS)
    step_times: list[float] | None = option(
        None, "times of the calls, falling; null: those of the teacher's own sampler (authors of DMD2 for SDXL: [999, "
        "749, 499, 249], with start_unit timestep)", at_least=0,
    )
    stepping: str = option(
        "stochastic", "between calls: fresh noise on the estimate (authors of DMD2), or an Euler step (as DDIM)",
        choices=STEPPINGS,
    )
    step_inputs: str = option(
        "simulated", "states that the later calls train on: the generator's own (authors of DMD2), or noised real "
        "images of data", choices=STEP_INPUTS,
    )
    critic_told_step: bool = option(
        False, "tell the critic which step made a sample, by an extra embedding that starts at zero; false (all "
        "authors): it learns the mixture of the steps",
    )
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher", at_least=0)
    decoupled_guidance: bool = option(
        False, "guidance at noise levels of its own, of time but below that of the call that made the sample; a second "
        "pass of the teacher on both sides",
    )
    time: NoiseLevels = option(NoiseLevels(low=0.02, high=0.98), "noise levels of the generator's loss")
    critic_time: NoiseLevels = option(NoiseLevels, "noise levels of the critic's loss")
    critic_updates: int = option(1, "critic steps a generator step (authors of DMD2: 5)", at_least=1)
    critic_follow: float = option(
        0.0, "share of the generator's weights that the critic takes after each generator step, both full copies "
        "(authors of SenseFlow: 0.03)", at_least=0, at_most=1,
    )
    adversarial_weight: float = option(
        0.0,
        "weight of the adversarial term for the generator; 0: none, and no data (authors of DMD2 for SDXL: 5e-3)",
        at_least=0,
    )
    adversarial_critic_weight: float = option(
        1e-2, "weight of the adversarial term for the critic (authors: 1e-2)", at_least=0,
        only=needs("adversarial_weight"))
    divergence: str = option(
        "rkl", "divergence that is made small; others than the reverse Kullback-Leibler (rkl), which are kl, js, sf "
        "(softened rkl), neyman, sh (squared Hellinger) and jf (Jeffreys), need the adversarial term",
        choices=adversarial.DIVERGENCES,
    )
    r1_weight: float = option(
        0.0, "weight of the penalty on the discriminator's slope at real samples, beside its loss; 0: none, else half "
        "a critic pass more (NVIDIA's Model Optimizer: 0.1)", at_least=0,
    )
    r1_scale: float = option(
        0.1, "standard deviation of the noise that measures the slope (NVIDIA's Model Optimizer: 0.1)", above=0,
        only=needs("r1_weight"))
    data: str | None = option(None, "images of the adversarial term or of step_inputs, which need them: a named set, a "
                                    "folder, tars, a table or a hub id")
    data_options: DataOptions = option(DataOptions, "how they are read")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the generator")
    critic_optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the critic")

    def validate(self) -> None:
        """UserError for real images that are needed and not named, or for several steps where there is one."""
        self.check_regression_prompts()
        if self.adversarial_weight and self.data is None:
            raise UserError(f"method.adversarial_weight is {self.adversarial_weight}, but method.data is null; name an "
                            "image set, such as digits, or set the weight to 0")
        for name, wanted in (("divergence", self.divergence != "rkl"), ("r1_weight", self.r1_weight > 0)):
            if wanted and not self.adversarial_weight:
                raise UserError(f"method.{name} is {getattr(self, name)}, which needs the discriminator, but "
                                "method.adversarial_weight is 0; set it above 0, or "
                                f"{name} to {'rkl' if name == 'divergence' else 0}")
        if self.decoupled_guidance and self.guidance_scale == 1:
            raise UserError("method.decoupled_guidance is true, but method.guidance_scale is 1, which is no guidance; "
                            "set the scale to another value, or decoupled_guidance to false")
        for name, wanted in (("decoupled_guidance", self.decoupled_guidance), ("divergence", self.divergence != "rkl")):
            if wanted and self.weighting == "sid":
                raise UserError(f"method.{name} is {str(getattr(self, name)).lower()}, but the weighting sid is no "
                                "weight of one difference of velocities; set method.weighting to dmd or diff_instruct, "
                                f"or {name} to {'rkl' if name == 'divergence' else 'false'}")
        if self.step_inputs == "data" and self.data is None:
            raise UserError("method.step_inputs is data, but method.data is null; name an image set, such as digits, "
                            "or set step_inputs to simulated")
        if self.critic_told_step and self.steps == 1:
            raise UserError("method.critic_told_step is true, but method.steps is 1, so that there is nothing to tell; "
                            "set it to false, or steps to 2 to 8")
        if self.steps > 1 and self.regression_weight:
            raise UserError(f"method.regression_weight is {self.regression_weight} and method.steps {self.steps}, but "
                            "pairs are noise and what one call must make of it; set the weight to 0, or steps to 1")


@dataclass
class Dmd2Config(HostConfig):
    """DMD2's weight; its regression term is off, as there."""

    name: str = "dmd2"


@dataclass
class DiffInstructConfig(HostConfig):
    """Diff-Instruct's weight and noise levels: log sigma is normal with mean -1.2 and standard deviation 1.2."""

    name: str = "diff_instruct"
    weighting: str = option("diff_instruct", "weighting of the matching gradient", choices=WEIGHTINGS)
    time: NoiseLevels = option(NoiseLevels("logit_normal"), "noise levels of the generator's loss")
    critic_time: NoiseLevels = option(NoiseLevels("logit_normal"), "noise levels of the critic's loss")


@dataclass
class SidConfig(HostConfig):
    """SiD's loss."""

    name: str = "sid"
    weighting: str = option("sid", "weighting of the matching gradient", choices=WEIGHTINGS)


Networks = Mapping[str, Callable[..., Tensor]]


class ScoreDistillation(SingleStudentMethod):
    """The method. What it takes as the real score, ``target`` with ``guidance_scale``, may change while it trains."""

    name = "score_distillation"

    def __init__(
        self, config: HostConfig, teacher: Teacher, student_network: nn.Module | None = None,
        critic_network: nn.Module | None = None, name: str | None = None,
    ) -> None:
        """Networks of one's own (for teachers without a backbone) are called as ``(x, t, condition) -> velocity``."""
        validate(config, prefix="method.")
        self.config, self.teacher, self.target = config, teacher, teacher
        self.guidance_scale = config.guidance_scale
        check_guidance(teacher, {"guidance_scale": config.guidance_scale})
        for levels in (config.time, config.critic_time):
            levels.check(teacher)
        info = StudentInfo(name or self.name, teacher.source, guidance_scale=config.guidance_scale)
        self.steps = steps_of(config, teacher)
        self._student = Generator.from_teacher(teacher, info, None, student_network, config.student_lora, self.steps)
        self.tells_step = config.critic_told_step and len(self.steps) > 1
        scalars = ("step",) if self.tells_step else ()
        score: Any = critic_network or make_critic(teacher.network, config.critic_lora, scalars)
        self.score: nn.Module = score
        self.critic: nn.Module = score
        self.data: RealData | None = None
        self.adversarial = config.adversarial_weight > 0
        self.inputs_from_data = len(self.steps) > 1 and config.step_inputs == "data"
        if self.adversarial or self.inputs_from_data:
            assert config.data is not None
            self.data = RealData(teacher, config.data, options=config.data_options)
        if self.adversarial:
            self.critic = Discriminator(score)
        self.pairs = config.make_pairs(teacher, config.guidance_scale)
        if config.decoupled_guidance:
            check_decoupled(config, teacher, self.steps)
        if config.critic_follow:
            check_alike(config, self._student.network, self.score)

    def roles(self) -> dict[str, Role]:
        return super().roles() | {"critic": Role(self.critic, self.config.critic_optimizer)}

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("critic",) * self.config.critic_updates + ("student",)

    def after_update(self, role: str) -> None:
        if role == "student" and self.config.critic_follow:
            follow(self.score, self._student.network, self.config.critic_follow)

    def calls_without_gradient(self, role: str) -> float:
        return 0.0 if self.inputs_from_data else (len(self.steps) - 1) / 2  # k is uniform in 1 to K

    def loss(self, role: str, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        return self._student_loss(networks, draw) if role == "student" else self._critic_loss(networks, draw)

    # --- the algorithm

    def _student_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        k = self.draw_step(draw)
        sample, condition = self.draw_sample(networks, draw, k)
        critic = self.told(networks["critic"], k)
        gradient = self.matching_gradient(sample, condition, critic, draw, k)
        metrics = {"gradient_size": draw.mean(gradient.abs())}
        if len(self.steps) > 1:
            metrics |= step_figures(k, sample.detach(), metrics["gradient_size"], draw)
        if self.adversarial:
            gradient = gradient + self.adversarial_gradient(sample, condition, critic, draw)
        loss = dm.surrogate_loss(sample, gradient).mean()
        if self.pairs is not None:
            error = regression_error(self.pairs, self.teacher, draw, partial(self.generate, networks, draw=draw))
            metrics["regression_error"] = error.detach()
            loss = loss + self.config.regression_weight * error
        return loss, metrics

    def matching_gradient(
        self, sample: Tensor, condition: Condition | None, critic: Callable[..., Tensor], draw: Draw, k: int = 1
    ) -> Tensor:
        """g (B, *shape): descent moves the sample, of step k, from the critic's distribution to the target's."""
        config, scale = self.config, self.guidance_scale
        time, noise = config.time.draw(self.teacher, draw), draw.normal(self.teacher.shape)

        def compare(x: Tensor) -> tuple[Tensor, Tensor]:
            """Delta and the target's own error at the noised sample."""
            state = dm.noised(x, noise, time)
            real = self.target.velocity(state, time, condition, scale)
            return dm.noising_residual(critic(state, time, condition), real), dm.sampling_error(real, x, noise)

        if config.weighting == "sid":
            return sample_gradient(lambda x: dm.sid_loss(*compare(x), time, config.sid_alpha), sample)
        weighted, logits = config.divergence != "rkl", list[Tensor]()
        with torch.no_grad():
            critic = with_logits(critic, logits) if weighted else critic
            if config.decoupled_guidance and scale != 1:
                assert condition is not None
                lower = config.time.draw(self.teacher, draw, below=self.steps.times[k - 1])
                residual, error = self._decoupled(sample, condition, critic, noise, time, lower)
            else:
                residual, error = compare(sample)
            dmd = config.weighting == "dmd"
            gradient = dm.dmd_gradient(residual, error) if dmd else dm.diff_instruct_gradient(residual, time)
            if not weighted:
                return gradient
            weight = adversarial.divergence_weight(config.divergence, logits[0])
            return gradient * per_sample(weight / draw.mean(weight), gradient)

    def _decoupled(
        self, x: Tensor, condition: Condition, critic: Callable[..., Tensor], noise: Tensor, time: Tensor, lower: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Delta with its guidance at ``lower`` (B,) instead of ``time``, and the guided target's error at ``time``.

        One noise for both, and one size for both to be divided by, that of matching (ours): at one level this is plain
        guidance.
        """
        state, cleaner = dm.noised(x, noise, time), dm.noised(x, noise, lower)
        conditional, guided = self.target.sides(state, time, condition, self.guidance_scale)
        own, pushed = self.target.sides(cleaner, lower, condition, self.guidance_scale)
        residual = dm.noising_residual(critic(state, time, condition), conditional)
        return dm.decoupled_residual(residual, pushed - own, time, lower), dm.sampling_error(guided, x, noise)

    def _critic_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        k = self.draw_step(draw)
        critic = self.told(networks["critic"], k)
        with torch.no_grad():
            sample, condition = self.draw_sample(networks, draw, k)
        time, noise = self.config.critic_time.draw(self.teacher, draw), draw.normal(self.teacher.shape)
        state, path = dm.noised(sample, noise, time), self.teacher.path
        if not self.adversarial:
            velocity = critic(state, time, condition)
            return critic_loss(velocity, sample, noise, time, path).mean(), {}
        assert self.data is not None
        # Real samples ride in the same pass: one call of the network with gradients.
        real, real_condition = self.data.draw(draw)
        real = dm.noised(real, draw.normal(self.teacher.shape), time)
        states, conditions = [state, real], [condition, real_condition]
        if self.config.r1_weight:
            states.append(real + self.config.r1_scale * draw.normal(self.teacher.shape))
            conditions.append(real_condition)
        present = [each for each in conditions if each is not None]
        together = Condition.cat(present) if len(present) == len(conditions) else None
        times = torch.cat([time] * len(states))
        velocity, logits = critic(torch.cat(states), times, together, logits=True)
        fake, true, *perturbed = logits.chunk(len(states))
        told = adversarial.discriminator_loss(fake, true).mean()
        loss = critic_loss(velocity[: len(state)], sample, noise, time, path).mean()
        metrics = {"discriminator_accuracy": ((fake < 0).float().mean() + (true > 0).float().mean()).detach() / 2}
        if perturbed:
            penalty = adversarial.slope_penalty(true, perturbed[0]).mean()
            metrics["slope_penalty"] = penalty.detach()
            told = told + self.config.r1_weight * penalty
        return loss + self.config.adversarial_critic_weight * told, metrics

    def adversarial_gradient(
        self, sample: Tensor, condition: Condition | None, critic: Callable[..., Tensor], draw: Draw
    ) -> Tensor:
        """Gradient of the generator's adversarial loss, at noise levels of its own."""
        time, noise = self.config.critic_time.draw(self.teacher, draw), draw.normal(self.teacher.shape)

        def loss(x: Tensor) -> Tensor:
            _, logits = critic(dm.noised(x, noise, time), time, condition, logits=True)
            return self.config.adversarial_weight * adversarial.generator_loss(logits)

        return sample_gradient(loss, sample)

    def told(self, critic: Callable[..., Tensor], k: int) -> Callable[..., Tensor]:
        """The critic as it is called for samples of step k."""
        if not self.tells_step:
            return critic
        return partial(critic, step=torch.full((1,), float(k), device=self.teacher.device))

    # --- draws and passes

    def draw_start(self, draw: Draw) -> tuple[Tensor, Condition | None]:
        """Unit normal noise (B, *shape) and a condition for each."""
        return draw.normal(self.teacher.shape), self.teacher.draw_condition(draw)

    def draw_step(self, draw: Draw) -> int:
        """The step k, from 1, of this update: the same for all rows and processes, which call the network k times."""
        return 1 if len(self.steps) == 1 else 1 + draw.one(len(self.steps))

    def draw_sample(self, networks: Networks, draw: Draw, k: int) -> tuple[Tensor, Condition | None]:
        """The student's estimates (B, *shape) at step k, with a gradient through this step alone, and their conditions.
        """
        if k == 1 or not self.inputs_from_data:
            noise, condition = self.draw_start(draw)
            return self.generate(networks, noise, condition, draw, k), condition
        assert self.data is not None
        real, condition = self.data.draw(draw)
        t = self.steps.times[k - 1]
        state = (1 - t) * real + t * draw.normal(self.teacher.shape)
        return estimate(networks["student"], state, t, condition), condition

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return suggestions(teacher, guidance)

    def generate(
        self, networks: Networks, noise: Tensor, condition: Condition | None, draw: Draw, k: int | None = None
    ) -> Tensor:
        """The student's estimates (B, *shape) at step k (None: its samples) from the noise, by its own steps."""
        return rollout(networks["student"], noise, self.steps, condition, lambda step: draw.normal(self.teacher.shape),
                       k)


def suggestions(teacher: Teacher, guidance: float | None, section: str = "method.") -> list[Suggestion]:
    """What score distillation wants of a first configuration; ``section``: where its settings are.

    The one call of a generator for an epsilon teacher starts at timestep 399 of 1,000, as those of DMD2 and DisBack
    for SDXL do: it owes nothing to the trajectory, and errors are multiplied by 2.3 there and not by 157.
    """
    found, path = guidance_for(HostConfig, teacher, guidance, section), teacher.path
    if path.prediction != "epsilon" or path.kind != "vp":
        return found
    last = 1000 if teacher.scheduler is None else int(teacher.scheduler.config.get("num_train_timesteps", 1000))
    first, second, start, fourth = (round(share * last) - 1 for share in (0.8, 0.6, 0.4, 0.2))
    why = (f"the teacher predicts epsilon: from its last timestep an error of the one call is multiplied by "
           f"{1 / (1 - teacher.t_max):.0f}, from {start} by about 2; with steps: 4 set step_times: [{first}, {second}, "
           f"{start}, {fourth}] in its place")
    return [*found, Suggestion(f"{section}start", float(start), why),
            Suggestion(f"{section}start_unit", "timestep", "")]


def steps_of(config: HostConfig, teacher: Teacher) -> Steps:
    """The generator's times, and the rule between them.

    Raises:
        UserError: see :func:`flowdistill.students.given_times`; or several steps that no stock pipeline takes.
    """
    times = given_times(teacher, config.steps, config.start, config.start_unit, config.step_times)
    scale = start_scale(teacher.path, times, config.stepping, teacher.prompts is not None)
    steps = Steps(times, config.stepping, scale)
    if len(steps) > 1:
        check_exportable(teacher, steps)
    return steps


def step_figures(k: int, sample: Tensor, gradient_size: Tensor, draw: Draw) -> dict[str, Tensor]:
    """What tells early that a step goes astray, under the step's number: mean and standard deviation of its estimates,
    and the size of their gradient."""
    mean = draw.mean(sample)
    return {
        f"sample_mean/{k}": mean,
        f"sample_std/{k}": (draw.mean(sample.square()) - mean.square()).clamp(min=0).sqrt(),
        f"gradient_size/{k}": gradient_size,
    }


def with_logits(critic: Callable[..., Any], logits: list[Tensor]) -> Callable[..., Tensor]:
    """A discriminating critic as a critic alone, each of whose passes adds its logits (B,) to ``logits``."""
    def velocity(*arguments: Any) -> Tensor:
        found, told = critic(*arguments, logits=True)
        logits.append(told)
        return found

    return velocity


def check_decoupled(config: HostConfig, teacher: Teacher, steps: Steps) -> None:
    """UserError for a teacher whose guidance is no second side, or steps below which there is no noise level."""
    if teacher.takes_guidance:
        raise UserError("method.decoupled_guidance is true, but guidance is an input of the teacher's network, which "
                        "makes one prediction for both and not two; set it to false")
    if not config.time.reaches_below(teacher, steps.times[-1]):
        raise UserError(f"method.decoupled_guidance is true, and the last call is at t = {steps.times[-1]:.4f}, below "
                        "which method.time has no noise level for guidance; lower method.time.low")


def check_alike(config: HostConfig, student: nn.Module, critic: nn.Module) -> None:
    """UserError for a generator and a critic that are no full copies of one network, what tells the step apart."""
    shapes, own = ({name: p.shape for name, p in network.named_parameters() if p.requires_grad}
                   for network in (student, critic))
    reason = ""
    if "lora" in (config.student, config.critic):
        reason = "the mean of two adapters' factors is not that of what they add"
    elif any(own.get(name) != shape for name, shape in shapes.items()):
        reason = "their networks differ in shape"
    if reason:
        raise UserError(f"method.critic_follow is {config.critic_follow}, which needs full copies of one network as "
                        f"generator and critic, and {reason}; set it to 0")


def sample_gradient(loss: Callable[[Tensor], Tensor], sample: Tensor) -> Tensor:
    """d loss / dx (B, ...) of losses (B,) at each sample, times its number of elements, by which ``surrogate_loss``
    divides. No weight gets a gradient."""
    with torch.enable_grad():
        x = sample.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((x[0].numel() * loss(x)).sum(), x)
    return gradient


@register_method
class DiffInstruct(ScoreDistillation):
    """Score distillation as Diff-Instruct has it."""

    name = "diff_instruct"
    Config = DiffInstructConfig
    about = About("score distillation by the Kullback-Leibler divergence at every noise level",
                  "Diff-Instruct, arXiv 2305.18455")


@register_method
class Dmd2(ScoreDistillation):
    """Score distillation as DMD2 has it; with ``regression_weight`` close to DMD."""

    name = "dmd2"
    Config = Dmd2Config
    about = About("score distillation with DMD2's weight: the samples' distribution is drawn to the teacher's",
                  "DMD2, arXiv 2405.14867",
                  usual="it needs no images, takes every kind of teacher, and makes students of one to eight calls")


@register_method
class Sid(ScoreDistillation):
    """Score distillation as SiD has it."""

    name = "sid"
    Config = SidConfig
    about = About("score distillation with SiD's loss, whose gradient goes through teacher and critic",
                  "SiD, arXiv 2404.04057")
