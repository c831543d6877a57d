"""How far a figure would move with other images of the same model: one standard deviation, without drawing any.

A smooth statistic of N images is, to first order, a mean of one influence an image, so its variance is that of the
influences divided by N: the infinitesimal jackknife (Jaeckel 1972; Efron 1982, "The Jackknife, the Bootstrap and Other
Resampling Plans"), which the bootstrap over the images comes to as its number of draws grows. It needs no draws and no
seed. The reference counts as fixed, for every model is measured against the same one.

Images whose classes go through a list in turn are drawn within classes: what one class has more of in the mean than
another is no chance, and does not count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STATED = ("one standard deviation over the images, the reference fixed: fid and kid by the infinitesimal jackknife "
          "within classes (the bootstrap's limit), kid with the choice of its subsets; shares as binomial")


def binomial_std(share: float, count: int) -> float:
    """Standard deviation of a share of ``count`` images; with one hit and one miss added, so that all or none of few
    images are not taken for certain (Agresti, Coull 1998)."""
    share = (share * count + 1) / (count + 2)
    return math.sqrt(share * (1 - share) / count)


def mean_std(influence: Tensor, count: int, classes: Tensor | None = None) -> float:
    """Standard deviation of a statistic of ``count`` images.

    Args:
        influence: of each of K of them, at least 2, float64 (K,); its mean does not matter.
        classes: of those images, int64 (K,), where it is not chance how many each class has.
    """
    squares = torch.zeros((), dtype=torch.float64)
    groups = [influence] if classes is None else [influence[classes == label] for label in classes.unique()]
    # A class of one image says nothing of its spread, so that all images together have to.
    for group in groups if min(map(len, groups)) > 1 else [influence]:
        squares += group.var() * len(group)
    return math.sqrt(float(squares) / len(influence) / count)


def frechet_std(
    features: Tensor, mean: Tensor, covariance: Tensor, reference_mean: Tensor, reference_covariance: Tensor,
    count: int, classes: Tensor | None = None,
) -> float | None:
    """Standard deviation of the Fréchet distance of ``count`` images to a reference.

    The influence of an image x is its part in 2 (m - m_r) . x + (x - m)^T (1 - T) (x - m), with the optimal map between
    the Gaussians, T = R (R C R)^(-1/2) R and R = C_r^(1/2), which makes 1 - T the derivative of the distance by C.

    Args:
        features: of K of the images, (K, D); ``classes`` are theirs.
        mean, covariance: of all, float64 (D,) and (D, D); those of the reference in any type.

    Returns:
        The standard deviation; None with no more images than features, where the covariance is singular and another
        image is not a small change.
    """
    if count <= len(mean) or len(features) < 2:
        return None
    values, vectors = torch.linalg.eigh(reference_covariance.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    inverse = torch.where(values > 1e-10 * values.max(), values.clamp(min=1e-300).rsqrt(), 0.0)
    map_back = vectors.T @ root
    derivative = torch.eye(len(mean), dtype=torch.float64) - (map_back.T * inverse) @ map_back
    centred = features.double() - mean
    influence = 2 * centred @ (mean - reference_mean) + ((centred @ derivative) * centred).sum(dim=1)
    return mean_std(influence, count, classes)
