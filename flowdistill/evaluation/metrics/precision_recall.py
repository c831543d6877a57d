"""Precision and recall with nearest-neighbour manifolds."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.evaluation.confidence import binomial_std
from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.randomness import generator_of
from flowdistill.utils.text import JsonObject

NEIGHBOURS = 3
MOST_SAMPLES = 10_000
CHUNK = 1_000  # rows of distances in memory at a time: 80 MB against 10,000 samples


@register_metric
class PrecisionRecall(Metric):
    """Precision and recall, in [0, 1]; higher is better. Recall falls when a student drops modes."""

    name = "precision_recall"
    figures = ("precision", "precision_std", "recall", "recall_std")
    columns = (
        Column("precision", "precision", spread="precision_std"), Column("recall", "recall", spread="recall_std"),
    )
    better = {"precision": "higher", "recall": "higher"}
    position = 30
    fewest = NEIGHBOURS + 1
    compares_features = True

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        if reference.features is None:
            return {}
        found = precision_recall(images.collected.features, reference.features, seed=images.seed)
        if found is None:
            return {}
        size = compared(images.collected.features, reference.features)
        stds = [binomial_std(share, size) for share in found]
        return {"precision": found[0], "precision_std": stds[0], "recall": found[1], "recall_std": stds[1]}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"precision_recall": f"k = {NEIGHBOURS}, as many samples as the reference has, at most {MOST_SAMPLES}"}


def precision_recall(
    features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS, seed: int = 0
) -> tuple[float, float] | None:
    """Share of the samples on the reference's manifold, and share of the reference on the samples' manifold.

    Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models": the manifold of a
    set is the union of balls around its points, each as wide as the distance to the k-th nearest other point; the edge
    counts as inside. Both figures depend on the sizes of the sets, so both sets are cut to the same number of points,
    at most 10,000, at random.

    Args:
        features, reference: (N, D) and (M, D).
        neighbours: k.
        seed: of the cut; the global generator is left alone.

    Returns:
        (precision, recall) in [0, 1]; None with k or fewer points on a side.
    """
    if compared(features, reference) <= neighbours:
        return None
    return manifold_shares(*same_size(features, reference, seed), neighbours)


def manifold_shares(ours: Tensor, theirs: Tensor, neighbours: int) -> tuple[float, float]:
    """(precision, recall) of sets (N, D) and (M, D), float64, as they are, each of more than k points."""
    slack = rounding(ours, theirs)
    return _inside(ours, theirs, neighbours, slack), _inside(theirs, ours, neighbours, slack)


def same_size(features: Tensor, reference: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Both sets, float64 on the CPU, the larger one cut at random; at most 10,000 points each."""
    size = compared(features, reference)
    return _subsample(features, size, seed), _subsample(reference, size, seed)


def rounding(ours: Tensor, theirs: Tensor) -> float:
    """How far two squared distances of equal points may be apart, as they are |a|^2 + |b|^2 - 2 a.b: this much does not
    count."""
    return 1e-12 * float(torch.cat([ours, theirs]).square().sum(dim=1).max())


def compared(features: Tensor, reference: Tensor) -> int:
    """Points of either set that are compared, of (N, D) and (M, D)."""
    return min(len(features), len(reference), MOST_SAMPLES)


def _subsample(points: Tensor, size: int, seed: int) -> Tensor:
    points = points.detach().cpu()
    if len(points) > size:
        points = points[torch.randperm(len(points), generator=generator_of(seed))[:size]]
    return points.double()


def _inside(points: Tensor, others: Tensor, neighbours: int, slack: float) -> float:
    """Share of ``points`` within the manifold of ``others``."""
    # A point is its own nearest, hence k + 1.
    radii = torch.cat([
        squared_distances(chunk, others).kthvalue(neighbours + 1, dim=1).values for chunk in others.split(CHUNK)
    ])
    found = sum(
        int((squared_distances(chunk, others) <= radii + slack).any(dim=1).sum()) for chunk in points.split(CHUNK)
    )
    return found / len(points)


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """(N, M); float64, in which a product of matrices is exact enough and much faster than differences."""
    lengths = points.square().sum(dim=1, keepdim=True) + others.square().sum(dim=1)
    return torch.addmm(lengths, points, others.T, alpha=-2)
