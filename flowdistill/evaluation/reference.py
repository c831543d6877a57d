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
from flowdistill.data.array_images import ArrayImages
from flowdistill.data.image_sets import FolderImages, ImageSet, NamedImages
from flowdistill.data.sources import SourceImages, names_more_than_a_folder, open_pictures
from flowdistill.evaluation.collect import collect, stored_batches
from flowdistill.evaluation.moments import frechet_distance, moments_of
from flowdistill.features.extractor import LEGACY, FeatureExtractor
from flowdistill.utils.errors import WORD, UserError, listed, shown
from flowdistill.utils.files import atomic_write, cache_folder, check_replaceable, in_cache, local_path
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.processes import Processes

# Part of every cache key: raise it when the meaning of a stored number changes.
# 2: images of more than 8 bits are scaled, EXIF turns them, what is transparent is white, and hidden ones do not count.
VERSION = 2
# clean-fid's words for how images were resized and quantised before Inception.
INCEPTION_MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile,
              NotImplementedError)
"""What a damaged .npz raises, depending on where it is damaged."""
ADM_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")
"""What is in a reference of ADM's."""


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    ``mean`` (D,) and ``covariance`` (D, D) float64; ``features`` float32 (K, D) for KID, or None; ``labels`` int64 (K,)
    of those rows, or None; ``count`` images (None: unknown); ``source_hash`` of the images; ``feature_hash`` of the
    extractor (None: not recorded in the file); ``left_out``: what looked like images of the set and was not read, in
    words; ``groups`` int64 (K,): number of the prompt of those rows, or None; ``spatial_mean`` (S,) and
    ``spatial_covariance`` (S, S) float64 of the features by place, or None.
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
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    groups: Tensor | None = None

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
                       features=features, labels=self.labelled[1][mine], spatial_mean=None, spatial_covariance=None,
                       groups=None)

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
        for tensor in (self.mean, self.covariance, self.features, self.labels, self.spatial_mean,
                       self.spatial_covariance):
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
        if self.spatial_mean is not None and self.spatial_covariance is not None:
            arrays |= {"spatial_mean": self.spatial_mean.numpy(), "spatial_covariance": self.spatial_covariance.numpy()}
        with atomic_write(path) as file:
            np.savez(file, **arrays)


def check_reference_place(path: str | os.PathLike[str]) -> None:
    """Refuse a file to save a reference to that could not be written, or that is there and was not saved by
    :meth:`Reference.save`.

    Raises:
        UserError: so.
    """
    def is_own(file: Path) -> bool:
        try:
            with zipfile.ZipFile(file) as content:
                return {"mean.npy", "covariance.npy", "feature_hash.npy"} <= set(content.namelist())
        except (OSError, zipfile.BadZipFile):
            return False

    check_replaceable(path, is_own, "a reference that flowdistill has saved")


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
        reference: a named set (``flowdistill.data.IMAGE_SETS``), a folder of images, tars, .parquet files or a table
            that datasets has saved (:func:`flowdistill.data.sources.open_pictures`), a file of ``Reference.save``, or
            an .npz file with images as ``arr_0``, uint8 (N, H, W, 3).
            ADM's references (``mu_s`` and ``sigma_s`` beside ``mu`` and ``sigma``) are of the features
            ``"inception-legacy"`` and go with no others; their ``arr_0`` is what KID, precision and recall see.
            Statistics by other programs (``mu`` and ``sigma`` alone: EDM, pytorch-fid, clean-fid) do not say which
            features made them. With ``"inception-legacy"`` they are taken for EDM's, with a warning; with others they
            are named with their mode, which must be the extractor's: ``"clean:cifar10.npz"`` for clean-fid's mode
            "clean", ``"digits:own.npz"`` for other features by name.
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
    images = None if file is None else ArrayImages.found(file[0])
    if file is not None and (images is None or _holds_statistics(file[0])):
        loaded = processes.on_main(lambda: _open_statistics(*file, extractor))
        if images is None or len(images) < 2 or loaded.features is not None:
            return loaded
        shown_images = _measured(images, extractor, cache_dir, batch_size, processes)
        return replace(loaded, features=shown_images.features, source_hash=images.hash())
    return _measured(images or open_images(reference), extractor, cache_dir, batch_size, processes)


def _measured(
    images: ImageSet, extractor: FeatureExtractor, cache_dir: str | os.PathLike | None, batch_size: int,
    processes: Processes,
) -> Reference:
    """Statistics of images, from the cache where it has them."""
    if len(images) < 2:
        raise UserError(f"the reference {images.name} holds one image only; statistics need at least 2, and a distance "
                        "that means something needs thousands")
    # An extractor without a hash cannot be told from another one, so its statistics are not kept.
    path = None if extractor.hash is None else _cache_path(images, extractor, cache_dir)
    cached = processes.on_main(lambda: _read_cache(path, images, extractor))
    if cached is not None:
        return replace(cached, left_out=images.left_out)
    stored = stored_batches(images, processes, batch_size, extractor)
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
        spatial_mean=None if collected.spatial is None else collected.spatial.mean,
        spatial_covariance=None if collected.spatial is None else collected.spatial.covariance,
    )
    if path is not None and processes.is_main:
        _write_cache(made, path)
    return made


def open_images(source: str | os.PathLike) -> ImageSet:
    """A named set, or the images of a folder, of tars or of a table.

    Raises:
        UserError: none of these.
    """
    if source in IMAGE_SETS:
        return NamedImages(str(source))
    if names_more_than_a_folder(source):
        return SourceImages(open_pictures(source))
    if local_path(source).is_dir():
        return FolderImages(source)
    near = difflib.get_close_matches(str(source), IMAGE_SETS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(
        f"the reference {shown(str(source), WORD)} is neither a named set ({listed(sorted(IMAGE_SETS))}) nor a folder "
        f"of images nor an .npz file nor tars nor a table of datasets{hint}"
    )


def _statistics_file(reference: str | os.PathLike, extractor: FeatureExtractor) -> tuple[Path, str | None] | None:
    """The file that ``reference`` names and the mode before its colon; None for a named set or a folder."""
    text = os.fspath(reference)
    whole = local_path(text)
    if text in IMAGE_SETS or whole.is_dir() or names_more_than_a_folder(text):
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
    named = (extractor.mode, extractor.name)
    if loaded.spatial_mean is not None and "mean" not in arrays:
        if extractor.mode != LEGACY or mode not in (None, *named):
            used = repr(extractor.name) if mode in (None, *named) else f"{mode!r}, as it was named"
            raise UserError(
                f"{path} is a reference of ADM's ('mu_s' and 'sigma_s' beside 'mu' and 'sigma'), made with "
                f"TensorFlow's Inception and resizing, so it goes with the features 'inception-legacy' only, not with "
                f"{used}; for other features give its images themselves, in a folder"
            )
        _check_sizes(path, loaded, extractor)
        return replace(loaded, name=f"{loaded.name} (ADM's, 'inception-legacy' features)")
    if mode is not None and mode not in named:
        raise UserError(
            f"{path} was made with {mode!r}, and the features {extractor.name!r} are {extractor.mode!r}, so the two "
            "cannot be compared; give the reference's images themselves, in a folder"
        )
    if "mean" in arrays:
        return loaded
    if mode is None and extractor.mode == LEGACY:
        warnings.warn(f"{path} does not say which features made it; it is taken for {extractor.mode!r}, as EDM's and "
                      "ADM's are, and pytorch-fid's and clean-fid's are not", stacklevel=2)
        return replace(loaded, name=f"{loaded.name} (not said which features; taken for {extractor.mode!r})")
    if mode is None or mode != extractor.mode:
        others = ("; pytorch-fid, torch-fidelity, ADM, EDM and clean-fid's legacy modes resize images in another way, "
                  "which alone makes a distance of 20 or more" if extractor.mode in INCEPTION_MODES else "")
        raise UserError(
            f"{path} holds 'mu' and 'sigma' and does not say which features made them{others}: give the reference's "
            f"images themselves, in a folder, or name the file {extractor.mode}:{path} if it is of "
            f"{extractor.mode!r} features"
        )
    return replace(loaded, name=f"{loaded.name} ({mode!r} features, as it was named)")


def _check_sizes(path: Path, reference: Reference, extractor: FeatureExtractor) -> None:
    """Refuse ADM's statistics of other sizes than the features have, before anything is measured."""
    features, spatial = extractor.with_spatial(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert spatial is not None and reference.spatial_mean is not None  # both are ADM's
    for name, held, made in (("mu", reference.mean, features), ("mu_s", reference.spatial_mean, spatial)):
        if len(held) != made.shape[1]:
            raise UserError(f"{path} holds a {name!r} of {len(held)} numbers, and the features {extractor.name!r} are "
                            f"{made.shape[1]}; it was made with other features")


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
            arrays = {name: file[name] for name in file.files if name in (*_OURS, *_THEIRS, *_THEIRS_BY_PLACE)}
            names = list(file.files)
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged or no .npz file: {error}") from error
    if not any(all(name in arrays for name in pair) for pair in (_OURS[:2], _THEIRS)):
        raise UserError(f"{path} holds neither 'mean' and 'covariance' nor 'mu' and 'sigma', but "
                        f"{', '.join(names[:5]) or 'nothing'}")
    return arrays


def _holds_statistics(path: Path) -> bool:
    """Whether an .npz file has statistics, not images only."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return any(name in file.files for name in (*_OURS[:2], *_THEIRS))
    except UNREADABLE:
        return True  # for whoever reads them to say what is wrong


def _from_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Reference:
    mean, covariance = _gaussian(path, arrays, _OURS[:2] if "mean" in arrays else _THEIRS)
    by_place = _OURS[-2:] if "mean" in arrays else _THEIRS_BY_PLACE
    spatial = _gaussian(path, arrays, by_place) if all(name in arrays for name in by_place) else (None, None)
    try:
        count = int(arrays.get("count", -1))
        features, labels = (
            torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "labels")
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold statistics: {error}") from error
    return Reference(
        name=str(arrays.get("name", path.name)),
        mean=mean,
        covariance=covariance,
        count=None if count < 0 else count,
        features=features,
        labels=labels,
        source_hash=str(arrays.get("source_hash", "")) or None,
        feature_hash=str(arrays.get("feature_hash", "")) or None,
        left_out=str(arrays.get("left_out", "")) or None,
        spatial_mean=spatial[0],
        spatial_covariance=spatial[1],
    )


def _gaussian(path: Path, arrays: dict[str, np.ndarray], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    mean, covariance = (arrays[name] for name in names)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise UserError(f"{path} holds a mean of shape {mean.shape} and a covariance of shape {covariance.shape}")
    try:
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold statistics: {error}") from error
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds statistics that are not finite; make them again")
    return torch.from_numpy(mean), torch.from_numpy(covariance)


_OURS = ("mean", "covariance", "name", "count", "features", "labels", "source_hash", "feature_hash", "left_out",
         "spatial_mean", "spatial_covariance")
_THEIRS = ("mu", "sigma")
_THEIRS_BY_PLACE = ("mu_s", "sigma_s")


def _check_fits(reference: Reference, extractor: FeatureExtractor) -> None:
    made, used = reference.feature_hash, extractor.hash
    if made is not None and used is not None and made != used:
        ours, theirs = used.split(" ")[-1][:16], made.split(" ")[-1][:16]
        # The same weights behind another resizing differ in what stands before the hash.
        resized = " and other resizing" if ours == theirs else ""
        raise UserError(
            f"the reference {reference.name!r} was made with other features (sha256 {theirs}{resized}) than "
            f"{extractor.name!r} (sha256 {ours}); make it again or name the features it was made with"
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
