"""How far an image is from the one that the teacher makes of the same noise and the same prompt or label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from flowdistill.evaluation.confidence import mean_std
from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.text import JsonObject

if TYPE_CHECKING:
    from flowdistill.evaluation.report import Row


@register_metric
class PairedDistance(Metric):
    """Mean of 1 - cosine of the features of an image and of the teacher's of the same noise, in [0, 2]; lower is nearer
    to the teacher's map from noise to images, which methods that match distributions do not aim at.

    ``paired_distance_of_chance``: the same between an image and the teacher's of other noise and the same prompt or
    label. A model whose images have nothing of their noise in common with the teacher's is at it.
    """

    name = "paired_distance"
    figures = ("paired_distance", "paired_distance_std", "paired_distance_of_chance")
    columns = (
        Column("paired_distance", "paired distance", ".4f", spread="paired_distance_std"),
        Column("paired_distance_of_chance", "of other noise", ".4f"),
    )
    position = 114
    needs_reference = False
    needs_teacher = True
    default = False

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        theirs, collected = images.paired, images.collected
        if theirs is None or theirs.shape != collected.features.shape:
            return {}
        groups = images.kept_groups
        distances, chance = paired_distances(collected.features, theirs, groups)
        std = mean_std(distances, collected.moments.count, groups) if len(distances) > 1 else None
        return {"paired_distance": distances.mean().item(), "paired_distance_std": std,
                "paired_distance_of_chance": chance}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"paired_distance": "mean 1 - cosine of the features of an image and of the teacher's of the same noise"}

    @classmethod
    def remarks(cls, rows: Sequence[Row], protocol: JsonObject) -> list[str]:
        known = protocol.get("paired_with")
        return [f"paired with: {known}"] if known and any(row.paired_distance is not None for row in rows) else []


def paired_distances(
    features: Tensor, others: Tensor, groups: Tensor | None = None
) -> tuple[Tensor, float | None]:
    """1 - cosine of each row and the other set's of the same place, and their mean over different places.

    Args:
        features, others: (K, D).
        groups: (K,) int64; the second mean is over pairs of different places of one group, the mean of each group
            counting as often as it has rows. None: one group.

    Returns:
        float64 (K,), and the mean, None where no group has two rows.
    """
    ours, theirs = (F.normalize(rows.double().cpu(), dim=1) for rows in (features, others))
    cosines = (ours * theirs).sum(dim=1)
    total, weight = 0.0, 0
    for rows in [slice(None)] if groups is None else [groups == group for group in groups.unique()]:
        count = len(ours[rows])
        if count > 1:
            crossed = ours[rows].sum(dim=0) @ theirs[rows].sum(dim=0) - cosines[rows].sum()
            total, weight = total + count * float(1 - crossed / (count * (count - 1))), weight + count
    return 1 - cosines, total / weight if weight else None
