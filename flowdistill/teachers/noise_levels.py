"""How the noise levels of a loss are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.config import option
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw


@dataclass
class NoiseLevels:
    """A distribution over the teacher's times."""

    sampling: str = option("uniform", "uniform in t, in the network's own timestep, or logit-normal in t (which is "
                                      "log-normal in EDM's sigma)", choices=("uniform", "timestep", "logit_normal"))
    mean: float = option(-1.2, "logit_normal: mean of log(t / (1 - t)) = log sigma")
    std: float = option(1.2, "logit_normal: its standard deviation", above=0)
    low: float = option(0.0, "smallest value, as a share of the teacher's range", at_least=0, below=1)
    high: float = option(1.0, "largest value, as a share of the teacher's range", above=0, at_most=1)

    def validate(self) -> None:
        """UserError for an empty range."""
        if self.low >= self.high:
            raise UserError(f"a range of noise levels is low={self.low}, high={self.high}; low must be below high")

    def draw(self, teacher: Teacher, draw: Draw, rows: int | None = None) -> Tensor:
        """Linear times (local rows,), float32; ``rows`` over all processes defaults to all."""
        path = teacher.path
        ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
        if self.sampling == "timestep":
            ends = path.coefficients(ends).timestep
        low, high = ((1 - share) * ends[0].item() + share * ends[1].item() for share in (self.low, self.high))
        if self.sampling == "logit_normal":
            return draw.logit_normal(self.mean, self.std, rows).clamp(low, high)
        value = low + (high - low) * draw.uniform(rows=rows)
        return path.native_to_linear(value).to(value.dtype) if self.sampling == "timestep" else value
