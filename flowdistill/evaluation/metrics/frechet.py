"""The Fréchet distance (FID when the features are Inception's; Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flowdistill.evaluation.confidence import STATED, frechet_std
from flowdistill.evaluation.metrics.base import Column, Expected, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.moments import frechet_distance
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.text import JsonObject


def figure_of(distance: str) -> str:
    """Key of the figure that is called ``distance`` in a table: ``"fid"``, or ``"fd"`` where features of a known name
    must not be taken for Inception's. A network of the user's, whose distance is just ``"FD"``, keeps ``"fid"``."""
    return "fid" if distance in ("FID", "FD") else "fd"


@register_metric
class Frechet(Metric):
    """Distance of the Gaussians of the two sets' features; lower is better."""

    name = "frechet"
    figures = ("fid", "fid_std", "fd", "fd_std")
    columns = (Column("fid", "FID", spread="fid_std"),)
    better = {"fid": "lower", "fd": "lower"}
    position = 10

    @classmethod
    def shown(cls, protocol: JsonObject) -> Sequence[Column]:
        distance = protocol.get("distance", "FID")
        figure = figure_of(distance)
        return (Column(figure, distance, spread=f"{figure}_std"),)

    def given(self, expected: Expected) -> Collection[str]:
        return [] if expected.extractor is None or expected.count < 2 else [figure_of(expected.extractor.distance)]

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        moments = images.collected.moments
        if moments.count < 2:
            return {}
        both = moments.mean, moments.covariance, reference.mean, reference.covariance
        std = frechet_std(images.collected.features, *both, moments.count, images.kept_classes)
        figure = "fid" if images.extractor is None else figure_of(images.extractor.distance)
        return {figure: frechet_distance(*both), f"{figure}_std": std}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"fid": "float64 moments, unbiased covariances", "confidence": STATED}
