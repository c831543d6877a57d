"""Consistency: a network whose jump to one time is the same from every point of a trajectory of the teacher.

With u(x, t) the student's velocity and r the time that it aims at, its jump is

    f(x, t) = x - (t - r) u(x, t),   so that f(x, r) = x whatever u is

and it is exact where f(x_t, t) = f(x_s, s) for r <= s <= t on each trajectory (Song et al., arXiv 2303.01469; with
several r, Wang et al., arXiv 2405.18407). Along the teacher's velocity v that is, in the limit,

    R = u + (t - r) D u - v = 0,   D = v . d/dx + d/dt,   df/dt = -R

the residual of an average velocity with its end fixed (``flow_map.generating_residual`` with D u for its derivative).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.objectives.flow_map import Field, column


def teacher_step(velocity: Field, x: Tensor, t: Tensor, s: Tensor, solver: str, lowest: float = 0.0) -> Tensor:
    """One step of a solver from x at t (B,) to s (B,), each row over its own stretch.

    ``"euler"`` is a DDIM step on the native path; ``"heun"`` averages the velocities of both ends, of the rows that do
    not end at 0, as :func:`flowdistill.teachers.solvers.integrate` does.

    Args:
        lowest: the smallest time at which the velocity is known.
    """
    step, slope = column(t - s, x), velocity(x, t)
    ahead = x - step * slope
    if solver == "euler":
        return ahead
    late = velocity(ahead, s.clamp(min=lowest))
    inside = column(s, x) > 0
    return torch.where(inside, x - step * ((slope + late) / 2), ahead)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """Mean over the elements of sqrt(d^2 + c^2) - c, per sample (B,): |d| - c where d is large, d^2 / 2c where it is
    small (Song and Dhariwal, arXiv 2310.14189, have it of the norm; LCM's training code has it so)."""
    return (torch.sqrt(difference.square() + c**2) - c).flatten(1).mean(dim=1)


def pseudo_huber_slope(difference: Tensor, c: float) -> Tensor:
    """Its derivative in each element, without the mean's 1 / N: d / sqrt(d^2 + c^2)."""
    return difference / torch.sqrt(difference.square() + c**2)


def velocity_signal(slope: Tensor, duration: Tensor) -> Tensor:
    """What a change of the jump f = x - (t - r) u is as one of u: -(t - r) times it.

    With ``slope`` the derivative of a loss in f, <u, sg(this)> has that loss's gradient. Of the distance between the
    laws of samples f it is -Delta in velocity form (``distribution_matching.noising_residual``), and so (t - r) Delta
    here.

    Args:
        slope: (B, ...).
        duration: t - r (B,).
    """
    return -column(duration, slope) * slope


# --- the continuous form


def trigonometric(t: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
    """What sCM's coordinates (Lu and Song, arXiv 2410.11081) make of the linear path's, (B,) each.

    There x' = cos(a) x_0 + sin(a) z with z of standard deviation ``data_std``, and the network F gives the velocity
    ``data_std`` F. With m = cos(a) + data_std sin(a):  x' = m x,  1 / m^2 = (1 - t)^2 + t^2 / data_std^2,  and a
    change of u by d is one of F by d / m.

    Returns:
        m, and kappa = (1 - t) data_std / m: sCM's tangent, cos(a) df/da, is -kappa times the residual.
    """
    m = ((1 - t) ** 2 + (t / data_std) ** 2).rsqrt()
    return m, (1 - t) * data_std / m


def warmed_residual(
    velocity: Tensor, derivative: Tensor, duration: Tensor, slope: Tensor, t: Tensor, data_std: float, share: float
) -> Tensor:
    """A (u - v) + share (t - r) D u: sCM's tangent with a warm-up, over -kappa; the residual R where ``share`` is 1.

    At 0 it is the difference of the velocities, with A = (1 - t) m^2.

    Args:
        velocity, derivative, slope: u, D u and v (B, ...).
        duration: t - r (B,).
        share: 0 to 1, how much of the derivative counts (their r).
    """
    m, _ = trigonometric(t, data_std)
    weight = share + (1 - share) * (1 - t) * m**2
    return column(weight, velocity) * (velocity - slope) + share * column(duration, velocity) * derivative


def normalized(signal: Tensor, c: float) -> Tensor:
    """signal / (its root mean square + c), per sample: sCM's tangent normalisation; c = 0.1 there."""
    size = signal.flatten(1).square().mean(dim=1).sqrt()
    return signal / column(size + c, signal)
