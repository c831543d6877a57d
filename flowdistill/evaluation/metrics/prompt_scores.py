"""How well images fit their prompts: CLIP score, PickScore, HPSv2 and other scorers'."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flowdistill.evaluation.confidence import mean_std
from flowdistill.evaluation.metrics.base import (
    Asked,
    Column,
    Expected,
    Figures,
    MeasuredImages,
    Metric,
    register_metric,
)
from flowdistill.evaluation.reference import Reference
from flowdistill.features.scorers import Scorer
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.text import JsonObject


@register_metric
class PromptScores(Metric):
    """Mean score of each scorer; higher is better.

    Args:
        scorers: see :func:`flowdistill.features.scorers.load_scorers`.

    Raises:
        UserError: there are none.
    """

    name = "prompt_scores"
    figures = ("clip_score", "clip_score_std", "pickscore", "pickscore_std", "hpsv2", "hpsv2_std")
    better = {"clip_score": "higher", "pickscore": "higher", "hpsv2": "higher"}
    position = 110
    needs_reference = False
    needs_features = False
    default = False

    def __init__(self, scorers: Sequence[Scorer] = ()) -> None:
        if not scorers:
            raise UserError(f"the metric {self.name!r} is what scorers say, and none is named; set evaluation.scorers "
                            "(--scorers), such as to clip:FOLDER")
        self.scorers = scorers

    @classmethod
    def shown(cls, protocol: JsonObject) -> Sequence[Column]:
        """One column a scorer."""
        scorers = protocol.get("scorers") or {}
        return [Column(figure, facts["title"], facts["form"], facts["scale"], spread=f"{figure}_std")
                for figure, facts in scorers.items()]

    def check(self, asked: Asked) -> None:
        if asked.prompts is None:
            raise UserError(f"the scorers ({listed(scorer.figure for scorer in self.scorers)}) say how well images fit "
                            "their prompts, and these have none; leave evaluation.scorers (--scorers) empty")

    def given(self, expected: Expected) -> Collection[str]:
        return [scorer.figure for scorer in self.scorers]

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        figures: dict[str, object] = {}
        for scorer in self.scorers:
            scores = images.scores[scorer.figure].double()
            mean = scores.mean().item()
            figures[scorer.figure] = mean if scorer.least is None else max(mean, scorer.least)
            if len(scores) > 1:
                figures[f"{scorer.figure}_std"] = mean_std(scores, len(scores), images.groups)
        return figures

    def protocol(self, reference: Reference) -> JsonObject:
        return {"scorers": {scorer.figure: {"title": scorer.title, "scale": scorer.scale, "form": scorer.form,
                                            **scorer.facts} for scorer in self.scorers}}
