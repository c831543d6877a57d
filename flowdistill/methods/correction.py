"""FreeFlow's correction (Tong et al., arXiv 2511.19428, Eqs. 10, 11) for students of several jumps.

A critic follows the samples of the student's own paths from noise to the image by flow matching. At a noised sample,

    Delta = v_critic(x_r, r) - v_teacher(x_r, r)

and <u, sg(Delta)> with u the velocity of one of the path's jumps, drawn at random, moves the samples towards the
teacher's law. What the jumps after that one do to a change of it is left out; where Delta is 0 that is no matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import OptimizerConfig, option
from flowdistill.networks.critic import critic_loss, make_critic
from flowdistill.networks.lora import CriticKind, StudentKind
from flowdistill.objectives import distribution_matching as dm
from flowdistill.students.steps import Steps
from flowdistill.teachers import Teacher
from flowdistill.training.method import Role
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw


@dataclass
class Correction(CriticKind):
    """Settings of the correction; methods' settings inherit them. Names and defaults are FreeFlow's."""

    correction_strength: float = option(
        0.0, "alpha, size of the correction against the rest of what the student learns from; 0: none, and no critic "
        "(authors of FreeFlow: stable 0.3-3)", at_least=0,
    )
    correction_fraction: float = option(0.25, "share of the batch for it (authors of FreeFlow: 0.25)", above=0, below=1)
    prediction_only_steps: int = option(0, "steps at the start without it; the critic learns in them", at_least=0)
    balance_epsilon: float = option(1e-8, "added to the size of the correction that it is divided by", above=0)
    noising_mean: float = option(0.8, "mean of the logit-normal noise level of the correction (authors of FreeFlow: "
                                 "0.8)")
    noising_std: float = option(1.0, "standard deviation of the logit-normal noise level", above=0)
    correction_guidance_interval: list[float] = option(
        [0.0, 0.7], "times with guidance in the correction (authors of FreeFlow: 0 to 0.7)", length=2, at_least=0,
        at_most=1,
    )
    critic_updates: int = option(1, "critic steps a student step", at_least=1)
    critic_fraction: float = option(1.0, "rows of a critic step, as a share of the batch", above=0, at_most=1)
    critic_optimizer: OptimizerConfig = option(OptimizerConfig, "optimiser of the critic")

    def validate_at(self, prefix: str, given: Mapping[str, str]) -> None:
        """UserError for an empty interval, or a setting of a correction that there is not, with its place."""
        low, high = self.correction_guidance_interval
        if low >= high:
            raise UserError(f"{prefix}correction_guidance_interval is [{low}, {high}]; the first must be below the "
                            "second")
        if self.correction_strength:
            return
        plain, shared = Correction(), {item.name for item in fields(StudentKind)}
        for key in (item.name for item in fields(Correction) if item.name not in shared):
            if getattr(self, key) != getattr(plain, key):
                raise UserError(f"{prefix}{key} is set{given.get(key, '')}, but {prefix}correction_strength is 0, so "
                                "that there is no correction; raise that, or leave this out")

    def corrected_rows(self, draw: Draw) -> int:
        """How many of this process's rows are for the correction."""
        if not self.correction_strength or draw.step < self.prediction_only_steps:
            return 0
        local = draw.rows // draw.world
        return min(round(self.correction_fraction * local), local - 1)

    def critic_rows(self, draw: Draw) -> int:
        """Rows of a critic's step, over all processes."""
        return max(1, round(self.critic_fraction * draw.rows / draw.world)) * draw.world


class Path(NamedTuple):
    """States x (B, *shape) before jump ``k`` of several, counted from 1; after the last, samples.

    ``guidance``: the teacher's scale of each row (B,); None: unguided.
    """

    chain: Steps
    k: int
    x: Tensor
    condition: Condition | None
    guidance: Tensor | None

    @property
    def t(self) -> Tensor:
        """The time of that jump (B,), float64; of samples, 0."""
        return self._time(self.chain.times)

    @property
    def r(self) -> Tensor:
        """What it aims at."""
        return self._time(self.chain.aims)

    def _time(self, times: Sequence[float]) -> Tensor:
        value = 0.0 if self.k > len(times) else times[self.k - 1]
        return torch.full((len(self.x),), value, dtype=torch.float64, device=self.x.device)


Velocity = Callable[[Path], Tensor]
"""The student's velocity (B, *shape) of the jump that a path stands before."""


class PathCorrection:
    """The correction of a student that takes any of several chains of jumps, and the critic.

    Args:
        chains: one is drawn for a batch.
        scales: the teacher's, from which each row has one; None: unguided.
        told: whether the critic is told the scale, as the student then is.
        critic_network: of one's own, called as ``(x, t, condition) -> velocity``, with ``guidance=`` if ``told``.
    """

    def __init__(
        self, config: Correction, teacher: Teacher, chains: Sequence[Steps], scales: tuple[float, float] | None,
        told: bool, critic_network: nn.Module | None = None,
    ) -> None:
        self.config, self.teacher, self.chains, self.scales, self.told = config, teacher, chains, scales, told
        self.critic: nn.Module | None = None
        if config.correction_strength:
            self.critic = critic_network or make_critic(teacher.network, config.critic_lora,
                                                        ("guidance",) if told else ())

    def roles(self) -> dict[str, Role]:
        """The critic's, if there is one."""
        return {} if self.critic is None else {"critic": Role(self.critic, self.config.critic_optimizer)}

    def schedule(self) -> tuple[str, ...]:
        """The updates of a step that follow the student's."""
        return ("critic",) * (self.config.critic_updates if self.critic is not None else 0)

    def calls_without_gradient(self, role: str, others: float) -> float:
        """See :class:`Method`; ``others``: of the student's rows that are not for the correction."""
        mean = sum(map(len, self.chains)) / len(self.chains)
        if role == "critic":
            return self.config.critic_fraction * mean
        share = self.config.correction_fraction if self.critic is not None else 0.0
        return (1 - share) * others + share * (mean - 1)

    @torch.no_grad()
    def draw_path(self, velocity: Velocity, draw: Draw, rows: int, learnt: int | None = None) -> Path:
        """The student's states before the jump that is learnt, of a path of one of its chains.

        Args:
            rows: over all processes.
            learnt: number of that jump; None: any of the path's, 0: the one after its last, whose states are samples.
        """
        chain = self.chains[draw.one(len(self.chains))]
        learnt = 1 + draw.one(len(chain)) if learnt is None else learnt or 1 + len(chain)
        noise, condition = draw.normal(self.teacher.shape, rows=rows), self.teacher.draw_condition(draw, rows)
        guidance = None if self.scales is None else draw.uniform(*self.scales, rows=rows)
        return self._walked(velocity, Path(chain, 1, chain.start(noise), condition, guidance), None, draw, learnt)

    @torch.no_grad()
    def delta(
        self, networks: Mapping[str, Callable[..., Tensor]], velocity: Velocity, path: Path, own: Tensor, draw: Draw
    ) -> Tensor:
        """Delta (B, *shape) at the noised samples of the path, whose learnt jump has the velocity ``own``."""
        path = self._walked(velocity, path, own, draw, len(path.chain) + 1)
        count = len(path.x) * draw.world
        time = self._noise_levels(draw, count, uniform=False)
        state = dm.noised(path.x, draw.normal(self.teacher.shape, rows=count), time)
        low, high = self.config.correction_guidance_interval
        scale = 1.0 if path.guidance is None else path.guidance
        teacher = self.teacher.velocity(state, time, path.condition, scale, (low, high))
        return dm.noising_residual(networks["critic"](state, time, path.condition, **self._guided(path)), teacher)

    def weight(self, signal: Tensor, delta: Tensor, draw: Draw) -> Tensor:
        """What scales the correction to the size of the other rows' signal, 0-d."""
        one, other = (draw.mean(part.flatten(1).norm(dim=1)) for part in (signal, delta))
        return dm.balance(one, other, self.config.correction_strength, self.config.balance_epsilon)

    def critic_loss(
        self, networks: Mapping[str, Callable[..., Tensor]], velocity: Velocity, draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching on samples of the student's own paths."""
        count = self.config.critic_rows(draw)
        path = self.draw_path(velocity, draw, count, learnt=0)
        time = self._noise_levels(draw, count, uniform=True)
        noise = draw.normal(self.teacher.shape, rows=count)
        made = networks["critic"](dm.noised(path.x, noise, time), time, path.condition, **self._guided(path))
        return critic_loss(made, path.x, noise, time, self.teacher.path).mean(), {}

    @torch.no_grad()
    def _walked(self, velocity: Velocity, path: Path, known: Tensor | None, draw: Draw, to: int) -> Path:
        """The path before jump ``to``; ``known`` is the velocity of the jump it stands before, where that is known."""
        chain, count = path.chain, len(path.x) * draw.world
        while path.k < to:
            made = velocity(path) if known is None else known
            if path.k == len(chain):
                x = path.x - chain.times[-1] * made
            else:
                x = chain.after(path.k, path.x, made, lambda _: draw.normal(self.teacher.shape, rows=count))
            path, known = path._replace(k=path.k + 1, x=x), None
        return path

    def _guided(self, path: Path) -> dict[str, Tensor]:
        return {"guidance": path.guidance} if self.told and path.guidance is not None else {}

    def _noise_levels(self, draw: Draw, rows: int, uniform: bool) -> Tensor:
        """Times (B,) at which samples are noised: ``uniform`` for the critic to learn at, else the correction's."""
        share = draw.uniform(rows=rows) if uniform else draw.logit_normal(self.config.noising_mean,
                                                                          self.config.noising_std, rows)
        return self.teacher.t_min + (self.teacher.t_max - self.teacher.t_min) * share
