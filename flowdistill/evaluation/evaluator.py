"""Measuring models against one reference: features and statistics are loaded once, models come and go."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import what_is_missing
from flowdistill.data.image_sets import ImageSet
from flowdistill.evaluation.collect import Collected, check_size, collect, stored_batches
from flowdistill.evaluation.generation import Batch, Sampler, balanced_labels, check_num_images, generate, prompt_groups
from flowdistill.evaluation.kept_rows import VERSION, KeptRows, KnownSampler
from flowdistill.evaluation.metrics import METRICS, Asked, Expected, MeasuredImages, Metric, all_metrics
from flowdistill.evaluation.metrics.prompt_scores import PromptScores
from flowdistill.evaluation.reference import Reference, load_reference, mean_floor
from flowdistill.evaluation.report import Report, Row
from flowdistill.features.extractor import FeatureExtractor, load_features
from flowdistill.features.scorers import Scorer, load_scorers
from flowdistill.utils.errors import UserError
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.images import to_uint8
from flowdistill.utils.logging import on_terminal, say
from flowdistill.utils.processes import Processes
from flowdistill.utils.text import JsonObject

FEW = 1_000
"""Images up to which a report says that they are few."""
SPEED_BATCHES = 2
"""Batches a process that a model's speed is measured with where nothing else is: one to warm up, one on the clock."""


class Evaluator:
    """FID and its companions of samplers or stored images. All processes must make the same calls.

    Args:
        features: see ``load_features``. None: images are looked at by scorers only, and without any a model's speed is
            measured only, with ``SPEED_BATCHES`` batches a process.
        reference: see ``load_reference``. None: metrics that compare with a reference are left out.
        num_images: images of every measured model, over all processes.
        seed: of the noise, of KID's subsets, and of the samples that precision and recall take.
        batch_size: images in one call of the sampler and of the features; the figures do not depend on it.
        metrics: names of those to measure (:data:`flowdistill.evaluation.metrics.METRICS`); None for those that need
            not be asked for.
        more_metrics: names of others to measure besides.
        scorers: of images and prompts, see ``load_scorers``.
        paired: what the teacher makes of the noise and prompts or labels that are measured, for metrics that compare
            with it.
        device: of the feature network; default: the GPU when there is one.
        own: class labels that the models make, where these are not all: images and reference have these only.
        owner: part of each class label, for the FID of each part.
        weights: local Inception weights, see ``load_features``.
        cache_dir: of reference statistics, see ``load_reference``, and of rows of known samplers.
        fresh: measure such rows again, though they are in the cache.
        progress: show on standard error what is measured: a bar on a terminal, else a line before each measurement.

    Raises:
        UserError: num_images or batch_size below 1, unknown or damaged features, reference or scorers, or two that do
            not fit; a reference without labels for ``own`` labels; a metric without what it needs.
    """

    extractor: FeatureExtractor | None
    reference: Reference | None

    def __init__(
        self,
        features: str | os.PathLike | nn.Module | Callable[[Tensor], Tensor] | FeatureExtractor | None,
        reference: str | os.PathLike | Reference | None,
        num_images: int = 10_000,
        seed: int = 0,
        batch_size: int = 250,
        *,
        metrics: Sequence[str] | None = None,
        more_metrics: Sequence[str] = (),
        scorers: Sequence[str | Scorer] = (),
        paired: Reference | None = None,
        own: Sequence[int] | None = None,
        owner: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        weights: str | os.PathLike | None = None,
        cache_dir: str | os.PathLike | None = None,
        fresh: bool = False,
        progress: bool = True,
    ) -> None:
        check_num_images(num_images)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        self.num_images, self.seed, self.batch_size = num_images, seed, batch_size
        self.own, self.owner, self.progress = own, owner, progress
        self.fresh, self._cache_dir = fresh, cache_dir
        self._read: list[tuple[Row, str]] = []
        self._broken: list[tuple[Row, str]] = []
        self._warm: set[str] = set()  # names of models whose speed was measured
        self.extractor = self.reference = None
        self.missing = what_is_missing(features is None, reference is None, bool(scorers))
        named = [METRICS.get(name) for name in dict.fromkeys([*(metrics or ()), *more_metrics])]
        kinds = named if metrics is not None else [kind for kind in all_metrics() if kind.default or kind in named]
        self.paired = paired
        for kind in named:
            if kind.needs_teacher and paired is None and features is not None:
                raise UserError(without_teacher(kind))
        if features is not None:
            self.extractor = load_features(features, device, weights)
        if self.extractor is not None and reference is not None:
            loaded = load_reference(reference, self.extractor, cache_dir, batch_size)
            self.reference = loaded if own is None else loaded.of(own)
        for kind in named:
            if self.extractor is not None and kind.needs_features and not kind.applies(self.extractor):
                raise UserError(f"the metric {kind.name!r} cannot be measured with the features "
                                f"{self.extractor.name!r}")
        self.scorers = load_scorers(scorers, device)
        self.metrics = [kind() for kind in kinds if (self.reference is not None or not kind.needs_reference)
                        and (self.extractor is None or not kind.needs_features or kind.applies(self.extractor))
                        and not (kind is PromptScores and scorers)]
        self.metrics += [PromptScores(self.scorers)] if scorers else []

    def measure(
        self,
        sampler: Sampler,
        shape: Sequence[int],
        num_classes: int | None = None,
        name: str = "student",
        calls: int | None = 1,
        *,
        condition: Callable[[range], Condition | None] | None = None,
    ) -> Row:
        """Generate ``num_images`` images and measure them; every process gets the row.

        Args:
            sampler, shape, num_classes, condition: see ``generate``. Where ``condition`` is a ``PromptsInTurn`` and the
                features can tell which class a prompt describes, the accuracy is that of the images to their prompts.
            name, calls: what the row says of the model and of its network calls an image.

        Raises:
            UserError: a metric cannot be measured of such images.
        """
        processes = Processes.current()
        self.check_asked(num_classes, getattr(condition, "prompts", None))
        at = "" if calls is None else f" at {calls} call{'' if calls == 1 else 's'}"
        key = self.row_key(sampler, tuple(shape), num_classes, condition)
        kept = None if key is None or self.fresh else processes.on_main(lambda: self.kept_rows.find(key))
        if kept is None:
            row = self._measure(sampler, shape, num_classes, name, calls, at, condition)
        else:
            if self.progress and processes.is_main and not on_terminal():
                say(f"the {name}{at} is known: {kept}")
            row = kept.row
            row.model, row.calls = name, calls
            if row.images_per_second is None:
                row.images_per_second = self._measured_speed(sampler, shape, num_classes, name, at, condition)
            self._read.append((row, f"{name}{at}: {kept}"))
        if key is not None and row.figures and (kept is None or kept.shipped):
            made = None if kept is None else kept.made
            processes.on_main(lambda: self.kept_rows.keep(key, row, self.batch_size, made))
        return row

    def _measure(
        self, sampler: Sampler, shape: Sequence[int], num_classes: int | None, name: str, calls: int | None, at: str,
        condition: Callable[[range], Condition | None] | None,
    ) -> Row:
        processes, total = Processes.current(), self.drawn
        broken = torch.zeros((), dtype=torch.int64)
        timed: list[tuple[int, float]] = []
        prompts: Sequence[str] = getattr(condition, "prompts", None) or ()
        wanted = self._prompt_labels(prompts)
        scores: dict[str, list[Tensor]] = {scorer.figure: [] for scorer in self.scorers}
        self._announce(f"the {name}{at}", total)

        def batches() -> Iterator[tuple[range, Tensor, Tensor | None]]:
            for batch in self._generate(sampler, shape, total, num_classes, f"{name}{at}", condition):
                timed.append((len(batch.indices), batch.seconds))
                finite = batch.images.isfinite().flatten(1).all(dim=1)
                broken.add_((~finite).sum().cpu())
                labels = batch.labels if wanted is None else wanted[torch.tensor(batch.indices) % len(wanted)]
                images = to_uint8(batch.images.nan_to_num())
                for scorer in self.scorers:
                    texts = [prompts[index % len(prompts)] for index in batch.indices]
                    scores[scorer.figure].append(scorer(images, texts))
                yield batch.indices, images, labels

        def go_through() -> None:
            for _ in batches():
                pass

        collected = None
        if self.extractor is not None:
            collected = collect(batches(), self.extractor, total, processes, self._size)
        else:
            processes.together(go_through)
            if self.scorers:
                collected = Collected.without_features(total)
        speed, num_broken = _speed(timed, processes), int(processes.sum(broken))
        if num_broken:
            warnings.warn(
                f"{num_broken} of {total} images of the {name}{at} are not finite, so nothing is measured on them",
                stacklevel=2,
            )
        if collected is None or num_broken:
            row = Row(name, calls, images_per_second=speed)
            if num_broken:
                self._broken.append((row, f"{name}{at}: {num_broken} of {total} images"))
            return row
        found = collected
        labels = balanced_labels(range(total), num_classes, self.own)
        classes = labels if wanted is None else wanted[torch.arange(total) % len(wanted)]
        scored = {figure: processes.rows(torch.cat(parts) if parts else torch.empty(0))
                  for figure, parts in scores.items()}
        groups = asked_of(total, num_classes, self.own, prompts).groups
        return processes.on_main(lambda: self._row(found, labels, name, calls, speed, classes, groups, scored))

    def _measured_speed(
        self, sampler: Sampler, shape: Sequence[int], num_classes: int | None, name: str, at: str,
        condition: Callable[[range], Condition | None] | None,
    ) -> float:
        """Images a second, by one batch a process, and one before it where no model of this name is warm yet."""
        processes = Processes.current()
        batches = 1 if name in self._warm else SPEED_BATCHES
        self._warm.add(name)
        few = min(self.num_images, batches * self.batch_size * processes.world)
        drawn = self._generate(sampler, shape, few, num_classes, f"{name}{at}", condition)
        return _speed([(len(batch.indices), batch.seconds) for batch in drawn], processes)

    def _generate(
        self, sampler: Sampler, shape: Sequence[int], total: int, num_classes: int | None, description: str,
        condition: Callable[[range], Condition | None] | None,
    ) -> Iterator[Batch]:
        return generate(sampler, shape, total, self.seed, self.batch_size, num_classes=num_classes, own=self.own,
                        condition=condition, whole_batches=True, description=description, progress=self.progress)

    def row_key(
        self, sampler: Sampler, shape: tuple[int, ...], num_classes: int | None, condition: object
    ) -> str | None:
        """What decides a row of a sampler that is known; None where something has no hash."""
        extractor, reference = self.extractor, self.reference
        listed = condition is None or hasattr(condition, "prompts")  # those are part of the teacher's identity
        if not isinstance(sampler, KnownSampler) or extractor is None or extractor.hash is None or not listed:
            return None
        if any(scorer.hash is None for scorer in self.scorers):
            return None
        facts: list[object] = [
            VERSION, sampler.identity(), self.num_images, self.seed, shape, num_classes, self.own, self.owner,
            extractor.hash, extractor.resize, extractor.channels, extractor.mode,
            None if reference is None else reference.identity(),
            sorted((metric.name, metric.version) for metric in self.metrics),
        ]
        # Nothing is added where these are not asked for: the keys of rows that are shipped or kept stay.
        facts += [sorted((scorer.identity() for scorer in self.scorers), key=str)] if self.scorers else []
        facts += [self.paired.identity()] if self.paired is not None else []
        if condition is not None:
            facts.append("KID that allows for prompts in even numbers, and is left out where one is alone")
        elif num_classes is not None and self.num_images < 2 * num_classes:
            facts.append("KID that is left out where a class has a single image")
        return json_sha256(facts)

    @cached_property
    def kept_rows(self) -> KeptRows:
        """Where rows of known samplers are kept."""
        assert self.extractor is not None
        return KeptRows(self._cache_dir, self.extractor.device)

    @property
    def _few(self) -> int:
        """Images with which a speed is measured."""
        return min(self.num_images, SPEED_BATCHES * self.batch_size * Processes.current().world)

    @property
    def drawn(self) -> int:
        """Images of every measured model, over all processes: few where only their speed is measured."""
        return self._few if self.extractor is None and not self.scorers else self.num_images

    @property
    def _size(self) -> int | None:
        """Features an image that the reference is made of."""
        return None if self.reference is None else len(self.reference.mean)

    def check_asked(self, num_classes: int | None, prompts: Sequence[str] | None) -> None:
        """Refuse a model of such labels or prompts where a metric could not be measured of its images.

        Raises:
            UserError: so.
        """
        asked = asked_of(self.drawn, num_classes, self.own, prompts)
        for metric in self._measured:
            metric.check(asked)

    def check_image(self, images: Tensor, prompt: str | None = None) -> None:
        """Refuse a model whose images, of which ``images`` (1, C, H, W) is one, could not be measured.

        Args:
            prompt: the image's.

        Raises:
            UserError: the features or a scorer do not read such an image, or the features are another number than the
                reference's.
        """
        if prompt is not None:
            for scorer in self.scorers:
                if images.ndim != 4:
                    raise UserError(f"samples of shape {tuple(images.shape[1:])} are no images, so the scorer "
                                    f"{scorer.title} cannot measure them")
                scorer(to_uint8(images.nan_to_num()), [prompt])
        if self.extractor is not None:
            if images.ndim != 4:
                raise UserError(f"samples of shape {tuple(images.shape[1:])} are no images, so the features "
                                f"{self.extractor.name!r} cannot measure them")
            check_size(self.extractor(to_uint8(images.nan_to_num())), self.extractor, self._size)

    def given(
        self, kind: type[Metric], image: Tensor, num_classes: int | None, prompts: Sequence[str] | None
    ) -> list[str]:
        """The figures by which a metric of this kind will rank a model whose images are like ``image`` (1, C, H, W).

        Args:
            num_classes: of the model.
            prompts: that it goes through; None for a model without.
        """
        metric = next((one for one in self.metrics if isinstance(one, kind)), None) or kind()
        read = self._prompt_labels(prompts) if prompts else None
        labelled = bool((read >= 0).any()) if read is not None else num_classes is not None and not prompts
        size = 0 if self.extractor is None else self.extractor(to_uint8(image.nan_to_num())).shape[1]
        classes = balanced_labels(range(self.drawn), num_classes, self.own)
        if read is not None:
            classes = read[torch.arange(self.drawn) % len(read)]
        groups = asked_of(self.drawn, num_classes, self.own, prompts or ()).groups
        return list(metric.given(Expected(self.drawn, self.extractor, labelled, size, self.reference, classes, groups)))

    def _announce(self, what: str, count: int) -> None:
        """A line before a measurement, where no bar shows that it goes on."""
        if self.progress and Processes.current().is_main and not on_terminal():
            say(f"measuring {what}, {count:,} images")

    def _prompt_labels(self, prompts: Sequence[str] | None) -> Tensor | None:
        read = None if self.extractor is None else self.extractor.prompt_labels
        return None if read is None or not prompts else read(prompts)

    def measure_images(self, images: ImageSet, name: str = "images") -> Row:
        """Measure stored images (all of them, whatever ``num_images`` says).

        Raises:
            UserError: there are no features to measure them with.
        """
        if self.extractor is None:
            raise UserError(f"the images {name} cannot be measured without features; name some")
        for metric in self.metrics:
            metric.check(Asked(None, images.labels, 0 if images.labels is None else len(images.labels.unique())))
        processes = Processes.current()
        self._announce(name, len(images))
        labels = images.labels
        batches = stored_batches(images, processes, self.batch_size, self.extractor)
        collected = collect(batches, self.extractor, len(images), processes, self._size)
        return processes.on_main(lambda: self._row(collected, labels, name, None, None, labels, labels))

    def report(self, rows: Iterable[Row], num_images: int | None = None, **protocol: object) -> Report:
        """The rows with what they were measured against; ``protocol`` adds the caller's own entries."""
        total = self.drawn if num_images is None else num_images
        rows = list(rows)
        read = [how for row, how in self._read if any(row is one for one in rows)]
        if read:
            protocol["rows_not_measured_here"] = read
        broken = [how for row, how in self._broken if any(row is one for one in rows)]
        if broken:
            protocol["rows_not_finite"] = broken
        return Report(
            rows=rows,
            num_images=total,
            features=None if self.extractor is None else self.extractor.name,
            reference=None if self.reference is None else self.reference.name,
            seed=self.seed,
            fid_floor=mean_floor(self.floors),
            protocol={**self.protocol(total), **protocol},
        )

    @cached_property
    def floors(self) -> list[float] | None:
        """FID of three random halvings of the reference; computed by the main process, known to all."""
        return None if self.reference is None else Processes.current().on_main(self.reference.fid_floor)

    @cached_property
    def _metrics_protocol(self) -> JsonObject:
        """What the metrics say of themselves; made by the main process, known to all."""
        return Processes.current().on_main(
            lambda: {name: value for metric in self._measured for name, value in metric.protocol(self._given).items()}
        )

    @property
    def _measured(self) -> list[Metric]:
        """The metrics that there is something to measure with for."""
        return [metric for metric in self.metrics if self.extractor is not None or not metric.needs_features]

    @property
    def _given(self) -> Reference:
        """The reference for metrics: those that need one are there only if it is."""
        return cast(Reference, self.reference)

    def protocol(self, num_images: int | None = None) -> JsonObject:
        """How the figures come about: what one needs to know to get the same ones."""
        extractor, reference = self.extractor, self.reference
        total = self.drawn if num_images is None else num_images
        protocol: JsonObject = {
            "features": None, "features_sha256": None, "feature_size": self._size, "resize": None, "num_images": total,
            "reference": None,
        }
        if extractor is not None:
            protocol |= {
                "features": extractor.name,
                "distance": extractor.distance,
                "features_sha256": extractor.hash,
                "resize": extractor.resize,
                "images": "clipped to [0, 1] and rounded to uint8 before the features",
            }
        if reference is not None:
            protocol |= {
                "reference": reference.name,
                "reference_images": reference.count,
                "reference_left_out": reference.left_out,
                "reference_hash": reference.source_hash,
            }
        if self.paired is not None:
            protocol["paired_with"] = self.paired.name
        protocol |= {
            **self._metrics_protocol,
            "seed": self.seed,
            "processes": Processes.current().world,
            "batch_size": self.batch_size,
            "images_per_second": "sampling and decoding only, first batch left out, sum over processes",
            "fid_floors": self.floors,
            "torch": torch.__version__,
        }
        notes, called = [], "FID" if extractor is None else extractor.distance
        if reference is not None and min(total, reference.count or total) <= len(reference.mean):
            notes.append(f"no more images than features ({len(reference.mean)}): the {called} is far above that of "
                         "many images")
        if reference is not None and total <= FEW:
            notes.append(f"{total} images are few: {called} is higher with fewer images, so compare it with one of as "
                         "many")
        if notes:
            protocol["note"] = "; ".join(notes)
        if self.missing is not None:
            protocol["not_measured"] = self.missing
        return protocol

    def _row(
        self, collected: Collected, labels: Tensor | None, name: str, calls: int | None, speed: float | None,
        classes: Tensor | None, groups: Tensor | None, scores: Mapping[str, Tensor] | None = None,
    ) -> Row:
        paired = None if self.paired is None else self.paired.features
        images = MeasuredImages(collected, labels, classes, self.owner, self.seed, self.extractor, groups, scores or {},
                                paired)
        figures: JsonObject = {}
        for metric in self._measured:
            figures |= metric.measure(images, self._given)
        return Row(name, calls, speed, **figures)


def without_teacher(kind: type[Metric]) -> str:
    """Why a metric that needs the teacher cannot be measured."""
    return (f"the metric {kind.name!r} compares with what the teacher makes of the same noise, and there is no teacher "
            "here; evaluate one student alone, with its teacher")


def asked_of(
    total: int, num_classes: int | None, own: Sequence[int] | None, prompts: Sequence[str] | None
) -> Asked:
    """What ``total`` images of a model are to be of: its prompts in turn, or its labels."""
    if prompts:
        return Asked(prompts, prompt_groups(range(total), prompts), len(set(prompts)))
    kinds = num_classes or 0
    return Asked(None, balanced_labels(range(total), num_classes, own), kinds if own is None else len(own))


def _speed(timed: Sequence[tuple[int, float]], processes: Processes) -> float:
    """Images a second over all processes, of (images, seconds) of the batches of this one."""
    # The first batch pays for compilation, autotuning and caches, unless it is the only one.
    steady = timed[1:] or timed
    rate = sum(count for count, _ in steady) / max(sum(seconds for _, seconds in steady), 1e-9) if steady else 0.0
    return float(processes.sum(torch.tensor(rate, dtype=torch.float64)))


def evaluate_models(
    models: Iterable[tuple[str, int | None, Sampler]],
    shape: Sequence[int],
    num_classes: int | None,
    evaluator: Evaluator,
    condition: Callable[[range], Condition | None] | None = None,
    **protocol: Any,
) -> Report:
    """Measure several (name, network calls, sampler) on the same noise and labels or conditions."""
    rows = [
        evaluator.measure(sampler, shape, num_classes, name, calls, condition=condition)
        for name, calls, sampler in models
    ]
    return evaluator.report(rows, **protocol)
