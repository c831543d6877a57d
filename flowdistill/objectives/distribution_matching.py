"""Distribution matching in velocity form: score distillation without ever dividing by t.

Score and velocity are interchangeable on the linear path, score(x, t) = -(x + (1 - t) v) / t, so the difference of
two velocities at the same point is -t / (1 - t) times the difference of the scores. Everything here is made of that
difference, Delta = v_critic - v_teacher at a noised sample x_t = (1 - t) x + t n, and of the teacher's own error there,
e = v_teacher - (n - x). In denoised estimates D = x_t - t v they are D_critic - D_teacher = -t Delta and
D_teacher - x = -t e: where published forms divide one by the other, t cancels.
"""

from __future__ import annotations

from torch import Tensor

from flowdistill.objectives.flow_map import column, velocity_matching_loss


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t n: x, noise (B, ...), t (B,)."""
    time = column(t, x)
    return (1 - time) * x + time * noise


def noising_residual(critic_velocity: Tensor, teacher_velocity: Tensor) -> Tensor:
    """Delta = v_critic - v_teacher at the student's noised samples (FreeFlow's Delta_N, Eqs. 10 and 11).

    <V, sg(Delta_N)> with the student's average velocity V moves samples toward the teacher's distribution: the
    sample f = start - d V moves along v_teacher-minus-v_critic's denoised difference (x_0_teacher - x_0_critic) / t.
    For a student that gives samples, -Delta is the same gradient; the functions below are other weights of it.
    """
    return critic_velocity - teacher_velocity


def sampling_error(velocity: Tensor, sample: Tensor, noise: Tensor) -> Tensor:
    """e = v - (n - x): how far a velocity at x_t is from the one that leads back to x itself."""
    return velocity - (noise - sample)


# --- gradients with respect to the sample; descent moves it from the critic's distribution to the teacher's


def diff_instruct_gradient(residual: Tensor, t: Tensor) -> Tensor:
    """D_critic - D_teacher = -t Delta (B, ...): the KL gradient weighted by sigma^2 (Diff-Instruct, arXiv 2305.18455).

    In EDM's coordinates sigma^2 (s_critic - s_teacher); in a DDPM's (sigma^2 / alpha) of the same.
    """
    return -column(t, residual) * residual


def decoupled_residual(residual: Tensor, augmentation: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Delta with matching and guidance at noise levels of their own (decoupled DMD, Liu et al., arXiv 2511.22677).

    Guidance w makes two terms of the gradient, D_critic - D_w = (D_critic - D_1) - (D_w - D_1) with D_w the guided and
    D_1 the conditional estimate: the first matches distributions, the second moves samples the way guidance points.
    Here the first is at x_t and the second at x_s of the same sample, added as estimates of the data:

        -t Delta' = -t Delta_1 + s A,    Delta_1 = v_critic - v_1 at (x_t, t),    A = v_w - v_1 at (x_s, s)

    so Delta' = Delta_1 - (s / t) A takes Delta's place in :func:`diff_instruct_gradient` and, with the guided teacher's
    error at x_t, in :func:`dmd_gradient`. It is Delta where s = t and both have one noise.

    Args:
        residual: Delta_1 (B, ...).
        augmentation: A (B, ...), (w - 1) (v_1 - v_null) for plain guidance.
        t, s: (B,), t positive.
    """
    return residual - column(s / t, residual) * augmentation


def dmd_gradient(residual: Tensor, error: Tensor) -> Tensor:
    """(D_critic - D_teacher) / mean |x - D_teacher| = -Delta / mean |e|, per sample (DMD2, arXiv 2405.14867).

    ``error`` is the teacher's (B, ...). Where both vanish (a teacher that returns the sample itself) it is 0.
    """
    size = error.flatten(1).abs().mean(dim=1)
    scaled = -residual / column(size, residual)
    return scaled.where(scaled.isfinite(), 0.0)


def sid_loss(residual: Tensor, error: Tensor, t: Tensor, alpha: float) -> Tensor:
    """The Fisher-divergence loss of SiD (Zhou et al., arXiv 2404.04057) per sample (B,), averaged over dimensions.

        (1 - alpha) ||G||^2 + <G, D_critic - x>  =  -t^2 <Delta, e + alpha Delta>,    G = D_teacher - D_critic

    divided by mean |x - D_teacher|, held fixed, as the authors' code does. Its gradient needs ``residual`` and
    ``error`` with their own dependence on x, through both networks at x_t and directly. With an exact critic its
    expectation is (1 - alpha) E||G||^2 before the division.
    """
    # The authors clip |x - D_teacher| at 1e-5; this is |x - D_teacher| / t, so the floor is at 1e-5 t in theirs. It
    # matters only where the teacher returns the sample itself.
    size = error.detach().flatten(1).abs().mean(dim=1).clamp(min=1e-5)
    return -(t.to(residual.dtype) / size) * (residual * (error + alpha * residual)).flatten(1).mean(dim=1)


def surrogate_loss(sample: Tensor, gradient: Tensor) -> Tensor:
    """mean((x - sg(x - g))^2) / 2 per sample (B,): its gradient in x is g / (number of elements), its value half the
    mean of g^2.

    Written without the difference x - (x - g), which rounds away a gradient that is small beside its sample.
    """
    product = velocity_matching_loss(sample, gradient)
    return product - product.detach() + gradient.detach().square().flatten(1).mean(dim=1) / 2


# --- the critic, and FreeFlow's balance


def flow_matching_loss(velocity: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """||v - (n - x)||^2 per sample (B,), averaged over dimensions: what keeps a critic on the student's samples."""
    return sampling_error(velocity, x, noise).square().flatten(1).mean(dim=1)


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) = -(x + (1 - t) v) / t; t (B,) positive."""
    time = column(t, x)
    return -(x + (1 - time) * velocity) / time


def balance(generating_size: Tensor, noising_size: Tensor, strength: float, epsilon: float) -> Tensor:
    """lambda = alpha E||Delta_G|| / (E||Delta_N|| + epsilon): 0-d tensors in and out (FreeFlow, section 5)."""
    return strength * generating_size / (noising_size + epsilon)
