"""Score distillation: a one-step generator that matches the teacher's distribution at every noise level.

Each step, with an online critic v_phi that follows the generator's samples x = G(n):

    critic      mean || v_phi(x_t, t) - (n' - x) ||^2,  x_t = (1 - t) x + t n'       (a few times)
    generator   <x, sg(g)>,  g a weight of Delta = v_phi(x_t, t) - v_teacher(x_t, t)

    diff_instruct  g = -t Delta                       Diff-Instruct (Luo et al., arXiv 2305.18455)
    dmd            g = -Delta / mean |e|              DMD2 (Yin et al., arXiv 2405.14867), e = v_teacher - (n' - x)
    sid            g = d/dx of -t <Delta, e + alpha Delta> / mean |e|, through both networks
                                                      SiD (Zhou et al., arXiv 2404.04057)

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
from flowdistill.config import OptimizerConfig, option, validate
from flowdistill.methods.regression import Regression, regression_error
from flowdistill.networks.critic import Discriminator, critic_loss, make_critic
from flowdistill.networks.lora import CriticKind
from flowdistill.objectives import adversarial
from flowdistill.objectives import distribution_matching as dm
from flowdistill.students import START_UNITS, Generator, StudentInfo, generated, start_time
from flowdistill.teachers import Teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.teachers.real_data import RealData
from flowdistill.teachers.start_states import check_guidance
from flowdistill.training.method import Role, SingleStudentMethod, register_method
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw

WEIGHTINGS = ("diff_instruct", "dmd", "sid")


@dataclass
class HostConfig(Regression, CriticKind):
    """Settings of score distillation. "(authors: ...)" marks a published value; every other default is ours."""

    weighting: str = option("dmd", "weighting of the matching gradient", choices=WEIGHTINGS)
    sid_alpha: float = option(1.2, "alpha of sid (authors: 1.2, and 1 for AFHQ)")
    start: float | None = option(None, "time of the generator's one call; null: the teacher's t_max", above=0)
    start_unit: str = option("linear", "unit of start: t, the network's timestep, or EDM's sigma", choices=START_UNITS)
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher", at_least=0)
    time: NoiseLevels = option(NoiseLevels(low=0.02, high=0.98), "noise levels of the generator's loss")
    critic_time: NoiseLevels = option(NoiseLevels, "noise levels of the critic's loss")
    critic_updates: int = option(1, "critic steps a generator step (authors of DMD2: 5)", at_least=1)
    adversarial_weight: float = option(
        0.0,
        "weight of the adversarial term for the generator; 0: none, and no data (authors of DMD2 for SDXL: 5e-3)",
        at_least=0,
    )
    adversarial_critic_weight: float = option(
        1e-2, "weight of the adversarial term for the critic (authors: 1e-2)", at_least=0,
    )
    data: str | None = option(None, "named image set of the adversarial term, which needs one")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the generator")
    critic_optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the critic")

    def validate(self) -> None:
        """UserError for an adversarial term without real images."""
        if self.adversarial_weight and self.data is None:
            raise UserError(f"method.adversarial_weight is {self.adversarial_weight}, but method.data is null; name an "
                            "image set, such as digits, or set the weight to 0")


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
        start = start_time(teacher, config.start, config.start_unit)
        self._student = Generator.from_teacher(teacher, info, start, student_network, config.student_lora)
        score: Any = critic_network or make_critic(teacher.network, config.critic_lora)
        self.score: nn.Module = score
        self.critic: nn.Module = score
        self.data = None
        if config.adversarial_weight:
            assert config.data is not None
            self.data = RealData(teacher, config.data)
            self.critic = Discriminator(score)
        self.pairs = config.make_pairs(teacher, config.guidance_scale)

    def roles(self) -> dict[str, Role]:
        return super().roles() | {"critic": Role(self.critic, self.config.critic_optimizer)}

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("critic",) * self.config.critic_updates + ("student",)

    def loss(self, role: str, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        return self._student_loss(networks, draw) if role == "student" else self._critic_loss(networks, draw)

    # --- the algorithm

    def _student_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        noise, condition = self.draw_start(draw)
        sample = self.generate(networks, noise, condition)
        gradient = self.matching_gradient(sample, condition, networks["critic"], draw)
        metrics = {"gradient_size": draw.mean(gradient.abs())}
        if self.data is not None:
            gradient = gradient + self.adversarial_gradient(sample, condition, networks["critic"], draw)
        loss = dm.surrogate_loss(sample, gradient).mean()
        if self.pairs is not None:
            error = regression_error(self.pairs, self.teacher, draw, partial(self.generate, networks))
            metrics["regression_error"] = error.detach()
            loss = loss + self.config.regression_weight * error
        return loss, metrics

    def matching_gradient(
        self, sample: Tensor, condition: Condition | None, critic: Callable[..., Tensor], draw: Draw
    ) -> Tensor:
        """g (B, *shape): descent moves the sample from the critic's distribution to the target's."""
        time, noise = self.config.time.draw(self.teacher, draw), draw.normal(self.teacher.shape)

        def compare(x: Tensor) -> tuple[Tensor, Tensor]:
            """Delta and the target's own error at the noised sample."""
            state = dm.noised(x, noise, time)
            real = self.target.velocity(state, time, condition, self.guidance_scale)
            return dm.noising_residual(critic(state, time, condition), real), dm.sampling_error(real, x, noise)

        if self.config.weighting == "sid":
            return sample_gradient(lambda x: dm.sid_loss(*compare(x), time, self.config.sid_alpha), sample)
        with torch.no_grad():
            residual, error = compare(sample)
        dmd = self.config.weighting == "dmd"
        return dm.dmd_gradient(residual, error) if dmd else dm.diff_instruct_gradient(residual, time)

    def _critic_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        prior, condition = self.draw_start(draw)
        with torch.no_grad():
            sample = self.generate(networks, prior, condition)
        time, noise = self.config.critic_time.draw(self.teacher, draw), draw.normal(self.teacher.shape)
        state, path = dm.noised(sample, noise, time), self.teacher.path
        if self.data is None:
            velocity = networks["critic"](state, time, condition)
            return critic_loss(velocity, sample, noise, time, path).mean(), {}
        # Real samples ride in the same pass: one call of the network with gradients.
        real, real_condition = self.data.draw(draw)
        real = dm.noised(real, draw.normal(self.teacher.shape), time)
        both = None if condition is None or real_condition is None else Condition.cat([condition, real_condition])
        states, times = torch.cat([state, real]), torch.cat([time, time])
        velocity, logits = networks["critic"](states, times, both, logits=True)
        fake, true = logits.chunk(2)
        told = adversarial.discriminator_loss(fake, true).mean()
        loss = critic_loss(velocity[: len(state)], sample, noise, time, path).mean()
        metrics = {"discriminator_accuracy": ((fake < 0).float().mean() + (true > 0).float().mean()).detach() / 2}
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

    # --- draws and passes

    def draw_start(self, draw: Draw) -> tuple[Tensor, Condition | None]:
        """Unit normal noise (B, *shape) and a condition for each."""
        return draw.normal(self.teacher.shape), self.teacher.draw_condition(draw)

    def generate(self, networks: Networks, noise: Tensor, condition: Condition | None) -> Tensor:
        """The student's samples (B, *shape) of the noise."""
        return generated(networks["student"], noise, self._student.t_start, condition)


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


@register_method
class Dmd2(ScoreDistillation):
    """Score distillation as DMD2 has it; with ``regression_weight`` close to DMD."""

    name = "dmd2"
    Config = Dmd2Config


@register_method
class Sid(ScoreDistillation):
    """Score distillation as SiD has it."""

    name = "sid"
    Config = SidConfig
