"""What the discriminator is good for besides: density ratios as weights, and the penalty on its slope. Float64."""

import math

import numpy as np
import pytest
import torch

from flowdistill.objectives import adversarial
from flowdistill.objectives import distribution_matching as dm

GENERATORS = {  # f of D_f(p || q) = E_q[f(p / q)], and the constant of h that a division by the mean takes away
    "rkl": (lambda r: -r.log(), 1.0),
    "kl": (lambda r: r * r.log(), 1.0),
    "js": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), 1.0),
    "sf": (lambda r: (r + 1) * ((r + 1) / r).log(), 1.0),
    "neyman": (lambda r: (1 - r).square() / r, 0.5),
    "sh": (lambda r: 1 - r.sqrt(), 4.0),
    "jf": (lambda r: (r - 1) * r.log(), 1.0),
}


def test_every_divergence_has_a_generator():
    assert tuple(GENERATORS) == adversarial.DIVERGENCES


@pytest.mark.parametrize("name", GENERATORS)
def test_weight_is_the_second_derivative_of_the_divergence(name):
    f, constant = GENERATORS[name]
    r = torch.tensor([0.15, 0.5, 1.0, 2.0, 19.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), r)
    weight = adversarial.divergence_weight(name, r.detach().log())
    assert torch.allclose(weight, constant * r.detach() ** 2 * second, atol=1e-12)


@pytest.mark.parametrize("name", GENERATORS)
def test_weighted_score_difference_is_the_divergences_gradient(name):
    """d/dm D_f(N(0, 1) || N(m, 1)) = E[h(r) (score_student - score_teacher)], by quadrature, against a difference."""
    f, constant = GENERATORS[name]
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z, weight = torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))

    def log_ratio(x, m):
        return (x - m).square() / 2 - x.square() / 2

    def divergence(m):
        return (weight * f(log_ratio(z + m, m).exp())).sum().item()

    m, step = 0.1, 1e-4
    x = z + m
    h = adversarial.divergence_weight(name, log_ratio(x, m)) / constant
    score_difference = -(x - m) + x  # the student's minus the teacher's
    expected = (divergence(m + step) - divergence(m - step)) / (2 * step)
    assert (weight * h * score_difference).sum().item() == pytest.approx(expected, rel=1e-4)


def test_values_that_are_known():
    zero = torch.zeros(3, dtype=torch.float64)
    for name in ("js", "sf"):
        assert torch.equal(adversarial.divergence_weight(name, zero), zero + 0.5)
    assert torch.equal(adversarial.divergence_weight("rkl", zero + 7), zero + 1)
    far = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    assert adversarial.divergence_weight("kl", far).tolist() == pytest.approx([0.1, 20.0])  # limits of the ratio
    assert adversarial.divergence_weight("neyman", far).tolist() == pytest.approx([10.0, 0.05])
    with pytest.raises(ValueError, match="must be one of rkl, kl"):
        adversarial.divergence_weight("hellinger", zero)


@pytest.mark.parametrize("name", GENERATORS)
def test_equal_logits_change_nothing(name):
    generator = torch.Generator().manual_seed(0)
    residual, error = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    h = adversarial.divergence_weight(name, torch.full((5,), 0.7, dtype=torch.float64))
    plain = dm.dmd_gradient(residual, error)
    assert torch.allclose((h / h.mean())[:, None] * plain, plain, rtol=1e-15, atol=0)
    other = adversarial.divergence_weight(name, torch.linspace(-1, 1, 5, dtype=torch.float64))
    assert torch.allclose(other / other.mean(), torch.ones(5, dtype=torch.float64)) == (name == "rkl")


def test_slope_penalty_is_the_squared_slope():
    """Exactly a^2 |w|^2 on average for logits that are linear, by quadrature over the small noise; with a^2 for all."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    n = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2))
    weight = torch.from_numpy(np.outer(weights, weights).reshape(-1) / (2 * math.pi))
    slope, real = torch.tensor([0.7, -1.2], dtype=torch.float64), torch.tensor([0.3, 0.4], dtype=torch.float64)
    for scale in (0.1, 0.2):
        penalty = adversarial.slope_penalty(real @ slope, (real + scale * n) @ slope)
        assert (weight * penalty).sum().item() == pytest.approx(scale**2 * slope.square().sum().item(), abs=1e-14)


def test_slope_penalty_of_two_different_inputs_is_none():
    """A real sample with the noise of its level against one without: the published slip, which a does not shrink."""
    generator = torch.Generator().manual_seed(0)
    real, n, small = (torch.randn(256, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    state = dm.noised(real, n, torch.full((256,), 0.6, dtype=torch.float64))
    consistent, slip = ([adversarial.slope_penalty(state.sum(1), (start + scale * small).sum(1)).mean().item()
                         for scale in (1e-1, 1e-4)] for start in (state, real))
    assert consistent[1] == pytest.approx(1e-6 * consistent[0], rel=1e-6)
    assert slip[1] > 0.5 * slip[0] > 0.5
