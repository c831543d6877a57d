"""How the noise levels of a loss are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.config import option
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw

KARRAS_POINTS = 1000


@dataclass
class NoiseLevels:
    """A distribution over the teacher's times.

    ``karras`` is how DMD2 (Yin et al., arXiv 2405.14867) and SiD (Zhou et al., arXiv 2404.04057) draw the noise levels
    of EDM teachers: Karras et al. 2022, Eq. 5, rising from the teacher's smallest sigma to its largest with rho 7, at
    a uniform index. ``low`` and ``high`` are shares of its 1,000 points, from ``low`` up to and without ``high``: 0.02
    and 0.981 are DMD2's 20 to 980; 0 and 0.8 are SiD's first 800 (SiD draws between the points as well).
    """

    sampling: str = option("uniform", "uniform in t, in the network's own timestep or in the index of Karras' grid of "
                                      "1,000 sigmas, or logit-normal in t (which is log-normal in EDM's sigma)",
                           choices=("uniform", "timestep", "karras", "logit_normal"))
    mean: float = option(-1.2, "logit_normal: mean of log(t / (1 - t)) = log sigma")
    std: float = option(1.2, "logit_normal: its standard deviation", above=0)
    low: float = option(0.0, "smallest value, as a share of the teacher's range", at_least=0, below=1)
    high: float = option(1.0, "largest value, as a share of the teacher's range", above=0, at_most=1)

    def validate(self) -> None:
        """UserError for an empty range."""
        if self.low >= self.high:
            raise UserError(f"a range of noise levels is low={self.low}, high={self.high}; low must be below high")
        if self.sampling == "karras" and not self._points():
            raise UserError(f"a range of noise levels is low={self.low}, high={self.high}, which has none of the "
                            f"{KARRAS_POINTS} points that sampling=karras draws from; make it wider")

    def check(self, teacher: Teacher) -> None:
        """UserError for a teacher that has no such noise levels; for a method to say so before it trains."""
        if self.sampling == "karras":
            teacher.path.karras_times(KARRAS_POINTS)

    def _points(self) -> range:
        return range(round(self.low * KARRAS_POINTS), round(self.high * KARRAS_POINTS))

    def draw(self, teacher: Teacher, draw: Draw, rows: int | None = None) -> Tensor:
        """Linear times (local rows,), float32; ``rows`` over all processes defaults to all."""
        path = teacher.path
        if self.sampling == "karras":
            points, share = self._points(), draw.uniform(rows=rows)
            index = points.start + (len(points) * share.double()).long()
            return path.karras_times(KARRAS_POINTS).to(share.device)[index].to(share.dtype)
        ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
        if self.sampling == "timestep":
            ends = path.coefficients(ends).timestep
        low, high = ((1 - share) * ends[0].item() + share * ends[1].item() for share in (self.low, self.high))
        if self.sampling == "logit_normal":
            return draw.logit_normal(self.mean, self.std, rows).clamp(low, high)
        value = low + (high - low) * draw.uniform(rows=rows)
        return path.native_to_linear(value).to(value.dtype) if self.sampling == "timestep" else value
