"""Flow maps: the average velocity between two times of a teacher's trajectory, and the identities that define it.

With V the average velocity over duration d from the start state, f = start - d V, the teacher's ODE says

    V + d dV/dd = v(f, t_max - d)

(FreeFlow, arXiv 2511.19428, Eqs. 7 to 9, with F = -V and u = -v). The partial derivative is in d alone, start fixed.

That is one of three identities of the map between any two times, X(x, t, r) = x - (t - r) u(x, t, r), r <= t, whose
u(x, t, t) is v(x, t):

    Lagrangian    u - (t - r) du/dr = v(X, r)               the end moves along the ODE
    Eulerian      u + (t - r) D u = v(x, t)                 the start does, and X stays; D = v . d/dx + d/dt, r fixed
    semigroup     X(X(x, t, s), s, r) = X(x, t, r)          for r <= s <= t

(Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507; the second is MeanFlow's, Geng et al., arXiv 2505.13447, the third
with s in the middle Shortcut's, Frans et al., arXiv 2410.12557). Each of the first two with u(x, t, t) = v has this map
alone for its solution. The third holds for the map of any field, so that u(x, t, t) = v must be taught beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Field = Callable[[Tensor, Tensor], Tensor]
"""``(x (B, ...), t (B,)) -> velocity (B, ...)``."""


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def end_point(start: Tensor, duration: Tensor, velocity: Tensor) -> Tensor:
    """f = start - d V: start (B, ...), duration (B,), average velocity (B, ...)."""
    return start - column(duration, start) * velocity


def jump(x: Tensor, t: Tensor, r: Tensor, velocity: Tensor) -> Tensor:
    """X = x - (t - r) u: states x (B, ...) at t (B,), times r (B,), average velocity u (B, ...) from t to r."""
    return end_point(x, t - r, velocity)


def generating_residual(velocity: Tensor, derivative: Tensor, duration: Tensor, teacher_velocity: Tensor) -> Tensor:
    """Delta_G = V + d dV/dd - v(f, t_max - d): zero for the exact flow map. All (B, ...) but duration (B,).

    FreeFlow, Eq. 8 and 9 (their Delta_G is the negative of this, and so is their F: the gradient is the same).
    """
    return velocity + column(duration, velocity) * derivative - teacher_velocity


def lagrangian_residual(velocity: Tensor, derivative: Tensor, t: Tensor, r: Tensor, end_velocity: Tensor) -> Tensor:
    """R_L = u + (t - r) du/dd - v(X, r): zero for the exact map between any two times; FreeFlow's Delta_G at t_max.

    Args:
        velocity: u (B, ...).
        derivative: du/dd (B, ...) in the duration d = t - r with x and t fixed, which is -du/dr.
        t, r: (B,).
        end_velocity: the teacher's (B, ...) at the student's own X and r.
    """
    return generating_residual(velocity, derivative, t - r, end_velocity)


def eulerian_residual(velocity: Tensor, derivative: Tensor, t: Tensor, r: Tensor, slope: Tensor) -> Tensor:
    """R_E = u + (t - r) D u - v(x, t): zero for the exact map (MeanFlow, arXiv 2505.13447, Eq. 6, with the teacher's
    velocity for the conditional one).

    Args:
        velocity, slope: u and v at (x, t) (B, ...).
        derivative: D u (B, ...), see :func:`total_derivative`.
        t, r: (B,).
    """
    return generating_residual(velocity, derivative, t - r, slope)


def semigroup_target(first: Tensor, second: Tensor, t: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """The average velocity from t to r of a jump to s with ``first`` and one from there to r with ``second`` (B, ...);
    times (B,) with r <= s <= t and r < t."""
    share = column((t - s) / (t - r), first)
    return share * first + (1 - share) * second


def discrete_target(shorter: Tensor, teacher_velocity: Tensor, duration: Tensor, step: Tensor) -> Tensor:
    """The discrete form of the same identity: one teacher Euler step from the student's own shorter map.

    V*(d) = [(d - h) V(d - h) + h v(f(d - h), t_max - d + h)] / d

    Args:
        shorter: V(d - h) (B, ...).
        teacher_velocity: v at the student's state after d - h (B, ...).
        duration: d (B,), positive.
        step: h (B,), 0 < h <= d.

    BOOT's DDIM target in velocity form is this (OFTSR, arXiv 2412.09465, calls it v_boot).

    From any t it is the Lagrangian identity's with the teacher's step at the end: ``shorter`` u(x, t, r + h) and v at
    (X(x, t, r + h), r + h); and the Eulerian one's with the step at the start: ``shorter`` u(x - h v, t - h, r) and v
    at (x, t).
    """
    share = column(step / duration, shorter)
    return (1 - share) * shorter + share * teacher_velocity


def discrete_residual(velocity: Tensor, target: Tensor, duration: Tensor, step: Tensor) -> Tensor:
    """(d / h) (u - target), which is R_L or R_E as h goes to 0: with the plain difference a long jump would have
    (h / d)^2 of the weight of a short one.

    Args:
        velocity: u (B, ...).
        target: see :func:`discrete_target`.
        duration, step: d and h (B,), 0 < h <= d.
    """
    return column(duration / step, velocity) * (velocity - target)


def duration_derivative(
    network: Callable[[Tensor], Tensor], duration: Tensor, step: float, longest: float | Tensor
) -> Tensor:
    """dV/dd by central differences, one-sided at the ends of [0, longest]; error O(step^2) inside.

    Args:
        network: ``durations (2B,) -> V (2B, ...)``; both sides in one call, B rows at d - h then B at d + h.
        duration: (B,).
        step: h, in units of duration.
        longest: the largest duration allowed: t_max, or t (B,).
    """
    below, above = (duration - step).clamp(min=0), (duration + step).clamp(max=longest)
    low, high = network(torch.cat([below, above])).chunk(2)
    return (high - low) / column(above - below, low)


def duration_derivative_jvp(network: Callable[[Tensor], Tensor], duration: Tensor) -> Tensor:
    """dV/dd by forward-mode differentiation of ``durations (B,) -> V (B, ...)``; exact.

    Attention by torch has a forward-mode rule in its math kernel only, so that is used here.

    Raises:
        NotImplementedError, RuntimeError: something in the network has no forward-mode rule.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(network, (duration,), (torch.ones_like(duration),))[1]


def total_derivative(network: Field, x: Tensor, t: Tensor, slope: Tensor, back: Tensor, ahead: Tensor) -> Tensor:
    """D u = d/dt u(x + (time - t) slope, time) by a difference quotient between t - back and t + ahead, (B,) each.

    The time a jump ends at is the network's own affair, and must stay the same for a row: with a duration for input it
    is told t - r at each t.

    Central where the two are equal, with an error of their square, else one-sided. ``network`` is called once, on the
    rows at t - back and then those at t + ahead.
    """
    states = torch.cat([x - column(back, x) * slope, x + column(ahead, x) * slope])
    before, after = network(states, torch.cat([t - back, t + ahead])).chunk(2)
    return (after - before) / column(back + ahead, x)


def total_derivative_jvp(network: Field, x: Tensor, t: Tensor, slope: Tensor) -> Tensor:
    """The same by forward-mode differentiation; exact.

    Attention by torch has a forward-mode rule in its math kernel only, so that is used here.

    Raises:
        NotImplementedError, RuntimeError: something in the network has no forward-mode rule.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(network, (x, t), (slope, torch.ones_like(t)))[1]


def damp(residual: Tensor, power: float, epsilon: float) -> Tensor:
    """residual / (mean(residual^2) + epsilon)^power, per sample (FreeFlow, section 5: power-law damping, k = 1)."""
    if power == 0:
        return residual
    size = residual.flatten(1).square().mean(dim=1)
    return residual / column((size + epsilon).pow(power), residual)


def velocity_matching_loss(velocity: Tensor, residual: Tensor) -> Tensor:
    """<V, sg(residual)> per sample (B,), averaged over dimensions: its gradient is that of half the squared residual
    with everything but the plain V held fixed (FreeFlow, Eq. 9)."""
    return (velocity * residual.detach()).flatten(1).mean(dim=1)
