"""Flow-map prediction: the average velocity from the prior, and the identity that defines it.

With V the average velocity over duration d from the start state, f = start - d V, the teacher's ODE says

    V + d dV/dd = v(f, t_max - d)

(FreeFlow, arXiv 2511.19428, Eqs. 7 to 9, with F = -V and u = -v). The partial derivative is in d alone, start fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def end_point(start: Tensor, duration: Tensor, velocity: Tensor) -> Tensor:
    """f = start - d V: start (B, ...), duration (B,), average velocity (B, ...)."""
    return start - column(duration, start) * velocity


def generating_residual(velocity: Tensor, derivative: Tensor, duration: Tensor, teacher_velocity: Tensor) -> Tensor:
    """Delta_G = V + d dV/dd - v(f, t_max - d): zero for the exact flow map. All (B, ...) but duration (B,).

    FreeFlow, Eq. 8 and 9 (their Delta_G is the negative of this, and so is their F: the gradient is the same).
    """
    return velocity + column(duration, velocity) * derivative - teacher_velocity


def discrete_target(shorter: Tensor, teacher_velocity: Tensor, duration: Tensor, step: Tensor) -> Tensor:
    """The discrete form of the same identity: one teacher Euler step from the student's own shorter map.

    V*(d) = [(d - h) V(d - h) + h v(f(d - h), t_max - d + h)] / d

    Args:
        shorter: V(d - h) (B, ...).
        teacher_velocity: v at the student's state after d - h (B, ...).
        duration: d (B,), positive.
        step: h (B,), 0 < h <= d.

    BOOT's DDIM target in velocity form is this (OFTSR, arXiv 2412.09465, calls it v_boot).
    """
    share = column(step / duration, shorter)
    return (1 - share) * shorter + share * teacher_velocity


def duration_derivative(
    network: Callable[[Tensor], Tensor], duration: Tensor, step: float, longest: float
) -> Tensor:
    """dV/dd by central differences, one-sided at the ends of [0, longest]; error O(step^2) inside.

    Args:
        network: ``durations (2B,) -> V (2B, ...)``; both sides in one call, B rows at d - h then B at d + h.
        duration: (B,).
        step: h, in units of duration.
        longest: the largest duration allowed (t_max).
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
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(network, (duration,), (torch.ones_like(duration),))[1]


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
