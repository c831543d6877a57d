"""The Inception Score (Salimans et al. 2016, arXiv 1606.03498), as ADM's evaluator has it."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.reference import Reference
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.utils.text import JsonObject

SPLIT = 5_000


@register_metric
class InceptionScore(Metric):
    """exp of the mean KL divergence of an image's classes from those of all; 1 to the number of classes, higher is
    better. Needs no reference; of images in the order in which they were made, as splits are of neighbours."""

    name = "inception_score"
    figures = ("inception_score", "inception_score_std")
    columns = (Column("inception_score", "IS", ".2f", spread="inception_score_std"),)
    better = {"inception_score": "higher"}
    position = 104
    needs_reference = False

    @classmethod
    def applies(cls, extractor: FeatureExtractor) -> bool:
        return extractor.logits is not None

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        logits = None if images.extractor is None else images.extractor.logits
        if logits is None:
            return {}
        rows = images.collected.features
        value, spread = inception_score(torch.cat([logits(part).cpu() for part in rows.split(SPLIT)]))
        return {"inception_score": value, "inception_score_std": spread}

    def protocol(self, reference: Reference) -> JsonObject:
        return {"inception_score": f"1,008 outputs without bias, mean of splits of {SPLIT:,} images in their order, "
                                   "with the standard deviation of the splits"}


def inception_score(logits: Tensor, split: int = SPLIT) -> tuple[float, float | None]:
    """The score of images with these logits (N, K), a mean over splits, and the standard deviation of the splits.

    Returns:
        (score, deviation); the deviation is None with one split.
    """
    scores = []
    for part in logits.double().split(split):
        probabilities = part.softmax(dim=1)
        together = probabilities.mean(dim=0).log()
        scores.append((probabilities * (part.log_softmax(dim=1) - together)).sum(dim=1).mean().exp().item())
    return statistics.fmean(scores), statistics.pstdev(scores) if len(scores) > 1 else None
