"""Patch FID: the Fréchet distance of patches of the images as they are (Lin, Wang, Yang 2024, arXiv 2402.13929)."""

from __future__ import annotations

from collections.abc import Collection

from flowdistill.evaluation.metrics.base import Column, Expected, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.moments import frechet_distance
from flowdistill.evaluation.reference import Reference
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.utils.text import JsonObject


@register_metric
class PatchFrechet(Metric):
    """Distance of the Gaussians of the features of a 299 x 299 patch in the middle of each image, which is not resized:
    of details that an image of 1,024 pixels has lost when it is brought to 299. Lower is better."""

    name = "patch_frechet"
    figures = ("patch_fid",)
    columns = (Column("patch_fid", "patch FID"),)
    better = {"patch_fid": "lower"}
    position = 103

    @classmethod
    def applies(cls, extractor: FeatureExtractor) -> bool:
        return extractor.patches

    def given(self, expected: Expected) -> Collection[str]:
        known = expected.reference
        return [] if expected.count < 2 or known is not None and known.spatial_mean is None else self.better

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        moments, mean, covariance = images.collected.spatial, reference.spatial_mean, reference.spatial_covariance
        if moments is None or moments.count < 2 or mean is None or covariance is None:
            return {}
        return {"patch_fid": frechet_distance(moments.mean, moments.covariance, mean, covariance)}

    def protocol(self, reference: Reference) -> JsonObject:
        known = reference.spatial_mean is not None
        return {"patch_fid": "299 x 299 pixels in the middle, of smaller images all, brought to 299 x 299" if known else
                             "not measured: the reference's statistics are without patches"}
