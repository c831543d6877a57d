"""Noise levels on the teacher's Karras grid, as DMD2 and SiD draw them for EDM teachers."""

import pytest
import torch
from diffusers import EDMEulerScheduler

from flowdistill.methods.score_distillation import Dmd2, Dmd2Config
from flowdistill.methods.teacher_score_matching import ScoreMatchingConfig, TeacherScoreMatching
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.tiny import tiny_unet_pipeline


def teacher():
    made = exact_teacher(GaussianVelocity(torch.zeros(2), 1.0))
    made.path = path_from_scheduler(EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0))
    return made


def published_sigmas():
    """DMD2's ``karras_sigmas``: 1,000 points of rho 7, the smallest first."""
    ramp = torch.linspace(0, 1, 1000, dtype=torch.float64)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return ((high + ramp * (low - high)) ** 7).flip(0)


def indices_of(times):
    """Places on the published grid, and how far off the times are, as shares of their sigma."""
    grid, t = published_sigmas(), times.double()
    places = (grid / (1 + grid) - t[:, None]).abs().argmin(dim=1)
    sigma = grid[places]
    return places, (t - sigma / (1 + sigma)).abs() * (1 + sigma)


@pytest.mark.parametrize(("low", "high", "first", "last"), [(0.02, 0.981, 20, 980), (0.0, 0.8, 0, 799),
                                                            (0.0, 1.0, 0, 999), (0.5, 0.501, 500, 500)])
def test_karras_is_uniform_over_the_index(low, high, first, last):
    times = NoiseLevels("karras", low=low, high=high).draw(teacher(), Draw(0, 3, rows=40_000))
    assert times.dtype == torch.float32 and times.shape == (40_000,)
    places, off = indices_of(times)
    assert off.max() < 1e-5
    assert (places.min(), places.max()) == (first, last)
    counts = places.bincount(minlength=1000)[first : last + 1].double()
    mean = 40_000 / (last - first + 1)
    # Chi-squared over the points: as many as there are, give or take.
    assert counts.min() > 0
    assert ((counts - mean).square() / mean).sum() < (last - first) * 1.2 + 1


def test_karras_does_not_depend_on_the_processes():
    levels, whole = NoiseLevels("karras"), Draw(5, 7, rows=12)
    parts = [levels.draw(teacher(), Draw(5, 7, rows=12, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(levels.draw(teacher(), whole), torch.stack(parts, dim=1).flatten())


def test_karras_needs_a_largest_sigma_and_some_points():
    flow = load_teacher(tiny_unet_pipeline())
    settings = {"time": NoiseLevels("karras")}
    for make in (lambda given: Dmd2(Dmd2Config(**settings), given),
                 lambda given: Dmd2(Dmd2Config(critic_time=NoiseLevels("karras")), given),
                 lambda given: TeacherScoreMatching(ScoreMatchingConfig(student_size=0.5, **settings), given)):
        with pytest.raises(UserError, match="starts at t = 1, where it is infinite; set teacher.t_max below 1"):
            make(flow)
    later = load_teacher(tiny_unet_pipeline(), t_max=0.98)
    Dmd2(Dmd2Config(**settings), later)
    top = NoiseLevels("karras", low=0.999).draw(later, Draw(0, 0, rows=4))
    assert torch.allclose(top, torch.full((4,), 0.98))
    with pytest.raises(UserError, match="has none of the 1000 points"):
        NoiseLevels("karras", low=0.5, high=0.5004).validate()
