"""Score distillation's gradients against closed forms, float64 (DMD2, arXiv 2405.14867; SiD, arXiv 2404.04057)."""

import math

import numpy as np
import pytest
import torch

from flowdistill.objectives import adversarial
from flowdistill.objectives import distribution_matching as dm
from flowdistill.teachers.exact import GaussianVelocity

TEACHER_MEAN, TEACHER_STD, SHIFT, SCALE, SIGMA = 1.0, 0.7, -0.5, 0.3, 0.8
T = SIGMA / (1 + SIGMA)


def gaussian(mean, std):
    return GaussianVelocity(torch.tensor([mean], dtype=torch.float64), std)


def quadrature(order=8):
    """WeightSnapshots (z, n) (order^2,) of two unit normals and their weights: exact for polynomials of low degree."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    z, n = np.meshgrid(nodes, nodes, indexing="ij")
    weight = np.outer(weights, weights) / (2 * math.pi)
    return (torch.from_numpy(value.reshape(-1, 1)) for value in (z, n, weight))


def setting(t=T):
    """Sample x = a + b z, its noised state, both velocities there, noise, z and weights."""
    z, n, weight = quadrature()
    time = torch.full((len(z),), t, dtype=torch.float64)
    x = SHIFT + SCALE * z
    state = dm.noised(x, n, time)
    critic, teacher = gaussian(SHIFT, SCALE)(state, time), gaussian(TEACHER_MEAN, TEACHER_STD)(state, time)
    return x, state, critic, teacher, n, z, weight, time


def test_diff_instruct_is_the_kl_gradient_in_both_parameters():
    """dKL/da = E[g], dKL/db = E[g z] with g the score difference; Diff-Instruct's weight is sigma^2."""
    *_, critic, teacher, _, z, weight, time = setting()
    gradient = dm.diff_instruct_gradient(dm.noising_residual(critic, teacher), time) / SIGMA**2
    a, b = (weight * gradient).sum().item(), (weight * gradient * z).sum().item()
    assert a == pytest.approx((SHIFT - TEACHER_MEAN) / (TEACHER_STD**2 + SIGMA**2), abs=1e-12)
    assert b == pytest.approx(SCALE / (TEACHER_STD**2 + SIGMA**2) - SCALE / (SCALE**2 + SIGMA**2), abs=1e-12)
    assert (a, b) == (pytest.approx(-1.3274336, abs=1e-7), pytest.approx(-0.1454722, abs=1e-7))


@pytest.mark.parametrize("alpha, sigma", [(1.0, SIGMA), (math.sqrt(0.3), math.sqrt(0.7))], ids=["VE", "VP"])
def test_denoised_difference_is_the_weighted_score_difference(alpha, sigma):
    """Natively sigma^2 / alpha times the score difference: sigma^2 (VE), (1 - abar) / sqrt(abar) (VP)."""
    x, state, critic, teacher, *_, time = setting(sigma / (alpha + sigma))
    native = (dm.score_from_velocity(critic, state, time) - dm.score_from_velocity(teacher, state, time)) / (
        alpha + sigma)  # a density over x_nat = (alpha + sigma) x
    gradient = dm.diff_instruct_gradient(dm.noising_residual(critic, teacher), time)
    assert torch.allclose(gradient, sigma**2 / alpha * native, atol=1e-12)
    column = time.reshape(-1, 1)
    assert torch.allclose(gradient, (state - column * critic) - (state - column * teacher), atol=1e-12)


def test_surrogate_has_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    loss = dm.surrogate_loss(x, g)
    assert torch.allclose(loss, 0.5 * g.square().flatten(1).mean(dim=1), atol=1e-15)
    (got,) = torch.autograd.grad(loss.mean(), x)
    assert torch.allclose(got, g / g.numel(), atol=1e-15)
    (direct,) = torch.autograd.grad(0.5 * (x - (x - g).detach()).square().mean(), x)
    assert torch.allclose(got, direct, atol=1e-12)
    # In float32 a small gradient beside a large sample survives, which the difference would lose.
    large = torch.full((1, 1), 1000.0, requires_grad=True)
    (tiny,) = torch.autograd.grad(dm.surrogate_loss(large, torch.full((1, 1), 1e-6)).mean(), large)
    assert tiny.item() == pytest.approx(1e-6)


def test_dmd_normaliser_in_denoised_estimates():
    x, state, critic, teacher, n, *_, time = setting()
    gradient = dm.dmd_gradient(dm.noising_residual(critic, teacher), dm.sampling_error(teacher, x, n))
    column = time.reshape(-1, 1)
    fake, real = state - column * critic, state - column * teacher
    expected = (fake - real) / (x - real).abs().mean(dim=1, keepdim=True)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_dmd_gradient_has_size_one_when_the_critic_returns_the_sample():
    generator = torch.Generator().manual_seed(0)
    x, n, teacher = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    perfect = n - x  # D_critic(x_t) = x
    error = dm.sampling_error(teacher, x, n)
    gradient = dm.dmd_gradient(dm.noising_residual(perfect, teacher), error)
    assert torch.allclose(gradient.abs().flatten(1).mean(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-14)
    assert (gradient * error >= 0).all()  # along x - D_teacher = t e: descent goes to the teacher's estimate
    nothing = dm.dmd_gradient(torch.zeros_like(x), torch.zeros_like(x))
    assert (nothing == 0).all()


def test_freeflows_form_is_the_same_residual():
    """<V, Delta> with f = start - d V moves f along +Delta / d: -Delta up to the constant d."""
    x, state, critic, teacher, *_, time = setting()
    residual = dm.noising_residual(critic, teacher)
    sample = x.clone().requires_grad_()
    duration = 0.8
    (freeflow,) = torch.autograd.grad(((1.0 - sample) / duration * residual).sum(), sample)
    assert torch.allclose(freeflow, -residual / duration, atol=1e-14)
    assert torch.allclose(dm.diff_instruct_gradient(residual, time), time.reshape(-1, 1) * duration * freeflow)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_with_an_exact_critic_is_the_fisher_divergence(alpha):
    x, state, critic, teacher, n, _, weight, time = setting()
    error = dm.sampling_error(teacher, x, n)
    unscaled = dm.sid_loss(dm.noising_residual(critic, teacher), error, time, alpha) * error.abs().mean(dim=1)
    column = time.reshape(-1, 1)
    gap = (state - column * teacher) - (state - column * critic)
    # Times t, for the division is by mean |x - D_teacher| = t mean |e|.
    value = T * (weight[:, 0] * unscaled).sum()
    assert value.item() == pytest.approx(((1 - alpha) * weight * gap.square()).sum().item(), abs=1e-12)
    published = (gap * ((state - column * teacher) - x - alpha * gap)).mean(dim=1) / (
        x - (state - column * teacher)).abs().mean(dim=1)
    assert torch.allclose(dm.sid_loss(dm.noising_residual(critic, teacher), error, time, alpha), published, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.2])
def test_sid_gradient_goes_through_both_networks(alpha):
    """In the mean a of x = a + z b, networks fixed: D = A x_t + B each, and the loss is a polynomial of a."""
    z, n, weight = quadrature()
    time = torch.full((len(z),), T, dtype=torch.float64)
    a = torch.tensor(SHIFT, dtype=torch.float64, requires_grad=True)
    x = a + SCALE * z
    state = dm.noised(x, n, time)
    critic, teacher = gaussian(SHIFT, SCALE)(state, time), gaussian(TEACHER_MEAN, TEACHER_STD)(state, time)
    error = dm.sampling_error(teacher, x, n)
    size = error.detach().abs().mean(dim=1)
    loss = (weight[:, 0] * T * size * dm.sid_loss(dm.noising_residual(critic, teacher), error, time, alpha)).sum()
    (got,) = torch.autograd.grad(loss, a, retain_graph=True)

    def affine(mean, std):  # E[x_0 | x_t] of N(mean, std^2) on the linear path
        slope = (1 - T) * std**2 / ((1 - T) ** 2 * std**2 + T**2)
        return slope, mean * (1 - slope * (1 - T))

    (a_real, b_real), (a_fake, b_fake) = affine(TEACHER_MEAN, TEACHER_STD), affine(SHIFT, SCALE)
    slope, offset = a_real - a_fake, b_real - b_fake
    center = (1 - T) * SHIFT
    gap, rest = slope * center + offset, a_real * center + b_real - SHIFT
    expected = slope * (1 - T) * (rest - alpha * gap) + gap * (a_real * (1 - T) - 1 - alpha * slope * (1 - T))
    assert got.item() == pytest.approx(expected, abs=1e-12)
    assert got < 0  # descent moves the mean from -0.5 towards the teacher's 1
    detached = dm.sid_loss(dm.noising_residual(critic, teacher).detach(), error, time, alpha)
    (other,) = torch.autograd.grad((weight[:, 0] * T * size * detached).sum(), a)
    assert abs(other - got) > 1e-2


def test_adversarial_losses():
    fake, real = torch.tensor([-1.0, 2.0], dtype=torch.float64), torch.tensor([0.5, -3.0], dtype=torch.float64)
    sigmoid = torch.sigmoid
    expected = -torch.log(1 - sigmoid(fake)) - torch.log(sigmoid(real))
    assert torch.allclose(adversarial.discriminator_loss(fake, real), expected, atol=1e-14)
    assert torch.allclose(adversarial.generator_loss(fake), -torch.log(sigmoid(fake)), atol=1e-14)
    zero = torch.zeros(1, dtype=torch.float64)
    assert adversarial.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
