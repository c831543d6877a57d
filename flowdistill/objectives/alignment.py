"""How a one-step student follows what its teacher makes of its samples (EchoDistill, arXiv 2510.20512), per sample.

The student's sample x_S is noised to a time t, the teacher denoises it once to x_T, and the student moves towards x_T
in latents, in features that tell who is in the picture, and in texture; each term times the share of signal at t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.utils.devices import sent

LEVELS = 5
PRIMARIES = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
"""Linear sRGB to CIE XYZ."""
SRGB_KNEE = 0.04045
"""Below it sRGB's curve is linear."""
LAB_KNEE = 6 / 29
"""Lab's curve is linear below its cube."""


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


def lab(images: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) to CIE Lab (D65): L in [0, 100], a, b about in [-110, 100] for values in [0, 1].

    Other values are allowed: below 0 the linear beginnings of both curves go on, above 1 their powers do. IEC 61966-2-1
    and CIE 15; the white point is what the primaries make of white, so that grays have a = b = 0.
    """
    bent = ((images.clamp(min=SRGB_KNEE) + 0.055) / 1.055) ** 2.4  # clamped: a root's slope at 0 would be inf * 0 here
    linear = torch.where(images > SRGB_KNEE, bent, images / 12.92)
    matrix = torch.tensor(PRIMARIES, dtype=torch.float64)
    matrix = sent((matrix / matrix.sum(1, keepdim=True)).to(linear.dtype), linear.device)
    relative = torch.einsum("ij,bjhw->bihw", matrix, linear)
    root = relative.clamp(min=LAB_KNEE**3) ** (1 / 3)
    x, y, z = torch.where(relative > LAB_KNEE**3, root, relative / (3 * LAB_KNEE**2) + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def pyramid_levels(side: int, patch: int) -> int:
    """How many levels of a pyramid, of at most ``LEVELS``, have room for a patch: their side is above half of it."""
    count = 0
    while side > patch // 2 and count < LEVELS:
        count, side = count + 1, (side + 1) // 2
    return count


def sliced_wasserstein(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """Multi-scale sliced Wasserstein distance (B,) between the colours of images (B, 3, H, W) (He et al. 2024, MS-SWD).

    At each level of a binomial pyramid all patches of the images in Lab are projected on random unit directions, sorted
    and compared. The measure is meant for sRGB in [0, 1]; EchoDistill's authors give it images in [-1, 1].

    Args:
        directions: unit normal (B, levels, K, 3, p, p), p odd, K for each level of each sample; made of length 1 here.

    Raises:
        ValueError: more levels than :func:`pyramid_levels` of the shorter side, or none.
    """
    rows, levels, count, channels, patch, _ = directions.shape
    side = min(student.shape[-2:])
    if not 0 < levels <= pyramid_levels(side, patch):
        raise ValueError(f"images of {side} pixels have {pyramid_levels(side, patch)} levels with room for a patch of "
                         f"{patch} x {patch}, and there are directions for {levels}")
    unit = F.normalize(directions.flatten(3), dim=3).unflatten(3, (channels, patch, patch))
    total = student.new_zeros(rows)
    for level in range(levels):
        if level:
            student, teacher = _halved(student), _halved(teacher)
        one, other = (_projected(lab(images), unit[:, level]).sort(dim=2).values for images in (student, teacher))
        total = total + (one - other).abs().mean((1, 2))
    return total / levels


def _halved(images: Tensor) -> Tensor:
    """Every second pixel of images (B, C, H, W) blurred by the binomials (1, 4, 6, 4, 1) / 16 both ways."""
    weights = sent(torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype), images.device) / 16
    kernel = torch.outer(weights, weights).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=images.shape[1])


def _projected(images: Tensor, unit: Tensor) -> Tensor:
    """(B, K, H W): the patches around every pixel of images (B, C, H, W) on their own directions (B, K, C, p, p)."""
    rows, count = unit.shape[:2]
    wide = F.pad(images, (unit.shape[-1] // 2,) * 4, mode="reflect")
    joined = F.conv2d(wide.reshape(1, -1, *wide.shape[2:]), unit.flatten(0, 1), groups=rows)
    return joined.reshape(rows, count, -1)
