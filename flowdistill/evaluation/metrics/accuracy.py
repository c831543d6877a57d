"""Label accuracy, where the features come from a classifier."""

from __future__ import annotations

from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.reference import Reference


@register_metric
class Accuracy(Metric):
    """Share of images, in [0, 1], that the classifier takes for what was asked for; higher is better."""

    name = "accuracy"
    figures = ("accuracy",)
    columns = (Column("accuracy", "accuracy", ".2%"),)
    better = {"accuracy": "higher"}
    position = 40
    needs_reference = False

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        collected = images.collected
        return {} if collected.matches is None else {"accuracy": collected.matches / collected.judged}
