"""The Fréchet distance extrapolated to infinitely many generated images."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from flowdistill.evaluation.confidence import frechet_std
from flowdistill.evaluation.metrics.base import Column, Expected, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.metrics.frechet import figure_of
from flowdistill.evaluation.moments import frechet_distance, moments_of
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.randomness import generator_of
from flowdistill.utils.text import JsonObject

POINTS = 15
FEWEST = 3
"""Sizes below this give a line no error."""
SMALLEST_SHARE = 10
"""The smallest subset is this part of the images, and no smaller than twice the number of features."""


@register_metric
class FrechetAtInfinity(Metric):
    """FID without the bias of the number of generated images; that of the reference's number stays.

    Chong, Forsyth 2020, "Effectively Unbiased FID and Inception Score and Where to Find Them" (arXiv 1911.07023): to
    first order the distance at N images is that at infinity and a term in 1 / N, so a line through the distances of
    subsets of 15 sizes is read where 1 / N is 0. The images are those of the other figures, not of a Sobol sequence.
    """

    name = "frechet_at_infinity"
    figures = ("fid_infinity", "fid_infinity_std", "fd_infinity", "fd_infinity_std")
    columns = (Column("fid_infinity", "FID at infinity", spread="fid_infinity_std"),)
    better = {"fid_infinity": "lower", "fd_infinity": "lower"}
    position = 15
    default = False

    @classmethod
    def shown(cls, protocol: JsonObject) -> Sequence[Column]:
        distance = protocol.get("distance", "FID")
        figure = f"{figure_of(distance)}_infinity"
        return (Column(figure, f"{distance} at infinity", spread=f"{figure}_std"),)

    def given(self, expected: Expected) -> Collection[str]:
        if expected.extractor is None or len(subset_sizes(expected.count, expected.size)) < FEWEST:
            return []
        return [f"{figure_of(expected.extractor.distance)}_infinity"]

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        features = images.collected.features
        sizes = subset_sizes(*features.shape)
        if len(sizes) < FEWEST:
            return {}
        value, error = extrapolated(features, reference, sizes, images.seed, images.kept_classes)
        moments = images.collected.moments
        spread = frechet_std(features, moments.mean, moments.covariance, reference.mean, reference.covariance,
                             moments.count, images.kept_classes)
        figure = "fid" if images.extractor is None else figure_of(images.extractor.distance)
        deviation = None if spread is None else math.hypot(spread, error)
        return {f"{figure}_infinity": value, f"{figure}_infinity_std": deviation}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"fid_infinity": f"a line in 1 / N through the FID of random subsets of {POINTS} sizes from N / "
                                f"{SMALLEST_SHARE} to N; its deviation with the line's own"}


def subset_sizes(count: int, size: int) -> list[int]:
    """Sizes of subsets of ``count`` images with ``size`` features: even steps; none where there are too few images."""
    smallest = max(count // SMALLEST_SHARE, 2 * size)
    if smallest >= count:
        return []
    return torch.linspace(smallest, count, POINTS, dtype=torch.float64).round().long().unique().tolist()


def extrapolated(
    features: Tensor, reference: Reference, sizes: list[int], seed: int, classes: Tensor | None = None
) -> tuple[float, float]:
    """The distance at 1 / N = 0 of a line through those of random subsets of ``features`` (N, D), and the line's
    standard error there.

    Args:
        classes: int64 (N,), where they are in even numbers by design: so they are in the subsets, whose distances would
            else have a bias that the whole set's has not.
    """
    generator = generator_of(seed)
    distances = []
    for size in sizes:
        order = torch.randperm(len(features), generator=generator)
        subset = moments_of(features[(order if classes is None else in_turn(order, classes))[:size]])
        distances.append(frechet_distance(subset.mean, subset.covariance, reference.mean, reference.covariance))
    x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
    offset = x - x.mean()
    slope = (offset * y).sum() / offset.square().sum()
    value = y.mean() - slope * x.mean()
    residual = (y - value - slope * x).square().sum() / (len(sizes) - 2)
    error = (residual * (1 / len(sizes) + x.mean().square() / offset.square().sum())).sqrt()
    return float(value), float(error)


def in_turn(order: Tensor, classes: Tensor) -> Tensor:
    """The images ``order`` (N,), those of every class as they follow in it, taken from the classes (N,) in turn."""
    labels, place = classes[order], torch.empty_like(order)
    for label in labels.unique():
        mine = labels == label
        place[mine] = torch.arange(int(mine.sum()))
    return order[place.argsort(stable=True)]
