"""The non-saturating adversarial losses on logits (Goodfellow et al. 2014), and what its discriminator is good for
besides: a penalty on its slope, and the ratio of densities as a weight of the matching gradient. All per sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """softplus(l_fake) + softplus(-l_real), logits (B,) of generated and of real samples; 2 log 2 at chance."""
    return softplus(fake) + softplus(-real)


def generator_loss(fake: Tensor) -> Tensor:
    """softplus(-l_fake), (B,): small where the sample passes for real."""
    return softplus(-fake)


def slope_penalty(logits: Tensor, perturbed: Tensor) -> Tensor:
    """(l(y) - l(y + a n))^2, (B,): R1's |dl/dy|^2 (Mescheder et al., arXiv 1801.04406) without a second derivative.

    With unit normal n it is a^2 |dl/dy|^2 on average, up to terms of a^4. Both logits are of one input, which has the
    noise of its level where it has any, and of the small noise on top of that. Where the one is noised and the other is
    not, the difference does not vanish with a and says nothing about the slope.

    Args:
        logits: l(y) (B,) of real samples.
        perturbed: l(y + a n) (B,).
    """
    return (logits - perturbed).square()


DIVERGENCES = ("rkl", "kl", "js", "sf", "neyman", "sh", "jf")
"""Reverse and forward Kullback-Leibler, Jensen-Shannon, softened reverse KL, Neyman's chi^2, squared Hellinger,
Jeffreys."""
LOGIT_LIMIT = 10.0
RATIO_LIMITS = (0.1, 20.0)


def divergence_weight(divergence: str, logits: Tensor) -> Tensor:
    """h(r) = r^2 f''(r), (B,), by which the gradient of D_f(teacher || student) exceeds the reverse KL's at a sample.

        grad D_f = -E[h(r) (score_teacher - score_student) dx],    r = p_teacher(x_t) / p_student(x_t) = exp(l)

    (f-distill, Xu et al., arXiv 2502.15681), up to a constant factor, which a division by the mean takes away. The
    limits of logit and ratio are those of its authors. For rkl it is 1.

    Args:
        divergence: one of :data:`DIVERGENCES`.
        logits: l (B,) of the student's noised samples, high for real ones, of a discriminator trained by
            :func:`discriminator_loss` at that noise level.
    """
    r = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).exp().clamp(*RATIO_LIMITS)
    if divergence == "rkl":
        return torch.ones_like(r)
    if divergence == "kl":
        return r
    if divergence == "js":
        return r / (1 + r)
    if divergence == "sf":
        return 1 / (1 + r)
    if divergence == "neyman":
        return 1 / r
    if divergence == "sh":
        return r.sqrt()
    if divergence == "jf":
        return 1 + r
    raise ValueError(f"divergence is '{divergence}'; it must be one of {', '.join(DIVERGENCES)}")
