"""Precision and recall as ADM's evaluator prints them: sets of different sizes as they are."""

from __future__ import annotations

from flowdistill.evaluation.confidence import binomial_std
from flowdistill.evaluation.metrics.base import Column, Figures, MeasuredImages, Metric, register_metric
from flowdistill.evaluation.metrics.precision_recall import NEIGHBOURS, manifold_shares
from flowdistill.evaluation.reference import Reference
from flowdistill.features.extractor import LEGACY, FeatureExtractor
from flowdistill.utils.text import JsonObject


@register_metric
class PrecisionRecallADM(Metric):
    """Precision and recall of all images that were made against all of the reference's; in [0, 1], higher is better.

    Other than ``precision`` and ``recall``, which cut both sets to one size, these compare with papers that measure
    50,000 samples against the 10,000 images in ADM's file. ADM's distances are of half precision where these do not
    overflow, which moves the third digit.
    """

    name = "precision_recall_adm"
    figures = ("precision_adm", "precision_adm_std", "recall_adm", "recall_adm_std")
    columns = (
        Column("precision_adm", "precision as ADM", spread="precision_adm_std"),
        Column("recall_adm", "recall as ADM", spread="recall_adm_std"),
    )
    better = {"precision_adm": "higher", "recall_adm": "higher"}
    position = 106
    fewest = NEIGHBOURS + 1
    compares_features = True

    @classmethod
    def applies(cls, extractor: FeatureExtractor) -> bool:
        return extractor.mode == LEGACY

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        ours, theirs = images.collected.features, reference.features
        if theirs is None or not images.collected.complete or min(len(ours), len(theirs)) <= NEIGHBOURS:
            return {}
        precision, recall = manifold_shares(ours.double(), theirs.double(), NEIGHBOURS)
        return {"precision_adm": precision, "precision_adm_std": binomial_std(precision, len(ours)),
                "recall_adm": recall, "recall_adm_std": binomial_std(recall, len(theirs))}

    def protocol(self, reference: Reference) -> JsonObject:
        held = 0 if reference.features is None else len(reference.features)
        return {"precision_recall_adm": f"k = {NEIGHBOURS}, all images against the {held:,} of the reference"}
