"""CMMD: the maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv 2401.09603)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.evaluation.confidence import mean_std
from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.reference import Reference
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.utils.text import JsonObject

SIGMA = 10.0
SCALE = 1000.0
CHUNK = 2_000  # rows of the kernel in memory at a time


@register_metric
class CMMD(Metric):
    """Squared MMD with a Gaussian kernel, times 1,000; lower is better. Assumes no Gaussian features, and is steady
    from a few thousand images on."""

    name = "cmmd"
    figures = ("cmmd", "cmmd_std")
    columns = (Column("cmmd", "CMMD", spread="cmmd_std"),)
    better = {"cmmd": "lower"}
    position = 101
    fewest = 2
    compares_features = True

    @classmethod
    def applies(cls, extractor: FeatureExtractor) -> bool:
        return extractor.embeds

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        ours, theirs = images.collected.features, reference.features
        if theirs is None or min(len(ours), len(theirs)) < 2:
            return {}
        distance, influence = cmmd(ours, theirs)
        return {"cmmd": distance, "cmmd_std": mean_std(influence, len(ours), images.kept_classes)}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"cmmd": f"biased squared MMD, exp(-|x - y|^2 / (2 x {SIGMA:g}^2)), times {SCALE:g}"}


def cmmd(features: Tensor, reference: Tensor) -> tuple[float, Tensor]:
    """The distance of embeddings (N, D) from (M, D), all of length 1, and each image's influence on it, float64 (N,).

    The biased estimator, with every image's kernel with itself, as the paper's code has it: 0 for the same set twice.
    """
    ours, theirs = features.double(), reference.double()
    within, across = _mean_kernel(ours, ours), _mean_kernel(ours, theirs)
    other = _mean_kernel(theirs, theirs).mean()
    return SCALE * float(within.mean() + other - 2 * across.mean()), 2 * SCALE * (within - across)


def _mean_kernel(points: Tensor, others: Tensor) -> Tensor:
    """Mean kernel of each of ``points`` (N, D) with ``others`` (M, D), (N,)."""
    lengths = others.square().sum(dim=1)
    parts = []
    for part in points.split(CHUNK):
        squares = torch.addmm(part.square().sum(dim=1, keepdim=True) + lengths, part, others.T, alpha=-2)
        parts.append(torch.exp(squares / (-2 * SIGMA**2)).mean(dim=1))
    return torch.cat(parts)
