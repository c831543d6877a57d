"""Decoupled distribution matching (arXiv 2511.22677) against guided matching and closed forms, float64."""

import pytest
import torch

from flowdistill.objectives import distribution_matching as dm
from flowdistill.teachers.exact import GaussianVelocity

SCALE = 3.5
CONDITIONAL = GaussianVelocity(torch.tensor([1.0, -0.5], dtype=torch.float64), 0.4)
NULL = GaussianVelocity(torch.tensor([0.2, 0.1], dtype=torch.float64), 0.9)
CRITIC = GaussianVelocity(torch.tensor([0.6, 0.3], dtype=torch.float64), 0.5)
WEIGHTINGS = {
    "dmd": lambda residual, error, t: dm.dmd_gradient(residual, error),
    "diff_instruct": lambda residual, error, t: dm.diff_instruct_gradient(residual, t),
}


def drawn(rows=64):
    """Samples, their noise, and two noise levels each."""
    generator = torch.Generator().manual_seed(0)
    x, n = (torch.randn(rows, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t, s = (0.05 + 0.9 * torch.rand(rows, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, n, t, s


def guided(state, t):
    return NULL(state, t) + SCALE * (CONDITIONAL(state, t) - NULL(state, t))


def decoupled(x, n, t, s):
    """Delta' and the guided teacher's error at x_t."""
    state, lower = dm.noised(x, n, t), dm.noised(x, n, s)
    augmentation = guided(lower, s) - CONDITIONAL(lower, s)
    residual = dm.noising_residual(CRITIC(state, t), CONDITIONAL(state, t))
    return dm.decoupled_residual(residual, augmentation, t, s), dm.sampling_error(guided(state, t), x, n)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_at_one_level_it_is_matching_of_the_guided_teacher(weighting):
    x, n, t, s = drawn()
    state = dm.noised(x, n, t)
    whole = dm.noising_residual(CRITIC(state, t), guided(state, t)), dm.sampling_error(guided(state, t), x, n)
    weight = WEIGHTINGS[weighting]
    assert torch.allclose(weight(*decoupled(x, n, t, t), t), weight(*whole, t), rtol=0, atol=2e-15)
    assert (weight(*decoupled(x, n, t, s), t) - weight(*whole, t)).abs().mean() > 0.1  # at two it is not


def test_terms_are_added_as_estimates_of_the_data():
    """(D_critic - D_1) - (D_w - D_1), each at its own level, over mean |x - D_w| at the level of matching."""
    x, n, t, s = drawn()

    def denoised(field, time):
        state = dm.noised(x, n, time)
        return state - time[:, None] * field(state, time)

    matching = denoised(CRITIC, t) - denoised(CONDITIONAL, t)
    augmentation = (SCALE - 1) * (denoised(CONDITIONAL, s) - denoised(NULL, s))
    residual, error = decoupled(x, n, t, s)
    assert torch.allclose(dm.diff_instruct_gradient(residual, t), matching - augmentation, atol=1e-14)
    size = (x - denoised(guided, t)).abs().mean(dim=1, keepdim=True)
    assert torch.allclose(dm.dmd_gradient(residual, error), (matching - augmentation) / size, atol=1e-12)
    swapped = (matching * (SCALE - 1) - augmentation / (SCALE - 1)) / size  # the weight on the other term
    assert (dm.dmd_gradient(residual, error) - swapped).abs().mean() > 0.1


def test_descent_goes_where_guidance_points():
    """With a critic that is the conditional teacher nothing but guidance is left, and at s its own estimates decide."""
    x, n, t, s = drawn()
    lower = dm.noised(x, n, s)
    augmentation = guided(lower, s) - CONDITIONAL(lower, s)
    gradient = dm.diff_instruct_gradient(dm.decoupled_residual(torch.zeros_like(x), augmentation, t, s), t)
    toward = -s[:, None] * (CONDITIONAL(lower, s) - NULL(lower, s))  # D_1 - D_null
    assert torch.allclose(-gradient, (SCALE - 1) * toward, atol=1e-14)
