"""Whether a model copies: how near its images are to the training set, held against images that it cannot have seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.evaluation.metrics.precision_recall import squared_distances
from flowdistill.utils.errors import UserError

CHUNK = 250  # rows of distances in memory at a time: 120 MB against 60,000 images
CLOSEST = 0.01
"""Share of the held-out images that are nearest to the training set: what is as near as they are is very near."""


@dataclass(frozen=True)
class Copying:
    """Distances of N images to the training images that are nearest, and what they say.

    Attributes:
        distances: of each image to its neighbour, float64 (N,), in the features' units.
        neighbours: which training image that is, int64 (N,).
        nearer: share of the pairs of an image and a held-out one in which the image is nearer to its neighbour than the
            other to its own, equal ones counting half: 0.5 for images like those held out, 1 for copies. It is the
            statistic of Mann and Whitney over the number of pairs, as in Meehan, Chaudhuri and Dasgupta 2020, "A
            Non-Parametric Test to Detect Data-Copying in Generative Models".
        very_near: share of the images that are nearer than the ``CLOSEST`` of those held out, as large as that for
            images like them.
        reaches: the distance within which an image is very near.
    """

    distances: Tensor
    neighbours: Tensor
    nearer: float
    very_near: float
    reaches: float


def copying(images: Tensor, training: Tensor, held_out: Tensor) -> Copying:
    """Hold images against a training set and a part of the same data that was not trained on.

    Blurred and average images are near everything, so a figure above 0.5 is a reason to look at the closest pairs, and
    no proof.

    Args:
        images, training, held_out: features (N, D), (M, D) and (L, D); the more are held out, the finer the figures.

    Raises:
        UserError: one of them is empty, or they are of different features.
    """
    sets = images, training, held_out
    if not all(len(part) for part in sets) or not images.shape[1:] == training.shape[1:] == held_out.shape[1:]:
        raise UserError("copying is looked for with features (N, D) of images, of a training set and of held-out "
                        f"images, not with {', '.join(str(tuple(part.shape)) for part in sets)}")
    distances, neighbours = _nearest(images, training)
    others = _nearest(held_out, training)[0].sort().values
    behind = len(others) - torch.searchsorted(others, distances, right=True)  # held-out ones that are farther
    equal = len(others) - torch.searchsorted(others, distances) - behind
    nearer = (behind + 0.5 * equal).sum().item() / (len(distances) * len(others))
    reaches = others.quantile(CLOSEST).item()
    return Copying(distances, neighbours, nearer, (distances < reaches).double().mean().item(), reaches)


def _nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of ``others``, float64 (N,), and which it is, int64 (N,)."""
    points, others = points.detach().cpu().double(), others.detach().cpu().double()
    parts = [squared_distances(chunk, others).min(dim=1) for chunk in points.split(CHUNK)]
    return torch.cat([part.values for part in parts]).clamp(min=0).sqrt(), torch.cat([part.indices for part in parts])
