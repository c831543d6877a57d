"""BOOT's signal: what a trajectory has made of its noise so far, and one exponential-integrator step of it.

On the linear path from the unit noise n, the signal y_t = (x_t - t n) / (1 - t) obeys the Signal-ODE
dy/dt = -lambda'(t) (f(x_t, t) - y_t) with f the denoised estimate and lambda = log(t / (1 - t)); the noise has
cancelled (Gu et al., arXiv 2306.05544). With an average velocity V over duration d = 1 - t it is y = n - V: the flow
map's prediction objective seen from data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.objectives.flow_map import column


def signal(state: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """y = (x_t - t n) / (1 - t): state and unit noise (B, ...), t (B,) below 1."""
    time = column(t, state)
    return (state - time * noise) / (1 - time)


def state_of(signal: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) y + t n, the inverse of :func:`signal`."""
    time = column(t, signal)
    return (1 - time) * signal + time * noise


def step_share(t: Tensor, s: Tensor) -> Tensor:
    """rho = 1 - exp(lambda_s - lambda_t) = (t - s) / (t (1 - s)) for 0 <= s < t: in (0, 1], and 1 at s = 0.

    It depends on the log signal-to-noise ratio only: alpha_t sigma_s / (sigma_t alpha_s) is the same on every path.
    """
    return (t - s) / (t * (1 - s))


def signal_step(signal: Tensor, denoised: Tensor, rho: Tensor) -> Tensor:
    """y_s = y_t + rho (f - y_t): a DDIM step. Exact while f is constant; rho (B,)."""
    return signal + column(rho, signal) * (denoised - signal)


def step_weight(rho: Tensor, cap: float) -> Tensor:
    """min(1 / rho^2, cap): the residual in units of signal, not of signal a step (B,)."""
    return rho.pow(-2).clamp(max=cap)


def threshold(denoised: Tensor, kind: str, percentile: float = 0.995) -> Tensor:
    """The estimate of pixels in [-1, 1] kept in range: ``static`` clips; ``dynamic`` clips at the sample's own
    percentile of |x| when that is above 1, and divides by it (Imagen, arXiv 2205.11487, section 2.3)."""
    if kind == "none":
        return denoised
    if kind == "static":
        return denoised.clamp(-1, 1)
    level = torch.quantile(denoised.flatten(1).abs().float(), percentile, dim=1).clamp(min=1).to(denoised.dtype)
    level = column(level, denoised)
    return torch.maximum(torch.minimum(denoised, level), -level) / level
