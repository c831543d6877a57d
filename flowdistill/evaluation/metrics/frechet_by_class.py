"""The Fréchet distance within each class, and within the classes of each of several students."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowdistill.evaluation.metrics.base import Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.metrics.frechet import figure_of
from flowdistill.evaluation.moments import frechet_distance, moments_of
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.text import JsonObject

if TYPE_CHECKING:
    from flowdistill.evaluation.report import Row


@register_metric
class FrechetByClass(Metric):
    """``per_class_fid`` by class label, and ``per_part_fid`` by the number of the student."""

    name = "frechet_by_class"
    figures = ("per_class_fid", "per_part_fid")
    position = 50

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        labels, collected = images.labels, images.collected
        named = images.extractor is not None and figure_of(images.extractor.distance) != "fid"
        if named or labels is None or not collected.complete or reference.labelled is None:
            return {}
        real, real_labels = reference.labelled
        found = {"per_class_fid": distances_by_class(collected.features, labels, real, real_labels)}
        if images.owner is not None and int(real_labels.max()) < len(images.owner):
            owner = torch.tensor(images.owner)
            found["per_part_fid"] = distances_by_class(collected.features, owner[labels], real, owner[real_labels])
        return found

    @classmethod
    def remarks(cls, rows: Sequence[Row], protocol: JsonObject) -> list[str]:
        lines = []
        for row in rows:
            if row.per_part_fid is not None:
                parts = ", ".join(f"{part}: {'-' if fid is None else f'{fid:.3f}'}"
                                  for part, fid in row.per_part_fid.items())
                calls = "-" if row.calls is None else row.calls
                lines.append(f"{row.model}, {calls} calls, FID of each student's part: {parts}")
        return lines


def distances_by_class(
    features: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> dict[str, float | None] | None:
    """Fréchet distance within each class of the reference, by label.

    None for a class with no more images than features on either side (its covariance is singular and the distance says
    more about the number of images than about the images), None instead of the dictionary when no class has enough.

    Args:
        features, reference: (N, D) and (M, D).
        labels, reference_labels: (N,) and (M,).
    """
    distances: dict[str, float | None] = {}
    for label in reference_labels.unique(sorted=True).tolist():
        ours, theirs = features[labels == label], reference[reference_labels == label]
        distances[str(label)] = None
        if min(len(ours), len(theirs)) > features.shape[1]:
            a, b = moments_of(ours), moments_of(theirs)
            distances[str(label)] = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    return distances if any(value is not None for value in distances.values()) else None
