"""What a metric is: figures of a set of generated images, by the features of a reference set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from torch import Tensor

from flowdistill.config.checks import closest, shown
from flowdistill.evaluation.collect import Collected
from flowdistill.evaluation.reference import Reference
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.registry import Registry
from flowdistill.utils.text import JsonObject

if TYPE_CHECKING:
    from flowdistill.evaluation.report import Row

Figures = Mapping[str, object]
"""What was measured, by name: a number, numbers by class or part, or None where it could not be."""


ARROWS = {"lower": " \N{DOWNWARDS ARROW}", "higher": " \N{UPWARDS ARROW}"}
"""Behind the head of a column: the direction of what is better."""


@dataclass(frozen=True)
class Column:
    """A figure in the table.

    Attributes:
        name: key of the figure.
        title: head of the column.
        form: how a value is written, as ``format`` takes it.
        scale: what a value is multiplied by in the table.
        spread: key of its standard deviation, which stands behind it; None for a figure without one.
    """

    name: str
    title: str
    form: str = ".3f"
    scale: float = 1.0
    spread: str | None = None


@dataclass(frozen=True)
class MeasuredImages:
    """What a metric sees of a set of N images.

    Attributes:
        collected: their features' moments, the features that were kept, and the classifier's matches.
        labels: what each image was asked to be, int64 (N,); None without classes.
        classes: the class that each label or prompt describes, int64 (N,), -1 for none; None where it is unknown.
        owner: number of the network that makes each class label, of several students; None of one.
        seed: of whatever a metric draws.
        extractor: that made the features.
        groups: number of each image's prompt or label, int64 (N,): those of one number differ in their noise only;
            None where nothing is asked for.
        scores: of each image with its prompt, float32 (N,), by the figure of the scorer.
        paired: features (K, D) of what the teacher makes of the noise and prompts or labels of the images whose
            features were kept; None where it is not known.
    """

    collected: Collected
    labels: Tensor | None = None
    classes: Tensor | None = None
    owner: Sequence[int] | None = None
    seed: int = 0
    extractor: FeatureExtractor | None = None
    groups: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    paired: Tensor | None = None

    @property
    def kept_groups(self) -> Tensor | None:
        """The groups of the images whose features were kept, int64 (K,)."""
        return None if self.groups is None else self.groups[self.collected.indices]

    @property
    def kept_classes(self) -> Tensor | None:
        """The classes of the images whose features were kept, int64 (K,)."""
        return None if self.classes is None else self.classes[self.collected.indices]


@dataclass(frozen=True)
class Asked:
    """What a set of images is to be of.

    Attributes:
        prompts: that the images go through in turn; None for images without prompts.
        groups: see :class:`MeasuredImages`.
        kinds: how many different prompts or labels the model goes through, also where there are fewer images.
    """

    prompts: Sequence[str] | None
    groups: Tensor | None
    kinds: int = 0


@dataclass(frozen=True)
class Expected:
    """A measurement before any image of it is made.

    Attributes:
        count: of the images.
        extractor: None without features.
        labelled: whether the images are of labels, or of prompts whose class the features know.
        size: features of an image.
        reference: None where it is not known yet.
        classes, groups: see :class:`MeasuredImages`.
    """

    count: int
    extractor: FeatureExtractor | None = None
    labelled: bool = False
    size: int = 0
    reference: Reference | None = None
    classes: Tensor | None = None
    groups: Tensor | None = None


class Metric(ABC):
    """One file, one metric: it is made once for an evaluation and measures every row of the table.

    Attributes:
        name: under which it is asked for.
        figures: names of what it measures, whether or not they have a column.
        columns: those that the table shows.
        better: of the figures that rank models, each a number, whether lower or higher is better; a run may be stopped
            by these (``train.stop_when``).
        position: metrics stand in the table in ascending order of this; from 100 on, where anything was measured.
        needs_reference: whether the images are compared with others; such a metric is left out without a reference.
        needs_features: whether it looks at features; without any, the others are measured.
        needs_teacher: whether it compares with what the teacher makes of the same noise, ``MeasuredImages.paired``.
        default: whether it is measured without being asked for by name.
        fewest: images, also of the reference where its features are needed, below which it is not measured.
        compares_features: whether it needs the features of the reference's images, and not just their moments.
        version: raised when its figures mean something else than before, so that rows that were kept are measured anew.
    """

    name: ClassVar[str]
    figures: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[Column, ...]] = ()
    better: ClassVar[Mapping[str, Literal["lower", "higher"]]] = {}
    position: ClassVar[int] = 100
    needs_reference: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    default: ClassVar[bool] = True
    version: ClassVar[int] = 1
    fewest: ClassVar[int] = 1
    compares_features: ClassVar[bool] = False

    @classmethod
    def applies(cls, extractor: FeatureExtractor) -> bool:
        """Whether it can be measured with these features; else it is left out."""
        return True

    @classmethod
    def shown(cls, protocol: JsonObject) -> Sequence[Column]:
        """The columns of a table with this protocol."""
        return cls.columns

    def check(self, asked: Asked) -> None:
        """Refuse images of which it could not be measured, before any is made.

        Raises:
            UserError: so.
        """
        return None

    @classmethod
    def head(cls, column: Column) -> str:
        """The title of a column, with an arrow in the direction of what is better, where its figure ranks models."""
        return f"{column.title}{ARROWS.get(cls.better.get(column.name, ''), '')}"

    def given(self, expected: Expected) -> Collection[str]:
        """Those figures of ``better`` that such a measurement will have."""
        count, known = expected.count, expected.reference
        if self.compares_features and known is not None:
            count = 0 if known.features is None else min(count, len(known.features))
        return self.better if count >= self.fewest else []

    @abstractmethod
    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        """The figures; what is missing in the result counts as not measured. A metric that needs no reference is not
        to read it."""

    def protocol(self, reference: Reference) -> JsonObject:
        """What one needs to know to get the same figures, by name."""
        return {}

    @classmethod
    def remarks(cls, rows: Sequence[Row], protocol: JsonObject) -> list[str]:
        """Sentences under a table with these rows, each with its figures as attributes."""
        return []


METRICS: Registry[type[Metric]] = Registry(
    "metric", package="flowdistill.evaluation.metrics", group="flowdistill.metrics"
)
"""Name -> class. A file in this folder, or another package's module, registers its own."""

M = TypeVar("M", bound=type[Metric])


def register_metric(cls: M) -> M:
    """Class decorator: make a metric known under its name."""
    METRICS.register(cls.name)(cls)
    return cls


def all_metrics() -> list[type[Metric]]:
    """Every known metric, in the order of the table."""
    return sorted((METRICS.get(name) for name in METRICS), key=lambda metric: (metric.position, metric.name))


def ranking_metric(figure: str, key: str) -> type[Metric]:
    """The metric that measures ``figure`` and says by it which of two models is better.

    Raises:
        UserError: no metric has such a figure; ``key`` is the setting that names it.
    """
    ranking = {name: metric for metric in all_metrics() for name in metric.better}
    if figure not in ranking:
        raise UserError(f"'{key}' must be one of {listed(ranking)}, not {shown(figure)}{closest(figure, ranking)}")
    return ranking[figure]
