"""sFID: the Fréchet distance of features by place (Nash et al. 2021, arXiv 2103.03841; as ADM's evaluator has it)."""

from __future__ import annotations

from collections.abc import Collection

from flowdistill.evaluation.metrics.base import Column, Expected, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.moments import frechet_distance
from flowdistill.evaluation.reference import Reference
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.utils.text import JsonObject


@register_metric
class SpatialFrechet(Metric):
    """Distance of the Gaussians of the first 7 channels of a layer, 17 x 17 places; lower is better."""

    name = "spatial_frechet"
    figures = ("sfid",)
    columns = (Column("sfid", "sFID"),)
    better = {"sfid": "lower"}
    position = 102

    @classmethod
    def applies(cls, extractor: FeatureExtractor) -> bool:
        return extractor.spatial is not None and not extractor.patches

    def given(self, expected: Expected) -> Collection[str]:
        known = expected.reference
        return [] if expected.count < 2 or known is not None and known.spatial_mean is None else self.better

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        moments, mean, covariance = images.collected.spatial, reference.spatial_mean, reference.spatial_covariance
        if moments is None or moments.count < 2 or mean is None or covariance is None:
            return {}
        return {"sfid": frechet_distance(moments.mean, moments.covariance, mean, covariance)}

    def protocol(self, reference: Reference) -> JsonObject:
        known = reference.spatial_mean is not None
        return {"sfid": "of mixed_6/conv, channels 0 to 6" if known else "not measured: the reference has no 'mu_s'"}
