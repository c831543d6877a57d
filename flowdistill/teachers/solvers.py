"""Fixed-grid solvers of the probability-flow ODE dx/dt = v(x, t), from t_max down to 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flowdistill.utils.errors import UserError

SOLVERS = ("euler", "heun")


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], solver: str) -> Tensor:
    """Integrate from ``times[0]`` to ``times[-1]``.

    Args:
        velocity: ``(x (B, ...), t) -> v (B, ...)``.
        x: the state at ``times[0]``.
        times: decreasing linear times; ``len(times) - 1`` steps.
        solver: ``"euler"`` (one call a step; a DDIM step on the native path) or ``"heun"`` (two calls, one at the last
            step into t = 0, as in Karras et al. 2022, Algorithm 1).
    """
    if solver not in SOLVERS:
        raise UserError(f"solver is '{solver}'; supported are {', '.join(SOLVERS)}")
    for now, after in zip(times[:-1], times[1:], strict=True):
        slope = velocity(x, now)
        ahead = x + (after - now) * slope
        if solver == "heun" and after > 0:
            slope = (slope + velocity(ahead, after)) / 2
            ahead = x + (after - now) * slope
        x = ahead
    return x
