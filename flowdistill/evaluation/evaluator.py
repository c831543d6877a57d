"""Measuring models against one reference: features and statistics are loaded once, models come and go."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.data.image_sets import ImageSet
from flowdistill.evaluation.collect import Collected, collect
from flowdistill.evaluation.generation import Sampler, balanced_labels, check_num_images, generate
from flowdistill.evaluation.metrics.frechet import frechet_distance
from flowdistill.evaluation.metrics.kernel import (
    SUBSET_SIZE,
    SUBSETS,
    copies_distance,
    evenness_term,
    kernel_distance,
)
from flowdistill.evaluation.metrics.precision_recall import MOST_SAMPLES, NEIGHBOURS, precision_recall
from flowdistill.evaluation.reference import Reference, load_reference, mean_floor, moments_of
from flowdistill.evaluation.report import Report, Row
from flowdistill.features.extractor import FeatureExtractor, load_features
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import to_uint8
from flowdistill.utils.processes import Processes


class Evaluator:
    """FID and its companions of samplers or stored images. All processes must make the same calls.

    Args:
        features: see ``load_features``.
        reference: see ``load_reference``.
        num_images: images of every measured model, over all processes.
        seed: of the noise, of KID's subsets, and of the samples that precision and recall take.
        batch_size: images in one call of the sampler and of the features; the figures do not depend on it.
        kid, per_class, manifold: False skips the figure (a quick measurement during training); ``manifold`` is
            precision and recall.
        device: of the feature network; default: the GPU when there is one.
        own: class labels that the models make, where these are not all: images and reference have these only.
        owner: part of each class label, for the FID of each part.
        weights: local Inception weights, see ``load_features``.
        cache_dir: of reference statistics, see ``load_reference``.

    Raises:
        UserError: num_images or batch_size below 1, unknown or damaged features or reference, or two that do not fit;
            a reference without labels for ``own`` labels.
    """

    def __init__(
        self,
        features: str | os.PathLike | nn.Module | Callable[[Tensor], Tensor] | FeatureExtractor,
        reference: str | os.PathLike | Reference,
        num_images: int = 10_000,
        seed: int = 0,
        batch_size: int = 250,
        *,
        kid: bool = True,
        per_class: bool = True,
        manifold: bool = True,
        own: Sequence[int] | None = None,
        owner: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        weights: str | os.PathLike | None = None,
        cache_dir: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> None:
        check_num_images(num_images)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        self.num_images, self.seed, self.batch_size = num_images, seed, batch_size
        self.kid, self.per_class, self.manifold, self.progress = kid, per_class, manifold, progress
        self.extractor = load_features(features, device, weights)
        self.own, self.owner = own, owner
        self.reference = load_reference(reference, self.extractor, cache_dir, batch_size)
        if own is not None:
            self.reference = self.reference.of(own)

    def measure(
        self,
        sampler: Sampler,
        shape: Sequence[int],
        num_classes: int | None = None,
        name: str = "student",
        calls: int | None = 1,
        *,
        condition: Callable[[range], Any] | None = None,
    ) -> Row:
        """Generate ``num_images`` images and measure them; every process gets the row.

        Args:
            sampler, shape, num_classes, condition: see ``generate``. Where ``condition`` is a ``PromptsInTurn`` and the
                features can tell which class a prompt describes, the accuracy is that of the images to their prompts.
            name, calls: what the row says of the model and of its network calls an image.
        """
        processes = Processes.current()
        broken = torch.zeros((), dtype=torch.int64)
        timed: list[tuple[int, float]] = []
        wanted = self._prompt_labels(getattr(condition, "prompts", None))

        def batches() -> Iterator[tuple[range, Tensor, Tensor | None]]:
            made = generate(
                sampler,
                shape,
                self.num_images,
                self.seed,
                self.batch_size,
                num_classes=num_classes,
                own=self.own,
                condition=condition,
                description=name if calls is None else f"{name}, {calls} calls",
                progress=self.progress,
            )
            for batch in made:
                timed.append((len(batch.indices), batch.seconds))
                finite = batch.images.isfinite().flatten(1).all(dim=1)
                broken.add_((~finite).sum().cpu())
                labels = batch.labels if wanted is None else wanted[torch.tensor(batch.indices) % len(wanted)]
                yield batch.indices, to_uint8(batch.images.nan_to_num()), labels

        collected = collect(batches(), self.extractor, self.num_images, processes, len(self.reference.mean))
        # The first batch pays for compilation, autotuning and caches, unless it is the only one.
        steady = timed[1:] or timed
        rate = sum(count for count, _ in steady) / max(sum(seconds for _, seconds in steady), 1e-9) if steady else 0.0
        speed = float(processes.sum(torch.tensor(rate, dtype=torch.float64)))
        num_broken = int(processes.sum(broken))
        if num_broken:
            warnings.warn(
                f"{num_broken} of {self.num_images} images of {name!r} are not finite, so nothing is measured on them",
                stacklevel=2,
            )
            return Row(name, calls, images_per_second=speed)
        everything = range(self.num_images)
        labels = balanced_labels(everything, num_classes, self.own)
        classes = labels if wanted is None else wanted[torch.tensor(everything) % len(wanted)]
        return processes.on_main(lambda: self._row(collected, labels, name, calls, speed, classes))

    def _prompt_labels(self, prompts: Sequence[str] | None) -> Tensor | None:
        read = self.extractor.prompt_labels
        return None if read is None or not prompts else read(prompts)

    def measure_images(self, images: ImageSet, name: str = "images") -> Row:
        """Measure stored images (all of them, whatever ``num_images`` says)."""
        processes = Processes.current()
        parts = images.batches(processes.span(len(images)), self.batch_size, self.extractor.channels)
        labels = images.labels
        batches = (
            (indices, part, None if labels is None else labels[indices.start : indices.stop]) for indices, part in parts
        )
        collected = collect(batches, self.extractor, len(images), processes, len(self.reference.mean))
        return processes.on_main(lambda: self._row(collected, labels, name, None, None, labels))

    def report(self, rows: Iterable[Row], num_images: int | None = None, **protocol: Any) -> Report:
        """The rows with what they were measured against; ``protocol`` adds the caller's own entries."""
        total = self.num_images if num_images is None else num_images
        return Report(
            rows=list(rows),
            num_images=total,
            features=self.extractor.name,
            reference=self.reference.name,
            seed=self.seed,
            fid_floor=mean_floor(self.floors),
            protocol={**self.protocol(total), **protocol},
        )

    @cached_property
    def floors(self) -> list[float] | None:
        """FID of three random halvings of the reference; computed by the main process, known to all."""
        return Processes.current().on_main(self.reference.fid_floor)

    @cached_property
    def _reference_evenness(self) -> float:
        return 0.0 if self.reference.labelled is None else evenness_term(*self.reference.labelled)

    @cached_property
    def copies(self) -> float | None:
        """KID of a model that only copies the reference's images; computed by the main process, known to all."""
        reference = self.reference
        if not self.kid or reference.features is None or reference.count != len(reference.features):
            return None
        features, labels = reference.features, reference.labels
        return Processes.current().on_main(lambda: copies_distance(features, labels))

    def protocol(self, num_images: int | None = None) -> dict[str, Any]:
        """How the figures come about: what one needs to know to get the same ones."""
        extractor, reference = self.extractor, self.reference
        total = self.num_images if num_images is None else num_images
        size = len(reference.mean)
        protocol: dict[str, Any] = {
            "features": extractor.name,
            "features_sha256": extractor.hash,
            "feature_size": size,
            "resize": extractor.resize,
            "images": "clipped to [0, 1] and rounded to uint8 before the features",
            "num_images": total,
            "reference": reference.name,
            "reference_images": reference.count,
            "reference_hash": reference.source_hash,
            "fid": "float64 moments, unbiased covariances",
            "kid": f"mean of {SUBSETS} subsets of {SUBSET_SIZE} or all, kernel (x.y/D + 1)^3, classes in even numbers "
            "allowed for" if self.kid else None,
            "kid_of_copies": self.copies,
            "precision_recall": f"k = {NEIGHBOURS}, as many samples as the reference has, at most {MOST_SAMPLES}"
            if self.manifold else None,
            "seed": self.seed,
            "processes": Processes.current().world,
            "batch_size": self.batch_size,
            "images_per_second": "sampling and decoding only, first batch left out, sum over processes",
            "fid_floors": self.floors,
            "torch": torch.__version__,
        }
        if min(total, reference.count or total) <= size:
            protocol["note"] = f"no more images than features ({size}): the FID is far above that of many images"
        return protocol

    def _row(
        self, collected: Collected, labels: Tensor | None, name: str, calls: int | None, speed: float | None,
        classes: Tensor | None,
    ) -> Row:
        moments, reference = collected.moments, self.reference
        row = Row(name, calls, images_per_second=speed)
        if moments.count > 1:
            row.fid = frechet_distance(moments.mean, moments.covariance, reference.mean, reference.covariance)
        if self.kid and reference.features is not None:
            row.kid = kernel_distance(collected.features, reference.features, self.seed)
            if row.kid is not None:
                own = 0.0 if classes is None else evenness_term(collected.features, classes, collected.indices)
                row.kid += own + self._reference_evenness
        if self.manifold and reference.features is not None:
            found = precision_recall(collected.features, reference.features, seed=self.seed)
            row.precision, row.recall = found or (None, None)
        if collected.matches is not None:
            row.accuracy = collected.matches / collected.judged
        if self.per_class and labels is not None and collected.complete and reference.labelled is not None:
            row.per_class_fid = per_class_distances(collected.features, labels, *reference.labelled)
            if self.owner is not None and int(reference.labelled[1].max()) < len(self.owner):
                owner, (real, real_labels) = torch.tensor(self.owner), reference.labelled
                row.per_part_fid = per_class_distances(collected.features, owner[labels], real, owner[real_labels])
        return row


def per_class_distances(
    features: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> dict[str, float | None] | None:
    """Fréchet distance within each class of the reference, by label.

    None for a class with no more images than features on either side (its covariance is singular and the distance says
    more about the number of images than about the images), None instead of the dictionary when no class has enough.
    """
    distances: dict[str, float | None] = {}
    for label in reference_labels.unique(sorted=True).tolist():
        ours, theirs = features[labels == label], reference[reference_labels == label]
        distances[str(label)] = None
        if min(len(ours), len(theirs)) > features.shape[1]:
            a, b = moments_of(ours), moments_of(theirs)
            distances[str(label)] = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    return distances if any(value is not None for value in distances.values()) else None


def evaluate_models(
    models: Iterable[tuple[str, int | None, Sampler]],
    shape: Sequence[int],
    num_classes: int | None,
    evaluator: Evaluator,
    condition: Callable[[range], Any] | None = None,
    **protocol: Any,
) -> Report:
    """Measure several (name, network calls, sampler) on the same noise and labels or conditions."""
    rows = [
        evaluator.measure(sampler, shape, num_classes, name, calls, condition=condition)
        for name, calls, sampler in models
    ]
    return evaluator.report(rows, **protocol)
