"""Consistency objectives in float64 on fields whose maps between any two times are known in closed form.

A Gaussian N(m, s^2) has X(x, t, r) = (1 - r) m + sqrt(V_r / V_t) (x - (1 - t) m), V_t = (1 - t)^2 s^2 + t^2. A mixture
on a line has X = F_r^-1(F_t(x)) with F_t the distribution function at t, found by bisection: no solver is in it.
"""

import math

import pytest
import torch

from flowdistill.objectives import consistency as cm
from flowdistill.objectives import flow_map as fm
from flowdistill.teachers.exact import GaussianVelocity, MixtureVelocity
from flowdistill.teachers.solvers import integrate

MEAN, STD = 0.7, 0.5
MEANS, WIDTH, SHARES = torch.tensor([-1.0, 0.8], dtype=torch.float64), 0.3, torch.tensor([0.3, 0.7]).double()
GAUSSIAN = GaussianVelocity(torch.tensor([MEAN], dtype=torch.float64), STD)
MIXTURE = MixtureVelocity(MEANS[:, None], WIDTH, SHARES)


def column(value, rows=16):
    return torch.full((rows,), value, dtype=torch.float64)


def noise(rows=16, seed=0):
    return torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_map(x, t, r):
    t, r = t.reshape(-1, 1), r.reshape(-1, 1)

    def variance(time):
        return (1 - time) ** 2 * STD**2 + time**2

    return (1 - r) * MEAN + torch.sqrt(variance(r) / variance(t)) * (x - (1 - t) * MEAN)


def distribution(x, t):
    t = t.reshape(-1, 1)
    spread = torch.sqrt((1 - t) ** 2 * WIDTH**2 + t**2)
    return (SHARES * torch.special.ndtr((x - (1 - t) * MEANS) / spread)).sum(dim=1, keepdim=True)


def mixture_map(x, t, r):
    wanted, low, high = distribution(x, t), torch.full_like(x, -9.0), torch.full_like(x, 9.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = distribution(middle, r) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


WORLDS = {"gaussian": (GAUSSIAN, gaussian_map), "mixture": (MIXTURE, mixture_map)}


def velocity_to(jump, r):
    """u of a map to the time r."""
    def network(x, t):
        end = torch.full_like(t, r)
        return (x - jump(x, t, end)) / (t - end).reshape(-1, 1)

    return network


def odd(x, t):
    """A field that is no map of anything."""
    return torch.sin(2 * x) * (1 + t.reshape(-1, 1) ** 2) + 0.3 * x


# --- the two worlds themselves


@pytest.mark.parametrize("world", WORLDS)
def test_the_maps_are_the_fields_own(world):
    """Between any two times they are what the teacher's ODE makes (Heun, 2,000 steps), and they compose."""
    field, jump = WORLDS[world]
    x, t, r, s = noise(), column(0.9), column(0.25), column(0.6)
    grid = torch.linspace(0.9, 0.25, 2001, dtype=torch.float64).tolist()
    solved = integrate(lambda state, time: field(state, column(time)), x, grid, "heun")
    assert (jump(x, t, r) - solved).abs().max() < 1e-6
    assert (jump(jump(x, t, s), s, r) - jump(x, t, r)).abs().max() < 1e-12
    assert torch.allclose(jump(x, t, t), x, atol=1e-12)


# --- the residual


@pytest.mark.parametrize("aim", [0.0, 0.25])
def test_exact_maps_have_no_residual_and_others_have(aim):
    x, t, r = 1.3 * torch.ones(16, 1, dtype=torch.float64), column(0.8), column(aim)
    slope = GAUSSIAN(x, t)

    def residual(network, direction=slope):
        u = network(x, t)
        return fm.generating_residual(u, fm.total_derivative_jvp(network, x, t, direction), t - r, slope).abs().max()

    exact = velocity_to(gaussian_map, aim)
    assert residual(exact) < 1e-12
    assert residual(GAUSSIAN) > 0.1  # a student that gives the velocity: one Euler step
    assert residual(lambda x, t: -exact(x, t)) > 0.1
    assert residual(exact, torch.zeros_like(slope)) > 0.1  # D without the motion of x

    def moving(x, t):  # D with t - r fixed instead of r
        return (x - gaussian_map(x, t, t - 0.8 + r)) / (0.8 - r).reshape(-1, 1)

    assert aim == 0 or residual(moving) > 0.1


@pytest.mark.parametrize("world", WORLDS)
def test_difference_quotients_have_their_order(world):
    """Central: O(h^2); one-sided: O(h). On the mixture there is no other derivative of the exact map."""
    field, jump = WORLDS[world]
    x, t, r = noise(), column(0.8), column(0.25)
    slope, network = field(x, t), velocity_to(jump, 0.25)
    for sides, order in (((1.0, 1.0), 2), ((1.0, 0.0), 1), ((0.0, 1.0), 1)):
        sizes = []
        for h in (4e-3, 2e-3):
            derivative = fm.total_derivative(network, x, t, slope, column(h * sides[0]), column(h * sides[1]))
            sizes.append(fm.generating_residual(network(x, t), derivative, t - r, slope).abs().max().item())
        assert sizes[0] < 0.05 and 2**order * 0.8 < sizes[0] / sizes[1] < 2**order * 1.2


def test_both_derivatives_agree():
    x, t = noise(), column(0.6)
    slope = GAUSSIAN(x, t)
    exact = fm.total_derivative_jvp(odd, x, t, slope)
    h = column(1e-4)
    assert torch.allclose(fm.total_derivative(odd, x, t, slope, h, h), exact, atol=1e-6)


# --- the discrete form


@pytest.mark.parametrize("solver, order", [("euler", 2), ("heun", 3)])
@pytest.mark.parametrize("world", WORLDS)
def test_local_order_of_the_target(world, solver, order):
    """How far the exact map is from itself after one step of the teacher: O(h^2) by Euler's, O(h^3) by Heun's."""
    field, jump = WORLDS[world]
    x, t, r, errors = noise(), column(0.7), column(0.0), []
    for h in (0.01, 0.005):
        later = cm.teacher_step(field, x, t, t - h, solver)
        errors.append((jump(later, t - h, r) - jump(x, t, r)).abs().max().item())
    assert 2**order * 0.8 < errors[0] / errors[1] < 2**order * 1.25


def test_the_discrete_difference_is_minus_step_times_the_residual():
    """For any network: f(x_t, t) - f(x_s, s) = -(t - r) (u - E_h) exactly, E_h the share of the teacher's velocity and
    of the earlier u; and over -h it tends to R with slope 1."""
    x, t, r = noise(), column(0.8), column(0.25)
    slope = GAUSSIAN(x, t)
    residual = fm.generating_residual(odd(x, t), fm.total_derivative_jvp(odd, x, t, slope), t - r, slope)
    errors = []
    for h in (0.01, 0.005, 0.0025):
        s = t - h
        later = cm.teacher_step(GAUSSIAN, x, t, s, "euler")
        difference = fm.end_point(x, t - r, odd(x, t)) - fm.end_point(later, s - r, odd(later, s))
        share = h / (t - r).reshape(-1, 1)
        blended = share * slope + (1 - share) * odd(later, s)
        assert torch.allclose(difference, -(t - r).reshape(-1, 1) * (odd(x, t) - blended), atol=1e-13)
        errors.append((difference / -h - residual).abs().max().item())
    assert all(1.8 < one / other < 2.2 for one, other in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_row_takes_the_solvers_own_step(solver):
    """Each row its own, the last into 0 included, where Heun's has one velocity."""
    x, t, s = noise(4), torch.tensor([1.0, 0.7, 0.3, 0.02]).double(), torch.tensor([0.8, 0.6, 0.05, 0.0]).double()
    rows = cm.teacher_step(MIXTURE, x, t, s, solver)
    for i in range(4):
        one = integrate(lambda state, time: MIXTURE(state, column(time, 1)), x[i : i + 1], [t[i].item(), s[i].item()],
                        solver)
        assert torch.allclose(rows[i : i + 1], one, atol=1e-14)


def test_pseudo_huber():
    d = torch.tensor([[3e-5, -3e-5], [2.0, -4.0]], dtype=torch.float64)
    small, large = cm.pseudo_huber(d, 1e-2).tolist()
    assert small == pytest.approx(9e-10 / 2e-2, rel=1e-4) and large == pytest.approx(3 - 1e-2, rel=1e-4)
    assert cm.pseudo_huber(torch.zeros(1, 2), 1e-3).item() == 0


# --- the continuous form


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("data_std", [0.5, 1.0])
def test_scm_in_its_own_coordinates_is_the_same(data_std, share):
    """Its network, its function and its tangent, written down as in the paper for a field that is no map."""
    x, t = noise(), column(0.55)
    angle = torch.atan2(t, data_std * (1 - t))
    m = (torch.cos(angle) + data_std * torch.sin(angle))[:, None]

    def own_coordinates(x_trig, angle):
        total = torch.cos(angle) + data_std * torch.sin(angle)
        linear, time = x_trig / total[:, None], data_std * torch.sin(angle) / total
        u = odd(linear, time)
        slope = (data_std * torch.cos(angle) - torch.sin(angle))[:, None]
        return (slope * linear + data_std / total[:, None] * u) / data_std  # F

    def teacher(x_trig, angle):
        total = (torch.cos(angle) + data_std * torch.sin(angle))[:, None]
        linear, time = x_trig / total, data_std * torch.sin(angle) / total[:, 0]
        slope = (data_std * torch.cos(angle) - torch.sin(angle))[:, None]
        return slope * linear + data_std / total * GAUSSIAN(linear, time)  # sigma_d F of the teacher: dx / d angle

    trig = m * x
    F = own_coordinates(trig, angle)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    assert torch.allclose(cos * trig - sin * data_std * F, x - t[:, None] * odd(x, t), atol=1e-13)
    motion = teacher(trig, angle)
    dF = torch.func.jvp(own_coordinates, (trig, angle), (motion, torch.ones_like(angle)))[1]
    # Lu and Song, Eq. 6 times cos, with the warm-up r: -cos^2 (sigma_d F - dx/dt) - r cos sin (x + sigma_d dF/dt)
    tangent = -(cos**2) * (data_std * F - motion) - share * cos * sin * (trig + data_std * dF)
    derivative = fm.total_derivative_jvp(odd, x, t, GAUSSIAN(x, t))
    residual = cm.warmed_residual(odd(x, t), derivative, t, GAUSSIAN(x, t), t, data_std, share)
    scale, kappa = cm.trigonometric(t, data_std)
    assert torch.allclose(scale[:, None], m, atol=1e-14)
    assert torch.allclose(-kappa[:, None] * residual, tangent, atol=1e-12)
    changed = odd(x, t) + 0.1
    assert torch.allclose(  # what a change of u is one of F
        (m * 0 + 0.1) / m, (data_std / m * changed + (data_std * cos - sin) * x) / data_std - F, atol=1e-13)


def test_the_whole_residual_without_a_warm_up():
    x, t, r = noise(), column(0.6), column(0.2)
    slope = GAUSSIAN(x, t)
    derivative = fm.total_derivative_jvp(odd, x, t, slope)
    whole = cm.warmed_residual(odd(x, t), derivative, t - r, slope, t, 0.5, 1.0)
    assert torch.allclose(whole, fm.generating_residual(odd(x, t), derivative, t - r, slope), atol=1e-14)
    start = cm.warmed_residual(slope, derivative, t - r, slope, t, 0.5, 0.0)
    assert start.abs().max() == 0  # a student that starts as its teacher


def test_normalized_signals_have_at_most_size_one():
    signal = noise(8).repeat(1, 3) * torch.logspace(-4, 4, 8, dtype=torch.float64)[:, None]
    size = cm.normalized(signal, 0.1).square().mean(dim=1).sqrt()
    plain = signal.square().mean(dim=1).sqrt()
    assert torch.allclose(size, plain / (plain + 0.1)) and size.max() < 1
    assert torch.allclose(cm.normalized(signal, 0.1) / signal, (1 / (plain + 0.1))[:, None].expand(-1, 3))


# --- the optimum


@pytest.mark.parametrize("grid", [(1.0, 0.5), (1.0, 0.9, 0.4), (0.94, 0.6, 0.55, 0.1)])
def test_the_exact_map_to_data_keeps_a_gaussian_under_fresh_noise(grid):
    """From N((1 - t) m, V_t) at any time, each estimate of a chain with fresh noise has the data's spread."""
    slope, mean, variance = 1.0, (1 - grid[0]) * MEAN, (1 - grid[0]) ** 2 * STD**2 + grid[0] ** 2
    for now, later in zip(grid, (*grid[1:], 0.0), strict=True):
        one = gaussian_map(torch.tensor([[mean], [mean + 1.0]], dtype=torch.float64), column(now, 2), column(0.0, 2))
        slope = (one[1] - one[0]).item()
        assert one[0].item() == pytest.approx(MEAN, abs=1e-12)
        assert slope**2 * variance == pytest.approx(STD**2, abs=1e-12)
        mean, variance = (1 - later) * MEAN, (1 - later) ** 2 * slope**2 * variance + later**2
    assert math.isclose(variance, STD**2, abs_tol=1e-12)
