"""One pass over images: their features' moments, and the rows that the other figures need."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.data.image_sets import ImageSet
from flowdistill.evaluation.moments import Moments, moments_of
from flowdistill.features.extractor import AT_ONCE, FeatureExtractor, Prepared
from flowdistill.utils.errors import UserError
from flowdistill.utils.processes import Processes

# Feature values kept for KID and the per-class figures: 128 MiB, 15,625 images at 2,048 features.
KEPT_VALUES = 32_000_000


@dataclass(frozen=True)
class Collected:
    """Features of a whole set, the same on every process.

    ``features``: float32 (K, D), the rows ``indices`` (K,) of the set in ascending order, all of them unless there are
    too many to keep. ``matches``: images whose most likely class is their label, of the ``judged`` ones that have one;
    None without labels or classifier. ``spatial``: moments of the features by place; None without any.
    """

    moments: Moments
    features: Tensor
    indices: Tensor
    matches: int | None
    judged: int
    spatial: Moments | None = None

    @classmethod
    def without_features(cls, total: int) -> Collected:
        """Of ``total`` images that nothing but scorers looks at: no features of each."""
        moments = Moments(0)
        moments.count = total
        return cls(moments, torch.empty(total, 0), torch.arange(total), None, 0)

    @property
    def complete(self) -> bool:
        return len(self.indices) == self.moments.count


def kept_rows(total: int, size: int, most: int | None = None) -> Tensor:
    """Indices (K,) of the rows to keep of ``total`` rows with ``size`` features: all, or a fixed random choice.

    ``most``: how many there may be; None for as many as ``KEPT_VALUES`` are.
    """
    most = max(2, KEPT_VALUES // max(size, 1)) if most is None else most
    if total <= most:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:most].sort().values


def _all_kept(total: int, size: int) -> bool:
    return total * size <= KEPT_VALUES


FAINT = 16
"""Levels that the channels of a grey picture may differ by: lossy formats are not exact."""

Images = Tensor | Sequence[Tensor] | Prepared


def stored_batches(
    images: ImageSet, processes: Processes, batch_size: int, extractor: FeatureExtractor
) -> Iterator[tuple[range, Images, Tensor | None]]:
    """This process's part of stored images with their indices and labels, in whole batches.

    They are read ahead, and resized where they are read if the processor does it.

    Raises:
        UserError: a picture that cannot be read, or one in colour for features that do not see any.
    """
    ahead = extractor.resizes_on_cpu and extractor.channels != 1
    batch_size = min(batch_size, AT_ONCE) if ahead else batch_size
    span = processes.span(len(images), batch_size)
    if extractor.channels == 1:
        parts = images.batches(span, batch_size, None, functools.partial(_grey, extractor))
    else:
        parts = images.batches(span, batch_size, extractor.channels, extractor.prepare_one if ahead else None)
    labels = images.labels
    for indices, part in parts:
        known = None if labels is None else labels[indices.start : indices.stop]
        yield indices, Prepared(torch.stack(part)) if ahead else part, known


def _grey(extractor: FeatureExtractor, image: Tensor) -> Tensor:
    """A picture (C, H, W) as grey, uint8 (1, H, W), by the weights that Pillow takes."""
    if len(image) == 1:
        return image
    levels = image.int()
    if (levels.amax(dim=0) - levels.amin(dim=0)).max() > FAINT:
        raise UserError(f"the picture is in colour, and the features {extractor.name!r} read grey (1 channel); name "
                        "features that read colours, such as inception")
    red, green, blue = levels
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]


def check_size(features: Tensor, extractor: FeatureExtractor, size: int | None) -> None:
    """Refuse ``features`` (B, D) of another size than the reference's; None: of any size.

    Raises:
        UserError: so.
    """
    if size not in (None, features.shape[1]):
        raise UserError(
            f"the features {extractor.name!r} are {features.shape[1]} numbers an image, but the reference has {size}; "
            "it was made with other features"
        )


def collect(
    batches: Iterable[tuple[range, Images, Tensor | None]],
    extractor: FeatureExtractor,
    total: int,
    processes: Processes | None = None,
    size: int | None = None,
) -> Collected:
    """Features of ``total`` images, of which this process's ``batches`` give a contiguous part in index order.

    Where all features are kept the moments are taken of them together, so that they have the same bits for any number
    of processes; of more images, each process takes those of its own, and the sum is the same up to rounding. So are
    those by place, which are kept where all of them are no more values than are kept of the others.

    Args:
        batches: (indices, uint8 images, labels or None); a label of -1 is not judged.
        size: number of features there must be, None for any.

    Raises:
        UserError: images the extractor does not read, or another number of features than ``size``; after one batch.
    """
    processes = processes or Processes.current()
    moments: Moments | None = None
    places: Moments | None = None
    kept_places: list[Tensor] = []
    kept: list[Tensor] = []
    judged = torch.zeros(2, dtype=torch.int64)  # right guesses, all guesses
    wanted = torch.empty(0, dtype=torch.int64)

    def go_through() -> None:
        nonlocal moments, places, wanted
        for indices, images, labels in batches:
            features, spatial = (None if part is None else part.cpu() for part in extractor.with_spatial(images))
            assert features is not None
            if spatial is not None:
                places = places or Moments(spatial.shape[1])
                if _all_kept(total, spatial.shape[1]):
                    kept_places.append(spatial)
                else:
                    places.update(spatial)
            if moments is None:
                check_size(features, extractor, size)
                moments = Moments(features.shape[1])
                wanted = kept_rows(total, features.shape[1], extractor.keeps)
            if len(wanted) < total:
                moments.update(features)
            here = wanted[(wanted >= indices.start) & (wanted < indices.stop)]
            kept.append(features[here - indices.start])
            guesses = None if labels is None else extractor.classify(images)
            if labels is not None and guesses is not None:
                judged.add_(torch.stack([torch.eq(guesses.cpu(), labels).sum(), (labels >= 0).sum()]))

    # An image that one process cannot read ends the others too, who would wait for it.
    processes.together(go_through)
    # A process may have had no images: it learns the number of features from the others.
    found = processes.max(0 if moments is None else moments.size)
    features = processes.rows(torch.cat(kept) if kept else torch.empty(0, found))
    rows = kept_rows(total, found, extractor.keeps)
    if len(rows) == total:
        moments = processes.on_main(lambda: moments_of(features))
    else:
        moments = (moments or Moments(found)).reduce(processes)
    if moments.count != total:
        raise UserError(f"features of {moments.count} images were taken instead of {total}")
    if extractor.spatial is not None:
        found_places = processes.max(0 if places is None else places.size)
        if _all_kept(total, found_places):
            joined = processes.rows(torch.cat(kept_places) if kept_places else torch.empty(0, found_places))
            places = processes.on_main(lambda: moments_of(joined))
        else:
            places = (places or Moments(found_places)).reduce(processes)
    matches, guessed = processes.sum(judged).tolist()
    return Collected(moments, features, rows, matches if guessed else None, guessed, places)
