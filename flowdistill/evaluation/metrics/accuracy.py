"""Label accuracy, where the features come from a classifier."""

from __future__ import annotations

from collections.abc import Collection

from flowdistill.evaluation.confidence import binomial_std
from flowdistill.evaluation.metrics.base import Column, Expected, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.reference import Reference


@register_metric
class Accuracy(Metric):
    """Share of images, in [0, 1], that the classifier takes for what was asked for; higher is better."""

    name = "accuracy"
    figures = ("accuracy", "accuracy_std")
    columns = (Column("accuracy", "accuracy", ".2%", spread="accuracy_std"),)
    better = {"accuracy": "higher"}
    position = 40
    needs_reference = False

    def given(self, expected: Expected) -> Collection[str]:
        knows = expected.extractor is not None and expected.extractor.classifier is not None
        return self.better if knows and expected.labelled else []

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        collected = images.collected
        if collected.matches is None:
            return {}
        share = collected.matches / collected.judged
        return {"accuracy": share, "accuracy_std": binomial_std(share, collected.judged)}
