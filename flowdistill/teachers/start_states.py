"""The start of every data-free method: rows of the prior with their conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw


class StartStates(NamedTuple):
    """Start states t_max n (B, *shape), their conditions, and guidance scales (B,); None where there are none."""

    start: Tensor
    condition: Condition | None
    guidance: Tensor | None = None

    def rows(self, part: slice) -> StartStates:
        condition = None if self.condition is None else self.condition[part]
        return StartStates(self.start[part], condition, None if self.guidance is None else self.guidance[part])

    def twice(self) -> StartStates:
        condition = None if self.condition is None else Condition.cat([self.condition, self.condition])
        guidance = None if self.guidance is None else torch.cat([self.guidance, self.guidance])
        return StartStates(torch.cat([self.start, self.start]), condition, guidance)


def draw_start_states(
    teacher: Teacher, draw: Draw, rows: int | None = None, guidance: tuple[float, float] | None = None
) -> StartStates:
    """``rows`` (over all processes; all of the micro-batch by default) of the prior.

    Args:
        guidance: range of uniform guidance scales; None for none.
    """
    start = teacher.t_max * draw.normal(teacher.shape, rows=rows)
    condition = teacher.draw_condition(draw, rows)
    return StartStates(start, condition, None if guidance is None else draw.uniform(*guidance, rows=rows))


def check_guidance(teacher: Teacher, settings: Mapping[str, float]) -> None:
    """UserError where ``settings``, guidance scales by name, ask for guidance that the teacher cannot give."""
    if teacher.can_guide or all(scale == 1 for scale in settings.values()):
        return
    given = " and ".join(f"method.{name} is {scale}" for name, scale in settings.items())
    raise UserError(f"{given}, but the teacher has no null label; set {'both' if len(settings) > 1 else 'it'} to 1, or "
                    "teacher.null_label")


def at_t_max(teacher: Teacher, start: Tensor) -> Tensor:
    """t_max for each row (B,), in float64: an epsilon teacher divides by 1 - t_max."""
    return torch.full((len(start),), teacher.t_max, dtype=torch.float64, device=start.device)
