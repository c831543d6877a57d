"""DMD's paired regression (Yin et al., arXiv 2311.18828), with the squared error where DMD has LPIPS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flowdistill.conditioning import Condition
from flowdistill.conditioning.prompts import PromptConditions
from flowdistill.config import needs, option
from flowdistill.data.captions import read_prompts_or_captions
from flowdistill.teachers import Teacher
from flowdistill.teachers.pairs import Pairs, teacher_pairs
from flowdistill.utils.errors import UserError
from flowdistill.utils.numbers import MOST_CALLS
from flowdistill.utils.randomness import Draw


@dataclass
class Regression:
    """Settings of the regression term; methods' settings inherit them."""

    regression_weight: float = option(
        0.0, "weight of the squared error to teacher samples from the same noise", at_least=0,
    )
    regression_pairs: int = option(1000, "pairs made once", at_least=1, only=needs("regression_weight"))
    regression_steps: int = option(50, "the teacher's steps to make them", at_least=1, at_most=MOST_CALLS,
                                  only=needs("regression_weight"))
    regression_own: bool = option(False, "whether only pairs of teacher.labels are used; false: of all classes",
                                  only=needs("regression_weight"))
    regression_prompts: str | None = option(None, "text to image: file of the prompts that pairs are made for, as "
                                                  "teacher.prompts takes it; null: those of teacher.prompts")

    def check_regression(self, lowest: float, highest: float, interval: list[float]) -> None:
        """UserError where pairs, of one guidance scale at all times, cannot teach scales or times of guidance."""
        self.check_regression_prompts()
        if not self.regression_weight:
            return
        if lowest < highest:
            raise UserError(f"method.regression_weight is {self.regression_weight}, but pairs have one guidance scale "
                            "and the student learns a range; set method.guidance_min and guidance_max to one value")
        if lowest != 1 and interval != [0.0, 1.0]:
            raise UserError(f"method.regression_weight is {self.regression_weight}, but pairs are guided at all times "
                            f"and method.guidance_interval is {interval}; set it to [0, 1]")

    def check_regression_prompts(self) -> None:
        """UserError for prompts of no pairs."""
        if self.regression_prompts is not None and not self.regression_weight:
            raise UserError(f"method.regression_prompts is {self.regression_prompts}, but method.regression_weight is "
                            "0, so that there are no pairs; set the weight too")

    def make_pairs(self, teacher: Teacher, guidance_scale: float) -> Pairs | None:
        """The pairs of the term; None where its weight is 0."""
        if not self.regression_weight:
            return None
        prompts: PromptConditions | None = None
        if self.regression_prompts is not None:
            if teacher.prompts is None:
                raise UserError(f"method.regression_prompts is {self.regression_prompts}, but the teacher takes no "
                                "prompts; set it to null")
            if teacher.device.type != "meta":  # a plan has shapes and no content
                prompts = teacher.prompts.beside(read_prompts_or_captions(self.regression_prompts)).shared()
        pairs = teacher_pairs(teacher, self.regression_pairs, self.regression_steps, guidance_scale, prompts=prompts)
        return pairs.of(teacher.classes.shown) if self.regression_own and teacher.classes is not None else pairs


def regression_error(
    pairs: Pairs, teacher: Teacher, draw: Draw, generate: Callable[[Tensor, Condition | None], Tensor]
) -> Tensor:
    """Mean squared error of ``generate(noise, condition)`` (B, *shape) to the ODE's latents, for a batch of pairs."""
    noise, latents, condition = pairs.rows(draw.integers(len(pairs.noise), on_cpu=True), teacher)
    return (generate(noise, condition) - latents).square().mean()
