"""FreeFlow's correction (Tong et al., arXiv 2511.19428, Eqs. 10, 11) for maps of several jumps.

A critic follows the samples of the student's own paths from noise to the image by flow matching. At a noised sample,

    Delta = v_critic(x_r, r) - v_teacher(x_r, r)

and <u, sg(Delta)> with u the velocity of one of the path's jumps, drawn at random, moves the samples towards the
teacher's law. What the jumps after that one do to a change of it is left out; where Delta is 0 that is no matter.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor, nn

from flowdistill.config import OptimizerConfig, option
from flowdistill.networks.critic import make_critic
from flowdistill.networks.lora import CriticKind, StudentKind
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw


@dataclass
class Correction(CriticKind):
    """Settings of the correction; methods' settings inherit them. Names and defaults are FreeFlow's."""

    correction_strength: float = option(
        0.0, "alpha, size of the correction against the damped residual; 0: none, and no critic (authors of FreeFlow: "
        "stable 0.3-3)", at_least=0,
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

    def check_correction(self) -> None:
        """UserError for an empty interval, or a setting of a correction that there is not."""
        low, high = self.correction_guidance_interval
        if low >= high:
            raise UserError(f"method.correction_guidance_interval is [{low}, {high}]; the first must be below the "
                            "second")
        if self.correction_strength:
            return
        plain, shared = Correction(), {item.name for item in fields(StudentKind)}
        for key in (item.name for item in fields(Correction) if item.name not in shared):
            if getattr(self, key) != getattr(plain, key):
                raise UserError(f"method.{key} is set, but method.correction_strength is 0, so that there is no "
                                "correction; raise that, or leave this out")

    def make_critic(self, teacher: Teacher, guidance_input: bool, given: nn.Module | None) -> nn.Module | None:
        """The critic, or the one ``given``; None without a correction."""
        if not self.correction_strength:
            return None
        return given or make_critic(teacher.network, self.critic_lora, ("guidance",) if guidance_input else ())

    def corrected_rows(self, draw: Draw) -> int:
        """How many of this process's rows are for the correction."""
        if not self.correction_strength or draw.step < self.prediction_only_steps:
            return 0
        local = draw.rows // draw.world
        return min(round(self.correction_fraction * local), local - 1)

    def critic_rows(self, draw: Draw) -> int:
        """Rows of a critic's step, over all processes."""
        return max(1, round(self.critic_fraction * draw.rows / draw.world)) * draw.world

    def noise_levels(self, teacher: Teacher, draw: Draw, rows: int, uniform: bool) -> Tensor:
        """Times (B,) at which samples are noised: ``uniform`` for the critic to learn at, else the correction's."""
        share = draw.uniform(rows=rows) if uniform else draw.logit_normal(self.noising_mean, self.noising_std, rows)
        return teacher.t_min + (teacher.t_max - teacher.t_min) * share
