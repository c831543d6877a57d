"""Diversity within a prompt: how far apart images of one prompt, or of one label, are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.evaluation.metrics.base import Asked, Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import JsonObject

if TYPE_CHECKING:
    from flowdistill.evaluation.report import Row


@register_metric
class Diversity(Metric):
    """Mean of 1 - cosine of the features of two images of one prompt or label, over all such pairs of a prompt and then
    over the prompts; 0 for a model that makes one image of a prompt, whatever the noise, and at most 2. Not better the
    higher: noise is diverse too. What to compare it with is the teacher's, or the reference's beside it."""

    name = "diversity"
    figures = ("diversity", "diversity_std", "diversity_of_reference")
    columns = (Column("diversity", "diversity", ".4f", spread="diversity_std"),)
    position = 112
    needs_reference = False
    default = False

    def check(self, asked: Asked) -> None:
        if asked.groups is None:
            raise UserError(f"the metric {self.name!r} is of several images of one prompt or label, and these images "
                            "have neither")
        enough = int((asked.groups.unique(return_counts=True)[1] > 1).sum())
        if enough < asked.kinds:
            raise UserError(f"the metric {self.name!r} needs at least 2 images of each prompt or label, which with "
                            f"{len(asked.groups)} images {asked.kinds - enough} of {asked.kinds} do not have; set "
                            f"num_images to {2 * asked.kinds} or more, or give fewer prompts")

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        groups = images.kept_groups
        found = None if groups is None else diversity(images.collected.features, groups)
        if found is None:
            return {}
        of_reference = None
        if reference is not None and reference.features is not None:
            theirs = reference.groups if reference.labels is None else reference.labels
            of_reference = None if theirs is None else diversity(reference.features, theirs)
        return {"diversity": found[0], "diversity_std": found[1],
                "diversity_of_reference": None if of_reference is None else of_reference[0]}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"diversity": "mean 1 - cosine of the features of two images of one prompt or label, all pairs"}

    @classmethod
    def remarks(cls, rows: Sequence[Row], protocol: JsonObject) -> list[str]:
        found = next((row.diversity_of_reference for row in rows if row.diversity_of_reference is not None), None)
        return [] if found is None else [f"diversity of the reference: {found:.4f}"]


def diversity(features: Tensor, groups: Tensor) -> tuple[float, float | None] | None:
    """Mean over groups of the mean of 1 - cosine over a group's pairs.

    Args:
        features: (K, D), at least two rows of some group; a row of zeros is at a right angle to every other one.
        groups: (K,) int64; groups of one row say nothing and do not count.

    Returns:
        (diversity, standard deviation over other rows of the same groups); None without a pair. The deviation is the
        jackknife's within groups where each has three rows or more, else that of the groups' means, which holds what
        groups differ in besides; None for a single group of two.
    """
    units = F.normalize(features.double().cpu(), dim=1)
    means, variances = [], []
    for group in groups.unique():
        rows = units[groups == group]
        count = len(rows)
        if count < 2:
            continue
        total, own = rows.sum(dim=0), rows.square().sum(dim=1)
        # Of the sum over ordered pairs of different rows; own is 1, or 0 of a row of zeros.
        cosines = total @ total - own.sum()
        means.append(1 - cosines / (count * (count - 1)))
        if count > 2:
            without = 1 - (cosines - 2 * (rows @ total - own)) / ((count - 1) * (count - 2))
            variances.append((without - without.mean()).square().sum() * (count - 1) / count)
    if not means:
        return None
    values = torch.stack(means)
    if len(variances) == len(means):
        return values.mean().item(), math.sqrt(float(torch.stack(variances).sum())) / len(values)
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
