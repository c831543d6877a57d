"""How a one-step student follows what its teacher makes of its samples (EchoDistill, arXiv 2510.20512), per sample.

The student's sample x_S is noised to a time t, the teacher denoises it once to x_T, and the student moves towards x_T
in latents, in features that tell who is in the picture, and in texture; each term times the share of signal at t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5


def signal_share(t: Tensor) -> Tensor:
    """(1 - t)^2 / ((1 - t)^2 + t^2), which a variance-preserving schedule calls alpha_bar; any shape."""
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)


def latent_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference (B,) of latents (B, ...)."""
    return 0.5 * (student - teacher).square().flatten(1).mean(1)


def identity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine (B,) of features (B, D), or the mean over tokens of features (B, T, D)."""
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    return 1 - (cosine if cosine.ndim == 1 else cosine.mean(1))


def gram_matrix(tokens: Tensor) -> Tensor:
    """Second moments (B, D, D) of features (B, T, D) over their positions: what is in the picture, not where."""
    return tokens.transpose(1, 2) @ tokens / tokens.shape[1]


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference (B,) of the Gram matrices of features (B, T, D) (Gatys et al. 2016)."""
    return (gram_matrix(student) - gram_matrix(teacher)).square().flatten(1).mean(1)


def sliced_wasserstein(student: Tensor, teacher: Tensor, directions: Tensor, levels: int = LEVELS) -> Tensor:
    """Multi-scale sliced Wasserstein distance (B,) between the patches of images (B, C, H, W).

    At each level of a pyramid of means over 2 x 2 pixels, all patches of one size are projected on random unit
    directions, sorted, and compared (Heitz et al. 2021; He et al. 2024, without their change to Lab colours).

    Args:
        directions: unit normal (B, K, C, p, p), K for each sample; scaled to length 1 here.
        levels: at most this many; a level whose side is below p is left out.
    """
    rows, count, channels, patch, _ = directions.shape
    unit = F.normalize(directions.flatten(2), dim=2).reshape(rows * count, channels, patch, patch)
    total, used = student.new_zeros(rows), 0
    for _ in range(levels):
        if min(student.shape[-2:]) < patch:
            break
        projected = [_projected(images, unit, rows).sort(dim=2).values for images in (student, teacher)]
        total, used = total + (projected[0] - projected[1]).abs().mean((1, 2)), used + 1
        if min(student.shape[-2:]) < 2:
            break
        student, teacher = F.avg_pool2d(student, 2), F.avg_pool2d(teacher, 2)
    if not used:
        raise ValueError(f"images of {tuple(student.shape[-2:])} pixels have no patch of {patch} x {patch}")
    return total / used


def _projected(images: Tensor, unit: Tensor, rows: int) -> Tensor:
    """(B, K, patches): every sample's patches on its own directions."""
    joined = F.conv2d(images.reshape(1, -1, *images.shape[2:]), unit, groups=rows)
    return torch.unflatten(joined[0], 0, (rows, -1)).flatten(2)
