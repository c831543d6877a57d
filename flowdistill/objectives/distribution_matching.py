"""Distribution matching in velocity form: score distillation without ever dividing by t.

Score and velocity are interchangeable on the linear path, score(x, t) = -(x + (1 - t) v) / t, so the difference of
two velocities at the same point is -t / (1 - t) times the difference of the scores.
"""

from __future__ import annotations

from torch import Tensor

from flowdistill.objectives.flow_map import _column


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t n: x, noise (B, ...), t (B,)."""
    time = _column(t, x)
    return (1 - time) * x + time * noise


def noising_residual(critic_velocity: Tensor, teacher_velocity: Tensor) -> Tensor:
    """Delta_N = v_critic - v_teacher at the student's noised samples (FreeFlow, Eqs. 10 and 11).

    <V, sg(Delta_N)> with the student's average velocity V moves samples toward the teacher's distribution: the
    sample f = start - d V moves along v_teacher-minus-v_critic's denoised difference (x_0_teacher - x_0_critic) / t.
    """
    return critic_velocity - teacher_velocity


def flow_matching_loss(velocity: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """||v - (n - x)||^2 per sample (B,), averaged over dimensions: what keeps a critic on the student's samples."""
    return (velocity - (noise - x)).square().flatten(1).mean(dim=1)


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) = -(x + (1 - t) v) / t; t (B,) positive."""
    time = _column(t, x)
    return -(x + (1 - time) * velocity) / time


def balance(generating_size: Tensor, noising_size: Tensor, strength: float, epsilon: float) -> Tensor:
    """lambda = alpha E||Delta_G|| / (E||Delta_N|| + epsilon): 0-d tensors in and out (FreeFlow, section 5)."""
    return strength * generating_size / (noising_size + epsilon)
