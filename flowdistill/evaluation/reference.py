"""Reference statistics: of a named set, a folder of images, or an .npz file, cached with the hash of their makers."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import statistics
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdistill.data import IMAGE_SETS, split_halves
from flowdistill.data.image_sets import FolderImages, ImageSet, NamedImages
from flowdistill.evaluation.collect import collect, stored_batches
from flowdistill.evaluation.moments import Moments, frechet_distance
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.utils.errors import WORD, UserError, listed, shown
from flowdistill.utils.files import atomic_write, cache_folder, in_cache, local_path
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.processes import Processes

# Part of every cache key: raise it when the meaning of a stored number changes.
# 2: images of more than 8 bits are scaled, EXIF turns them, what is transparent is white, and hidden ones do not count.
VERSION = 2
# clean-fid's words for how images were resized and quantised before Inception.
INCEPTION_MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
# What a damaged .npz raises, depending on where it is damaged.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile,
               NotImplementedError)


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    ``mean`` (D,) and ``covariance`` (D, D) float64; ``features`` float32 (K, D) for KID, or None; ``labels`` int64 (K,)
    of those rows, or None; ``count`` images (None: unknown); ``source_hash`` of the images; ``feature_hash`` of the
    extractor (None: not recorded in the file); ``left_out``: what looked like images of the set and was not read, in
    words.
    """

    name: str
    mean: Tensor
    covariance: Tensor
    count: int | None = None
    features: Tensor | None = None
    labels: Tensor | None = None
    source_hash: str | None = None
    feature_hash: str | None = None
    left_out: str | None = None

    @property
    def labelled(self) -> tuple[Tensor, Tensor] | None:
        """Every image's features and label, which a per-class distance and the floor need; None if any is missing."""
        if self.labels is None or self.features is None or len(self.features) != self.count:
            return None
        return self.features, self.labels

    def of(self, labels: Sequence[int]) -> Reference:
        """The images with one of ``labels``.

        Raises:
            UserError: the set has no labels, or fewer than two such images.
        """
        if self.labelled is None:
            raise UserError(f"the reference {self.name!r} has no labels, so it has no part for a model that makes the "
                            f"labels {listed(labels)} only; measure all students together, or name a set "
                            "with labels")
        mine = torch.isin(self.labelled[1], torch.tensor(labels))
        features = self.labelled[0][mine]
        if len(features) < 2:
            raise UserError(f"the reference {self.name!r} has {len(features)} images of the labels "
                            f"{listed(labels)}; it needs at least 2")
        moments = moments_of(features)
        name = f"{self.name}, labels {', '.join(map(str, labels))}"
        return replace(self, name=name, mean=moments.mean, covariance=moments.covariance, count=len(features),
                       features=features, labels=self.labelled[1][mine])

    def fid_floor(self, seeds: Iterable[int] = (0, 1, 2)) -> list[float] | None:
        """Distances of random class-balanced halves of the set to each other, one a seed; None without labels.

        What a perfect generator would get with half as many images on either side. None too when a half has fewer than
        two images.
        """
        if self.labelled is None or len(self.labelled[1]) < 4:
            return None
        features, labels = self.labelled
        floors = []
        for seed in seeds:
            first, second = (moments_of(features[rows]) for rows in split_halves(labels, seed))
            floors.append(frechet_distance(first.mean, first.covariance, second.mean, second.covariance))
        return floors

    def identity(self) -> str:
        """What tells this reference from others: the hash of its images, or of its statistics, and its part."""
        if self.source_hash is not None:
            part = None if self.labels is None else sorted(set(self.labels.tolist()))
            return json_sha256([VERSION, self.source_hash, self.count, part])
        digest = hashlib.sha256(f"{VERSION} {self.count}".encode())
        for tensor in (self.mean, self.covariance, self.features, self.labels):
            digest.update(b"none" if tensor is None else tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz (complete or absent) that ``load_reference`` and numpy read."""
        arrays: dict[str, Any] = {
            "version": VERSION,
            "name": self.name,
            "mean": self.mean.numpy(),
            "covariance": self.covariance.numpy(),
            "count": -1 if self.count is None else self.count,
            "source_hash": self.source_hash or "",
            "feature_hash": self.feature_hash or "",
            "left_out": self.left_out or "",
        }
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        with atomic_write(path) as file:
            np.savez(file, **arrays)


def moments_of(features: Tensor) -> Moments:
    """Mean and covariance of features (N, D)."""
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


def mean_floor(floors: list[float] | None) -> float | None:
    """Mean of ``Reference.fid_floor``."""
    return statistics.fmean(floors) if floors else None


def load_reference(
    reference: str | os.PathLike | Reference,
    extractor: FeatureExtractor,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 250,
) -> Reference:
    """Statistics of a reference set under an extractor. All processes of an evaluation must call it together.

    Args:
        reference: a named set (``flowdistill.data.IMAGE_SETS``), a folder of images, or a file of ``Reference.save``.
            Statistics by other programs (``.npz`` with ``mu`` and ``sigma``: pytorch-fid, ADM, EDM, clean-fid) do not
            say which features made them and are named with their mode, which must be the extractor's:
            ``"clean:cifar10.npz"`` for clean-fid's mode "clean", ``"digits:own.npz"`` for other features by name.
        cache_dir: where statistics are kept; default ``~/.cache/flowdistill/statistics``. The key holds the hashes of
            extractor, resizing and images, so a change of either makes new statistics. A folder that cannot be written
            to costs a warning, not the evaluation.

    Raises:
        UserError: unknown name, empty folder, a folder of one image, damaged file, or a file made with other features.
    """
    if isinstance(reference, Reference):
        _check_fits(reference, extractor)
        return reference
    processes = Processes.current()
    file = _statistics_file(reference, extractor)
    if file is not None:
        return processes.on_main(lambda: _open_statistics(*file, extractor))
    images = open_images(reference)
    if len(images) < 2:
        raise UserError(f"the reference {images.name} holds one image only; statistics need at least 2, and a distance "
                        "that means something needs thousands")
    # An extractor without a hash cannot be told from another one, so its statistics are not kept.
    path = None if extractor.hash is None else _cache_path(images, extractor, cache_dir)
    cached = processes.on_main(lambda: _read_cache(path, images, extractor))
    if cached is not None:
        return replace(cached, left_out=images.left_out)
    stored = stored_batches(images, processes.span(len(images)), batch_size, extractor)
    batches = ((indices, part, None) for indices, part, _ in stored)  # nobody asks how many the classifier gets right
    collected = collect(batches, extractor, len(images), processes)
    made = Reference(
        name=images.name,
        mean=collected.moments.mean,
        covariance=collected.moments.covariance,
        count=len(images),
        features=collected.features,
        labels=None if images.labels is None else images.labels[collected.indices],
        source_hash=images.hash(),
        feature_hash=extractor.hash,
        left_out=images.left_out,
    )
    if path is not None and processes.is_main:
        _write_cache(made, path)
    return made


def open_images(source: str | os.PathLike) -> ImageSet:
    """A named set, or the images of a folder.

    Raises:
        UserError: neither a known name nor a folder.
    """
    if source in IMAGE_SETS:
        return NamedImages(str(source))
    if local_path(source).is_dir():
        return FolderImages(source)
    near = difflib.get_close_matches(str(source), IMAGE_SETS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(
        f"the reference {shown(str(source), WORD)} is neither a named set ({listed(sorted(IMAGE_SETS))}) nor a folder "
        f"of images nor an .npz file{hint}"
    )


def _statistics_file(reference: str | os.PathLike, extractor: FeatureExtractor) -> tuple[Path, str | None] | None:
    """The file that ``reference`` names and the mode before its colon; None for a named set or a folder."""
    text = os.fspath(reference)
    whole = local_path(text)
    if text in IMAGE_SETS or whole.is_dir():
        return None
    mode, colon, rest = text.partition(":")
    if colon and not whole.exists():
        path = local_path(rest)
        modes = dict.fromkeys((extractor.mode, extractor.name, *INCEPTION_MODES))
        if mode in modes:
            return path, mode
        if path.is_file():
            raise UserError(f"{mode!r} is no mode of features that {path} could be of; known are {', '.join(modes)}")
    return (whole, None) if whole.is_file() or text.lower().endswith(".npz") else None


def _open_statistics(path: Path, mode: str | None, extractor: FeatureExtractor) -> Reference:
    arrays = _read_arrays(path)
    loaded = _from_arrays(path, arrays)
    _check_fits(loaded, extractor)
    if mode is not None and mode not in (extractor.mode, extractor.name):
        raise UserError(
            f"{path} was made with {mode!r}, and the features {extractor.name!r} are {extractor.mode!r}, so the two "
            "cannot be compared; give the reference's images themselves, in a folder"
        )
    if "mean" in arrays:
        return loaded
    if mode is None or mode != extractor.mode:
        others = ("; pytorch-fid, torch-fidelity, ADM, EDM and clean-fid's legacy modes resize images in another way, "
                  "which alone makes a distance of 20 or more" if extractor.mode in INCEPTION_MODES else "")
        raise UserError(
            f"{path} holds 'mu' and 'sigma' and does not say which features made them{others}: give the reference's "
            f"images themselves, in a folder, or name the file {extractor.mode}:{path} if it is of "
            f"{extractor.mode!r} features"
        )
    return replace(loaded, name=f"{loaded.name} ({mode!r} features, as it was named)")


def read_npz(path: Path) -> Reference:
    """Read statistics in our form or as ``mu`` and ``sigma``, whatever features they are of.

    Raises:
        UserError: the file is missing, damaged, or holds neither.
    """
    return _from_arrays(path, _read_arrays(path))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"the reference statistics {path} do not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in (*_OURS, *_THEIRS)}
            names = list(file.files)
    except _UNREADABLE as error:
        raise UserError(f"{path} is damaged or no .npz file: {error}") from error
    if not any(all(name in arrays for name in pair) for pair in (_OURS[:2], _THEIRS)):
        raise UserError(f"{path} holds neither 'mean' and 'covariance' nor 'mu' and 'sigma', but "
                        f"{', '.join(names[:5]) or 'nothing'}")
    return arrays


def _from_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Reference:
    mean, covariance = (arrays[name] for name in (_OURS[:2] if "mean" in arrays else _THEIRS))
    size = mean.size
    if mean.ndim != 1 or covariance.shape != (size, size):
        raise UserError(f"{path} holds a mean of shape {mean.shape} and a covariance of shape {covariance.shape}")
    try:
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
        count = int(arrays.get("count", -1))
        features, labels = (
            torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "labels")
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold statistics: {error}") from error
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds statistics that are not finite; make them again")
    return Reference(
        name=str(arrays.get("name", path.name)),
        mean=torch.from_numpy(mean),
        covariance=torch.from_numpy(covariance),
        count=None if count < 0 else count,
        features=features,
        labels=labels,
        source_hash=str(arrays.get("source_hash", "")) or None,
        feature_hash=str(arrays.get("feature_hash", "")) or None,
        left_out=str(arrays.get("left_out", "")) or None,
    )


_OURS = ("mean", "covariance", "name", "count", "features", "labels", "source_hash", "feature_hash", "left_out")
_THEIRS = ("mu", "sigma")


def _check_fits(reference: Reference, extractor: FeatureExtractor) -> None:
    made, used = reference.feature_hash, extractor.hash
    if made is not None and used is not None and made != used:
        raise UserError(
            f"the reference {reference.name!r} was made with other features (sha256 {made[:16]}) than "
            f"{extractor.name!r} (sha256 {used[:16]}); make it again or name the features it was made with"
        )


def _cache_path(images: ImageSet, extractor: FeatureExtractor, cache_dir: str | os.PathLike | None) -> Path:
    makers = f"{VERSION}\0{extractor.hash}\0{extractor.resize}\0{extractor.channels}\0{images.hash()}"
    key = hashlib.sha256(makers.encode()).hexdigest()[:24]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{Path(images.name).name}-{extractor.name}").strip("-")[:60]
    return local_path(cache_dir or cache_folder("statistics")) / f"{stem}-{key}.npz"


def _read_cache(path: Path | None, images: ImageSet, extractor: FeatureExtractor) -> Reference | None:
    """The cached statistics, or None when there are none, they are damaged, or they are not what their name says."""
    if path is None or not in_cache(path):
        return None
    try:
        cached = read_npz(path)
    except UserError:
        return None
    made_by = (cached.source_hash, cached.feature_hash, cached.count)
    return cached if made_by == (images.hash(), extractor.hash, len(images)) else None


def _write_cache(reference: Reference, path: Path) -> None:
    try:
        reference.save(path)
    except OSError as error:
        # Python's default filter shows a warning of one place and text once, so a training run is not flooded.
        message = f"the reference statistics are not cached: {path.parent} cannot be written to ({error.strerror})"
        warnings.warn(message, stacklevel=2)
