"""How the noise levels of a loss are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.config import needs, option
from flowdistill.teachers import Teacher
from flowdistill.utils.devices import sent
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
    mean: float = option(-1.2, "logit_normal: mean of log(t / (1 - t)) = log sigma",
                         only=needs("sampling", "logit_normal"))
    std: float = option(1.2, "logit_normal: its standard deviation", above=0, only=needs("sampling", "logit_normal"))
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

    def reaches_below(self, teacher: Teacher, t: float) -> bool:
        """Whether there is something to draw below the linear time t."""
        if self.sampling == "karras":
            return len(self._points(teacher, t)) > 0
        low, high = self._range(teacher, t)
        return low < high

    def draw(self, teacher: Teacher, draw: Draw, rows: int | None = None, below: float | None = None) -> Tensor:
        """Linear times (local rows,), float32; ``rows`` over all processes defaults to all.

        ``below``: a linear time; the distribution is that of the times up to it.
        """
        path = teacher.path
        if self.sampling == "karras":
            points, share = self._points(teacher, below), draw.uniform(rows=rows)
            index = points.start + (len(points) * share.double()).long()
            return sent(path.karras_times(KARRAS_POINTS), share.device)[index].to(share.dtype)
        low, high = self._range(teacher, below)
        if self.sampling == "logit_normal":
            if below is None:
                return draw.logit_normal(self.mean, self.std, rows).clamp(low, high)
            # The part of the normal distribution below, by the inverse of its distribution function.
            top = torch.special.ndtr((torch.logit(torch.tensor(high, dtype=torch.float64)) - self.mean) / self.std)
            normal = torch.special.ndtri(top.item() * draw.uniform(rows=rows).double())
            return torch.sigmoid(self.mean + self.std * normal).clamp(low, high).float()
        value = low + (high - low) * draw.uniform(rows=rows)
        return path.native_to_linear(value).to(value.dtype) if self.sampling == "timestep" else value

    def _range(self, teacher: Teacher, below: float | None) -> tuple[float, float]:
        """Smallest and largest value, in the network's timestep where it is drawn in that, else linear."""
        path = teacher.path
        ends = [path.t_min, path.t_max] if below is None else [path.t_min, path.t_max, below]
        values = torch.tensor(ends, dtype=torch.float64)
        if self.sampling == "timestep":
            values = path.coefficients(values).timestep
        first, last, *most = values.tolist()
        low, high = ((1 - share) * first + share * last for share in (self.low, self.high))
        return low, min(high, *most) if most else high

    def _points(self, teacher: Teacher | None = None, below: float | None = None) -> range:
        points = range(round(self.low * KARRAS_POINTS), round(self.high * KARRAS_POINTS))
        if teacher is None or below is None:
            return points
        count = int((teacher.path.karras_times(KARRAS_POINTS) <= below).sum())
        return range(points.start, min(points.stop, count))
