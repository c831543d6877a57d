"""The Fréchet distance (FID when the features are Inception's; Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

from flowdistill.evaluation.confidence import STATED, frechet_std
from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.moments import frechet_distance
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.text import JsonObject


@register_metric
class Frechet(Metric):
    """Distance of the Gaussians of the two sets' features; lower is better."""

    name = "frechet"
    figures = ("fid", "fid_std")
    columns = (Column("fid", "FID", spread="fid_std"),)
    better = {"fid": "lower"}
    position = 10

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        moments = images.collected.moments
        if moments.count < 2:
            return {}
        both = moments.mean, moments.covariance, reference.mean, reference.covariance
        std = frechet_std(images.collected.features, *both, moments.count, images.kept_classes)
        return {"fid": frechet_distance(*both), "fid_std": std}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"fid": "float64 moments, unbiased covariances", "confidence": STATED}
