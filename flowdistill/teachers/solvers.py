"""Fixed-grid solvers of the probability-flow ODE dx/dt = v(x, t), from t_max down to 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flowdistill.utils.errors import UserError

SOLVERS = ("euler", "heun", "edm_heun")


def network_calls(solver: str, steps: int) -> int:
    """Velocities that ``steps`` steps into t = 0 ask for: the last step of a Heun solver has no second one."""
    return steps if solver == "euler" else 2 * steps - 1


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], solver: str) -> Tensor:
    """Integrate from ``times[0]`` to ``times[-1]``.

    The first step of each solver is the same, for one along a straight line is one in any time. They differ in what a
    second evaluation is averaged into:

    - ``"euler"``: nothing, one call a step. A DDIM step on the native path.
    - ``"heun"``: the trapezoidal rule on the linear path: the mean of v in t. Two calls, one at the last step into 0.
    - ``"edm_heun"``: the trapezoidal rule of Karras et al. 2022, Algorithm 1 (without churn): the mean of
      dx_nat/dsigma = (x_nat - D) / sigma in sigma = t / (1 - t), where x_nat = (1 + sigma) x; as many calls.

    Args:
        velocity: ``(x (B, ...), t) -> v (B, ...)``.
        x: the state at ``times[0]``.
        times: decreasing linear times; ``len(times) - 1`` steps.
        solver: one of ``SOLVERS``.

    Raises:
        UserError: another solver, or ``"edm_heun"`` from t = 1, where sigma is infinite.
    """
    if solver not in SOLVERS:
        raise UserError(f"solver is '{solver}'; supported are {', '.join(SOLVERS)}")
    if solver == "edm_heun" and times[0] >= 1:
        raise UserError("solver 'edm_heun' steps in sigma = t / (1 - t), which is infinite at t = 1, where this "
                        "teacher starts; use heun, or set teacher.t_max below 1")
    for now, after in zip(times[:-1], times[1:], strict=True):
        slope = velocity(x, now)
        ahead = x + (after - now) * slope
        if solver != "euler" and after > 0:
            late = velocity(ahead, after)
            if solver == "heun":
                ahead = x + (after - now) * ((slope + late) / 2)
            else:
                # With e = x + (1 - t) v = (x_nat - D) / sigma: x_nat' = x_nat + (sigma' - sigma) (e + e') / 2, and
                # (1 - t') (sigma' - sigma) = (t' - t) / (1 - t).
                mean = (x + (1 - now) * slope + ahead + (1 - after) * late) / 2
                ahead = ((1 - after) * x + (after - now) * mean) / (1 - now)
        x = ahead
    return x
