"""Density and coverage (Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics", arXiv 2002.09797)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.evaluation.confidence import binomial_std, mean_std
from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.metrics.precision_recall import CHUNK, MOST_SAMPLES, rounding, same_size, squared_distances
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.text import JsonObject

NEIGHBOURS = 5


@register_metric
class DensityCoverage(Metric):
    """Density, around 1 for a perfect model and above it for one that stays where the reference is dense, and coverage,
    in [0, 1]; higher is better. Steadier than precision and recall, which one outlier of the reference moves."""

    name = "density_coverage"
    figures = ("density", "density_std", "coverage", "coverage_std")
    columns = (
        Column("density", "density", spread="density_std"), Column("coverage", "coverage", spread="coverage_std"),
    )
    better = {"density": "higher", "coverage": "higher"}
    position = 108
    default = False
    fewest = NEIGHBOURS + 1
    compares_features = True

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        if reference.features is None:
            return {}
        ours, theirs = same_size(images.collected.features, reference.features, images.seed)
        found = density_coverage(ours, theirs)
        if found is None:
            return {}
        hits, covered = found
        return {"density": hits.mean().item(), "density_std": mean_std(hits, len(hits)),
                "coverage": covered, "coverage_std": binomial_std(covered, len(theirs))}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"density_coverage": f"k = {NEIGHBOURS}, as many samples as the reference has, at most {MOST_SAMPLES}"}


def density_coverage(
    features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[Tensor, float] | None:
    """For each sample the balls around points of the reference that it lies in, divided by k, float64 (N,): their mean
    is the density. And the share of the balls that have a sample in them, the coverage.

    A ball reaches from a point of the reference to its k-th nearest other one; its edge is outside.

    Args:
        features, reference: (N, D) and (M, D).
        neighbours: k.

    Returns:
        None with k or fewer points of the reference, or no samples.
    """
    if len(reference) <= neighbours or len(features) < 1:
        return None
    ours, theirs = features.double(), reference.double()
    # A point is its own nearest, hence k + 1.
    radii = torch.cat([
        squared_distances(part, theirs).kthvalue(neighbours + 1, dim=1).values for part in theirs.split(CHUNK)
    ])
    radii -= rounding(ours, theirs)
    hits, nearest = [], torch.full_like(radii, torch.inf)
    for part in ours.split(CHUNK):
        distances = squared_distances(part, theirs)
        hits.append((distances < radii).sum(dim=1).double() / neighbours)
        nearest = torch.minimum(nearest, distances.min(dim=0).values)
    return torch.cat(hits), (nearest < radii).double().mean().item()
