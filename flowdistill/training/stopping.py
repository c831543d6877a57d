"""Early stopping (``train.stop_when``): the best student so far by a figure, and when that has been so for too long."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from flowdistill.config import EvaluationConfig, StopConfig
from flowdistill.evaluation.metrics import ranking_metric
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import JsonObject

KEY = "train.stop_when.metric"


class Stopping:
    """Sees every measurement; the same on every process, as the measurements are.

    A measurement counts only if the student has been updated since the one before: a method may train other networks
    for a while first.

    Args:
        config: the figure, the patience and the gain it asks for.
        evaluation: with what is measured; figures of other settings are no figures to compare with.
        reference: the same opened, with the hashes of its images and of the features' weights; None: not known here.

    Attributes:
        step: of the best student; None before the first measurement.
        best: its figure; 0 before the first measurement.
        count: measurements that counted.
        waited: how many of them, at the end, were no better than the best one before by more than ``min_delta``.
        updated: whether the student has been updated since the last measurement, or there is none.

    Raises:
        UserError: no metric that ranks models has this figure.
    """

    def __init__(
        self, config: StopConfig, evaluation: EvaluationConfig, reference: Reference | None = None
    ) -> None:
        self.config, self.metric = config, ranking_metric(config.metric, KEY)
        self._sign = 1.0 if self.metric.better[config.metric] == "lower" else -1.0
        self._by = {"metric": config.metric, "num_images": evaluation.num_images, "features": evaluation.features,
                    "reference": evaluation.reference}
        if reference is not None:  # a path says where they are and not which
            self._by |= {"features_sha256": reference.feature_hash, "reference_hash": reference.source_hash}
        self.step: int | None = None
        self.best = self._mark = 0.0  # the mark: what patience goes by
        self.count = self.waited = 0
        self.updated = True

    @property
    def exhausted(self) -> bool:
        """Whether training should end."""
        return self.waited >= self.config.patience

    def see(self, step: int, figures: Mapping[str, object]) -> bool:
        """Take note of what was measured after ``step`` steps; tells whether that student is the best so far.

        A student of which nothing could be measured (its images are not finite) is worse than every other.

        Raises:
            UserError: the first measurement does not have the figure.
        """
        if not self.updated:
            return False
        value = figures.get(self.config.metric)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            if self.step is None:
                raise UserError(f"'{KEY}' is {self.config.metric}, which could not be measured of the student at step "
                                f"{step} with the features {self._by['features']} and the reference "
                                f"{self._by['reference']}; choose another figure, or other ones of these")
            value = self._sign * math.inf
        self.updated, self.count = False, self.count + 1
        first = self.step is None
        if first or self._sign * (self._mark - value) > self.config.min_delta:
            self._mark, self.waited = value, 0
        else:
            self.waited += 1
        if not first and self._sign * (self.best - value) <= 0:
            return False
        self.best, self.step = value, step
        return True

    def summary(self) -> str:
        """The student that is kept, in words."""
        return (f"the student of step {self.step}, whose {self.config.metric} of {self.best:.4g} is the best of "
                f"{self.count} measurement{'' if self.count == 1 else 's'}")

    def state_dict(self) -> JsonObject:
        """JSON values."""
        return {"by": self._by, "step": self.step, "best": self.best, "mark": self._mark, "count": self.count,
                "waited": self.waited, "updated": self.updated}

    def load_state_dict(self, state: JsonObject, main: bool = True) -> None:
        """Go on from what :meth:`state_dict` gave; anew, with a warning, where figures were measured otherwise."""
        changed = [name for name, value in self._by.items() if state["by"].get(name, value) != value]
        if changed:
            if main:
                was = ", ".join(f"{name} was {state['by'][name]} and is {self._by[name]}" for name in changed)
                warnings.warn(f"train.stop_when seeks the best student anew, for it is measured otherwise: {was}",
                              stacklevel=2)
            return
        self.step, self.best, self._mark = state["step"], state["best"], state["mark"]
        self.count, self.waited, self.updated = state["count"], state["waited"], state["updated"]
