"""The kernel distance (KID when the features are Inception's)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowdistill.evaluation.confidence import mean_std
from flowdistill.evaluation.metrics.base import (
    Column,
    Expected,
    Figures,
    MeasuredImages,
    Metric,
    register_metric,
)
from flowdistill.evaluation.reference import Reference
from flowdistill.utils.errors import listed
from flowdistill.utils.randomness import seed_torch
from flowdistill.utils.text import JsonObject

if TYPE_CHECKING:
    from flowdistill.evaluation.report import Row

SUBSETS = 100
SUBSET_SIZE = 1000
MOST_ROWS = 4096
"""Most rows, of a class or of a set, in means of the kernel that are divided by the size of the set."""
EVEN = 0.01
"""Label counts that chance makes as even as this rarely are even by design."""


@register_metric
class Kernel(Metric):
    """Squared maximum mean discrepancy with a cubic kernel; lower is better, and below 0 by chance or by copying."""

    name = "kernel"
    figures = ("kid", "kid_std")
    columns = (Column("kid", "KID x 1000", scale=1000.0, spread="kid_std"),)
    better = {"kid": "lower"}
    position = 20
    fewest = 2
    compares_features = True

    @classmethod
    def shown(cls, protocol: JsonObject) -> Sequence[Column]:
        distance = protocol.get("distance", "FID")
        named = "KID" if distance == "FID" else distance.replace("FD", "KD", 1)
        return (replace(cls.columns[0], title=f"{named} x 1000"),)

    def measure(self, images: MeasuredImages, reference: Reference) -> Figures:
        collected = images.collected
        if reference.features is None:
            return {}
        found = _subsets_distance(collected.features, reference.features, images.seed)
        if found is None:
            return {}
        distance, subsets_std = found
        classes = _of_one_kind(images)
        own = 0.0 if classes is None else evenness_term(collected.features, classes, collected.indices)
        known = _even_by_design(reference)
        theirs = 0.0 if known is None else evenness_term(reference.features, known)
        if own is None or theirs is None:
            return {}
        std = _std(collected.features, reference.features, collected.moments.count, images.kept_classes)
        return {"kid": distance + own + theirs, "kid_std": math.hypot(std, subsets_std)}

    def given(self, expected: Expected) -> Collection[str]:
        known = expected.reference
        sides = [_of_one_kind(expected), None if known is None else _even_by_design(known)]
        return [] if any(labels is not None and _has_single(labels) for labels in sides) else super().given(expected)

    def protocol(self, reference: Reference) -> JsonObject:
        copies = None
        if reference.features is not None and reference.count == len(reference.features):
            copies = copies_distance(reference.features, _even_by_design(reference))
        return {
            "kid": f"mean of {SUBSETS} subsets of {SUBSET_SIZE} or all, kernel (x.y/D + 1)^3, classes and prompts in "
                   "even numbers allowed for",
            "kid_of_copies": copies,
        }

    @classmethod
    def remarks(cls, rows: Sequence[Row], protocol: JsonObject) -> list[str]:
        name = cls.shown(protocol)[0].title
        said = []
        copies = protocol.get("kid_of_copies")
        # Against moments alone there is none for another reason, and no distance of copies either.
        if copies is not None and any(row.kid is None and row.fid is not None for row in rows):
            said.append(f"no {name} where classes come in even numbers and one of them has a single image: measure "
                        "more images")
        # Pictures in a folder, beside rows of labels in turn.
        unknown = [row.model for row in rows if row.kid is not None and row.calls is None]
        if unknown and protocol.get("labels") and any(row.kid is not None and row.calls is not None for row in rows):
            said.append(f"{name} of {listed(dict.fromkeys(unknown))}: what each image was asked to be is not known, so "
                        "even numbers of classes are not allowed for; do not compare it with the other rows")
        if copies is not None and any(row.kid is not None and row.kid < 0 for row in rows):
            said.append(f"{name} of a model that only copies the reference's images: {1000 * copies:.3f}; figures well "
                        "below 0 are a sign of copying")
        return said


def _of_one_kind(images: MeasuredImages | Expected) -> Tensor | None:
    """What tells images apart that are of one distribution, (N,): their prompts or labels where there are two of each,
    else their classes."""
    return images.groups if _pairs(images.groups) else images.classes


def _pairs(groups: Tensor | None) -> bool:
    """Whether there are two images of every prompt or label."""
    return groups is not None and int(groups.unique(return_counts=True)[1].min()) > 1


def _even_by_design(reference: Reference) -> Tensor | None:
    """The labels or prompts of all of a reference's images, (M,); None where these, or some of its features, are not
    known."""
    if reference.labelled is not None:
        return reference.labelled[1]
    complete = reference.features is not None and len(reference.features) == reference.count
    return reference.groups if complete and _pairs(reference.groups) else None


def kernel_distance(features: Tensor, reference: Tensor, seed: int = 0) -> float | None:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, the mean of 100 subsets of up to 1,000 samples.

    Binkowski et al. 2018, "Demystifying MMD GANs"; torchmetrics computes it.

    The estimate has no bias for independent samples; classes in even numbers are not (see :func:`evenness_term`).

    Args:
        features, reference: (N, D) and (M, D).
        seed: of the subsets; the global generator is left alone.

    Returns:
        The estimate, which may be negative; None with fewer than two samples on a side.
    """
    found = _subsets_distance(features, reference, seed)
    return None if found is None else found[0]


def _subsets_distance(features: Tensor, reference: Tensor, seed: int) -> tuple[float, float] | None:
    """The estimate, and its standard deviation over other choices of the same number of subsets."""
    size = min(len(features), len(reference), SUBSET_SIZE)
    if size < 2:
        return None
    # With everything in every subset, all subsets give the same figure.
    subsets = 1 if size == len(features) == len(reference) else SUBSETS
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        # It says that it keeps all features in memory; they are there already.
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        metric = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False)
    metric.update(reference.float().cpu(), real=True)
    metric.update(features.float().cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        mean, std = metric.compute()
    return float(mean), 0.0 if subsets == 1 else float(std) / subsets**0.5


def _std(features: Tensor, reference: Tensor, count: int, classes: Tensor | None) -> float:
    """Standard deviation of the squared MMD of all of ``count`` images, of which ``features`` (K, D) are some.

    An image's influence is twice its mean kernel with the other images, less that with the reference.
    """
    rows = torch.arange(len(features))
    if len(features) > MOST_ROWS:
        rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MOST_ROWS]
    if len(reference) > MOST_ROWS:
        reference = reference[torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))[:MOST_ROWS]]
    ours, theirs = features[rows].double().cpu(), reference.double().cpu()
    own = _kernel(ours, ours)
    others = (own.sum(dim=1) - own.diagonal()) / (len(ours) - 1)
    influence = 2 * (others - _kernel(ours, theirs).mean(dim=1))
    return mean_std(influence, count, None if classes is None else classes[rows])


def _kernel(ours: Tensor, theirs: Tensor) -> Tensor:
    """(N, M), of features (N, D) and (M, D)."""
    return (ours @ theirs.T / ours.shape[1] + 1).pow(3)


def evenness_term(features: Tensor, labels: Tensor, rows: Tensor | None = None) -> float | None:
    """What an unbiased squared MMD lacks where a set of N images has its classes in even numbers by design.

    Of independent draws, two images are of the classes c and c' with probability p_c p_c'. Where p_c N images of each
    class are there, a pair without repetition is of one class too rarely, and the mean kernel U over such pairs is too
    small by (W - U) / N, W the mean over pairs of one class, weighted by p: then U (N - 1) / N + W / N is the unbiased
    one (a stratified sample). The two sets' terms are added to :func:`kernel_distance`.

    Args:
        features: (K, D), of the images ``rows`` (K,) of the set, by default of all.
        labels: (N,) of the whole set.

    Returns:
        The term; 0 for a single class, for labels below 0 (unknown), and for numbers as uneven as independent draws
        have (the chi-squared test of a uniform distribution); None where the numbers are even and a class has a single
        image, so that W is not known.
    """
    if not _are_even(labels):
        return 0.0
    within = None if _has_single(labels) else _within(features, labels if rows is None else labels[rows])
    return None if within is None else (within - _mean_kernel(features)) / len(labels)


def _are_even(labels: Tensor) -> bool:
    """Whether these are several known labels in even numbers."""
    counts = labels.unique(return_counts=True)[1].double()
    return bool(labels.min() >= 0) and len(counts) > 1 and _even(counts)


def _has_single(labels: Tensor) -> bool:
    """Whether labels come in even numbers, and one of them once."""
    return _are_even(labels) and int(labels.unique(return_counts=True)[1].min()) < 2


def copies_distance(features: Tensor, labels: Tensor | None = None) -> float | None:
    """The distance of a model that draws nothing but the images of the set it is measured against: below 0.

    Within a model's set a copy of the same image may come twice, and between the sets it meets itself, but a set's own
    pairs have no image twice: the unbiased estimate is -(S - U) / M, S the mean kernel of an image with itself, and
    -(S - W) / M with the :func:`evenness_term`.

    Args:
        features, labels: (M, D) and (M,) of the reference.

    Returns:
        The distance; None of fewer than two images, and where there is no evenness term.
    """
    if len(features) < 2:
        return None
    alone = (features.double().square().sum(1) / features.shape[1] + 1).pow(3).mean().item()
    term = 0.0 if labels is None else evenness_term(features, labels)
    return None if term is None else term - (alone - _mean_kernel(features)) / len(features)


def _even(counts: Tensor) -> bool:
    """Whether Pearson's chi-squared of numbers (C,), against equal ones, is below its ``EVEN`` quantile."""
    mean = counts.mean()
    squares = (counts - mean).square().sum() / mean
    degrees = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    return bool(torch.special.gammainc(degrees / 2, squares / 2) < EVEN)


def _within(features: Tensor, labels: Tensor) -> float | None:
    """Mean kernel of two different images of one class, each class with its share; None where no class has two."""
    total, weight = 0.0, 0
    for label in labels.unique():
        mine = features[labels == label]
        if len(mine) > 1:
            total, weight = total + len(mine) * _mean_kernel(mine), weight + len(mine)
    return total / weight if weight else None


def _mean_kernel(features: Tensor) -> float:
    """Mean kernel over pairs of different rows (N, D), of at most ``MOST_ROWS`` of them."""
    if len(features) > MOST_ROWS:
        features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MOST_ROWS]]
    features = features.double().cpu()
    kernel = _kernel(features, features)
    count = len(features)
    return ((kernel.sum() - kernel.trace()) / (count * (count - 1))).item()
