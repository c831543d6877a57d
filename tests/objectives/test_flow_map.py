"""The identities of flow maps between any two times, float64: exact maps fulfil them, and others do not.

The Gaussian's map is known in closed form, that of a mixture on a line by its distribution function (see
``test_consistency.py``): no solver is in either. Figures of the Gaussian are at x = 1.3, t = 0.8, r = 0.25.
"""

import pytest
import torch

from flowdistill.objectives import flow_map as fm
from flowdistill.teachers.exact import GaussianVelocity
from tests.objectives.test_consistency import GAUSSIAN, MEAN, STD, WORLDS, column, gaussian_map, noise, odd

X, T, S, R = torch.full((1, 1), 1.3, dtype=torch.float64), column(0.8, 1), column(0.55, 1), column(0.25, 1)
ONE = torch.ones(1, dtype=torch.float64)


def average(jump):
    """u(x, t, r) of a map."""
    return lambda x, t, r: (x - jump(x, t, r)) / (t - r).reshape(-1, 1)


exact = average(gaussian_map)


def spreading(x, t, r):
    """X = (1 - r) m + sqrt(V_t / V_r) (x - (1 - t) m), which does to the distances what the flow undoes."""
    centre, end = ((1 - time).reshape(-1, 1) * MEAN for time in (t, r))
    return end + (x - centre) ** 2 / (gaussian_map(x, t, r) - end)


inverse = average(spreading)


def lagrangian(u, x=X, t=T, r=R, field=GAUSSIAN):
    derivative = fm.duration_derivative_jvp(lambda d: u(x, t, t - d), t - r)
    velocity = u(x, t, r)
    return fm.lagrangian_residual(velocity, derivative, t, r, field(fm.jump(x, t, r, velocity), r))


def eulerian(u, x=X, t=T, r=R, field=GAUSSIAN, slope=None, aim=None):
    """``aim``: another end than r for all of the start's times; ``slope``: another direction of x."""
    direction = field(x, t) if slope is None else slope
    derivative = fm.total_derivative_jvp(lambda x, time: u(x, time, r if aim is None else aim(time)), x, t, direction)
    return fm.eulerian_residual(u(x, t, r), derivative, t, r, field(x, t))


def semigroup(u, x=X, t=T, s=S, r=R):
    first = u(x, t, s)
    return u(x, t, r) - fm.semigroup_target(first, u(fm.jump(x, t, s, first), s, r), t, s, r)


# --- the three residuals


def test_the_gaussians_map_has_no_residual_at_any_times():
    x = noise(64, 1)
    t = 0.1 + 0.9 * torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    r = 0.9 * t * noise(64, 3).sigmoid().flatten()
    s = r + 0.3 * (t - r)
    for residual in (lagrangian(exact, x, t, r), eulerian(exact, x, t, r), semigroup(exact, x, t, s, r)):
        assert residual.abs().max() < 1e-11


@pytest.mark.parametrize(("wrong", "figures"), [
    (lambda x, t, r: GAUSSIAN(x, t), (0.378, 1.208, 0.172)),  # a student that gives the velocity: one Euler step
    (lambda x, t, r: -exact(x, t, r), (-1.277, 0.923, 0.114)),
    (inverse, (-4.79, -1.28, 0.0)),  # it composes: the semigroup alone fixes no field
], ids=["velocity", "turned round", "inverse flow"])
def test_other_fields_have_residuals(wrong, figures):
    """In this order: Eulerian, Lagrangian, semigroup."""
    found = [eulerian(wrong).item(), lagrangian(wrong).item(), semigroup(wrong).item()]
    assert found == pytest.approx(figures, abs=6e-3)
    assert abs(found[2]) > 0.1 or abs(found[2]) < 1e-13


def test_the_derivative_keeps_the_end_and_moves_the_start():
    assert eulerian(exact, aim=lambda time: time - (T - R)).item() == pytest.approx(0.731, abs=1e-3)  # t - r fixed
    assert eulerian(exact, slope=torch.zeros_like(X)).item() == pytest.approx(-0.282, abs=1e-3)  # x standing still


@pytest.mark.parametrize("world", WORLDS)
def test_difference_quotients_have_their_order_on_exact_maps(world):
    field, jump = WORLDS[world]
    u, x, t, r, s = average(jump), noise(), column(0.8), column(0.25), column(0.55)
    velocity, slope = u(x, t, r), field(x, t)
    assert semigroup(u, x, t, s, r).abs().max() < 1e-11
    sizes = {"lagrangian": [], "eulerian": []}
    twice, times = torch.cat([x, x]), torch.cat([t, t])
    ends = torch.cat([r, r])
    for h in (8e-3, 4e-3):
        derivative = fm.duration_derivative(lambda d: u(twice, times, times - d), t - r, h, t)
        residual = fm.lagrangian_residual(velocity, derivative, t, r, field(fm.jump(x, t, r, velocity), r))
        sizes["lagrangian"].append(residual.abs().max().item())
        derivative = fm.total_derivative(lambda x, time: u(x, time, ends), x, t, slope, column(h), column(h))
        sizes["eulerian"].append(fm.eulerian_residual(velocity, derivative, t, r, slope).abs().max().item())
    for first, second in sizes.values():
        assert first < 0.05 and 3.3 < first / second < 4.7


def test_the_lagrangian_residual_is_freeflows_at_t_max():
    """Bit for bit, also of a field that is no map."""
    x, d = noise(), torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    whole = torch.ones_like(d)
    for u in (exact, lambda x, t, r: odd(x, t - r)):
        velocity = u(x, whole, whole - d)
        derivative = fm.duration_derivative_jvp(lambda d, u=u: u(x, whole, whole - d), d)
        end = GAUSSIAN(fm.end_point(x, d, velocity), whole - d)
        ours = fm.lagrangian_residual(velocity, derivative, whole, whole - d, end)
        theirs = fm.generating_residual(velocity, derivative, whole - (whole - d), end)
        assert torch.equal(ours, theirs)
    field = GaussianVelocity(torch.tensor([MEAN], dtype=torch.float64), STD)
    assert torch.allclose(exact(x, whole, whole - d), field.average_velocity(x, d), atol=1e-13)


# --- jumps


def test_jumps_compose_and_begin_as_the_velocity():
    x = noise(64, 5)
    t = column(0.9, 64)
    assert torch.equal(fm.jump(x, t, t, odd(x, t)), x)  # whatever u is
    for grid in ([0.9, 0.2], [0.9, 0.7, 0.5, 0.2], [0.9, 0.85, 0.3, 0.25, 0.21, 0.2]):
        state = x
        for now, later in zip(grid, grid[1:], strict=False):
            t, r = column(now, 64), column(later, 64)
            state = fm.jump(state, t, r, exact(state, t, r))
        assert torch.allclose(state, gaussian_map(x, column(0.9, 64), column(0.2, 64)), atol=1e-13)
    gaps = [(exact(x, t, t - gap) - GAUSSIAN(x, t)).abs().max().item() for gap in (2e-3, 1e-3)]
    assert gaps[0] < 0.02 and 1.9 < gaps[0] / gaps[1] < 2.1


# --- the discrete forms


def discrete(u, h, kind, x, t, r, field):
    """(d / h) (u - target) with the teacher's step at the start or at the end."""
    d, step = t - r, torch.full_like(t, h)
    if kind == "eulerian":
        slope = field(x, t)
        target = fm.discrete_target(u(x - h * slope, t - h, r), slope, d, step)
    else:
        shorter = u(x, t, r + h)
        target = fm.discrete_target(shorter, field(fm.jump(x, t, r + h, shorter), r + h), d, step)
    return fm.discrete_residual(u(x, t, r), target, d, step)


def general(x, t, r):
    """A field that is no map, smooth in all three."""
    return odd(x, t) * (1 + 0.5 * (t - r).reshape(-1, 1)) + torch.cos(r).reshape(-1, 1)


@pytest.mark.parametrize("kind", ["eulerian", "lagrangian"])
def test_discrete_residuals_are_the_continuous_ones_in_the_limit(kind):
    x, t, r = noise(), column(0.8), column(0.25)
    wanted = (eulerian if kind == "eulerian" else lagrangian)(general, x, t, r)
    gaps = [(discrete(general, h, kind, x, t, r, GAUSSIAN) - wanted).abs().max().item() for h in (4e-3, 2e-3)]
    assert 1.8 < gaps[0] / gaps[1] < 2.2 and wanted.abs().max() > 0.5
    # Without the factor d / h the same residual would count h / d as much, so that long jumps would hardly count.
    d, h = t - r, torch.full_like(t, 2e-3)
    plain = fm.discrete_residual(general(x, t, r), general(x, t, r) - wanted, d, h) / fm.column(d / h, x)
    assert torch.allclose(plain, wanted, atol=1e-12)


@pytest.mark.parametrize("kind", ["eulerian", "lagrangian"])
@pytest.mark.parametrize("world", WORLDS)
def test_exact_maps_are_one_step_of_the_teacher_away_from_the_discrete_target(kind, world):
    """u - target is O(h^2): the residual O(h)."""
    field, jump = WORLDS[world]
    x, t, r = noise(), column(0.8), column(0.25)
    sizes = [discrete(average(jump), h, kind, x, t, r, field).abs().max().item() for h in (4e-3, 2e-3)]
    assert sizes[0] < 0.1 and 1.7 < sizes[0] / sizes[1] < 2.3


def test_one_discrete_step_of_the_whole_jump_is_the_velocity():
    x, t, r = noise(), column(0.8), column(0.25)
    slope, d = GAUSSIAN(x, t), t - r
    assert torch.allclose(fm.discrete_target(odd(x, t), slope, d, d), slope, atol=1e-14)
