"""Protocols by name: what papers share when their figures are compared, so that ours can stand beside theirs.

A protocol fixes the features, the number of images and what they are images of, and which images are the real ones. The
user brings those, and captions. What is brought is looked at before anything is generated: where it is not what the
protocol says, the evaluation ends in a sentence. With another number of images than the protocol's (``num_images``)
everything may be tried out, on as little as a few images, and then the report does not have the protocol's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flowdistill.config import PROTOCOLS as FIXED
from flowdistill.config import check_protocol_features
from flowdistill.config.checks import closest
from flowdistill.data import IMAGE_SETS
from flowdistill.data.array_images import ArrayImages
from flowdistill.data.image_sets import FolderImages
from flowdistill.evaluation.reference import ADM_ARRAYS, UNREADABLE, Reference
from flowdistill.evaluation.teacher_reference import TEACHER
from flowdistill.features.extractor import NOT_PUBLISHED, SQUARES, FeatureExtractor
from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import local_path
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.text import JsonObject

NONE = "none"
"""What is asked for in place of a run's protocol, to measure without one."""
FREE = "guidance, steps, solver, precision and seed are the model's or the user's, and stand beside the figures"


@dataclass(frozen=True)
class Protocol:
    """What a name stands for.

    Attributes:
        name: as it is asked for.
        source: who measures so.
        made: the images that are made, in words.
        real: the images they are compared with, in words.
        bring: what the user brings as the reference, and in which layout.
        figures: that papers print, in words.
        real_images: how many there are.
        captions: how many; None where images are of class labels.
    """

    name: str
    source: str
    made: str
    real: str
    bring: str
    figures: str
    real_images: int
    captions: int | None = None

    @property
    def num_images(self) -> int:
        return FIXED[self.name][0]

    @property
    def features(self) -> str:
        return FIXED[self.name][1]


CAPTIONS = "a text file with one a line, or .jsonl with {\"prompt\": ...} lines"
ALL_PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (
    Protocol(
        "coco30k-256",
        source="DMD2 (arXiv 2405.14867), main/coco_eval, after GigaGAN (arXiv 2303.05511)",
        made="one for each of 30,000 captions of COCO 2014's validation set",
        real="all 40,504 images of COCO 2014's validation set",
        bring="the folder val2014 with the 40,504 .jpg files of COCO's val2014.zip",
        figures="FID",
        real_images=40_504,
        captions=30_000,
    ),
    Protocol(
        "coco10k-512",
        source="DMD2 (arXiv 2405.14867), main/coco_eval, patch FID after SDXL-Lightning (arXiv 2402.13929)",
        made="one for each of 10,000 captions of COCO 2014's validation set",
        real="the 10,000 images of COCO 2014's validation set that the captions are of",
        bring="a folder with these 10,000 .jpg files, one for each caption",
        figures="FID, patch FID",
        real_images=10_000,
        captions=10_000,
    ),
    Protocol(
        "imagenet-adm",
        source="ADM (arXiv 2105.05233), evaluations/evaluator.py",
        made="of the labels 0 to 999 in turn, 50 of each; of a model without labels just so many",
        real="ADM's statistics of ImageNet's training set, and 10,000 images of it for precision and recall",
        bring="ADM's file for the size of your images, such as VIRTUAL_imagenet256_labeled.npz ('mu', 'sigma', 'mu_s', "
              "'sigma_s', and 10,000 images as 'arr_0')",
        figures="FID, sFID, IS, precision as ADM, recall as ADM",
        real_images=10_000,
    ),
)}
CLASSES = 1_000


@dataclass(frozen=True)
class Claim:
    """A protocol as it is followed here.

    Attributes:
        protocol: the one that was asked for.
        departures: what is otherwise, each a clause; with any the report does not have the protocol's name.
        facts: what was brought, by name.
    """

    protocol: Protocol
    departures: tuple[str, ...]
    facts: JsonObject

    def entries(self) -> JsonObject:
        """What the report's protocol says of it."""
        named: JsonObject = {"protocol": None if self.departures else self.protocol.name}
        if self.departures:
            named |= {"protocol_tried_out": self.protocol.name, "protocol_departures": list(self.departures)}
        return named | {f"protocol_{name}": value for name, value in self.facts.items()}


def followed(asked: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``own`` of a run, those that were asked for above them, and what the protocol of either fixes.

    Where it is asked for, the number of images and the features of the run's settings do not count.

    Raises:
        UserError: no such protocol, or features that are not the protocol's.
    """
    name = asked.get("protocol", own.get("protocol"))
    if name in (None, NONE):
        return {**own, **asked, "protocol": None}
    if name not in FIXED:
        raise UserError(f"the protocol must be one of {listed(FIXED)}, or {NONE}, not {shown(name)}"
                        f"{closest(name, FIXED)}")
    number, features = FIXED[name]
    check_protocol_features(name, asked.get("features"))
    fixed = {"num_images": number} if "protocol" in asked else {}
    return {**own, **fixed, **asked, "protocol": name, "features": features}


def claim(
    name: str,
    num_images: int,
    reference: str | os.PathLike[str] | Reference | None,
    prompts: Sequence[str] | None,
    models: Sequence[tuple[str, Teacher | Student]],
    images: Sequence[Callable[[], Tensor]],
    features: Callable[[], FeatureExtractor],
    folders: Mapping[str, int] | None = None,
) -> Claim:
    """Whether what is about to be measured is the protocol ``name``; no image of the reference is read for it.

    Args:
        prompts: the captions; None where none were given.
        models: with their names; of the ones that are measured.
        images: each gives one that is measured, (1, C, H, W); called where everything else is found to be right.
        features: loads the protocol's; called where captions, labels and folders are found to be given.
        folders: of images that are measured beside models, with how many each holds.

    Raises:
        UserError: captions or a reference that are missing or of another kind, with what to bring; and with the
            protocol's number of images, whatever else is not as the protocol says.
    """
    protocol = ALL_PROTOCOLS[name]
    departures = [] if num_images == protocol.num_images else [f"{num_images:,} images are made, not "
                                                               f"{protocol.num_images:,}"]
    check = _captions if protocol.captions is not None else _labels
    departures += [found for model in models for found in check(protocol, prompts, *model)]
    departures += [f"{folder} holds {count:,} images, not {protocol.num_images:,}"
                   for folder, count in (folders or {}).items() if count != protocol.num_images]
    _check_given(protocol, reference)
    extractor = features()
    held, size, found = _reference(protocol, reference, extractor)
    departures += found
    if NOT_PUBLISHED in extractor.name:
        departures.append("the Inception weights are not the published ones")
    _refuse(protocol, num_images, departures)
    departures += [found for image in images for found in _size_of(protocol, image().shape, size)]
    _refuse(protocol, num_images, departures)
    facts: JsonObject = {
        "source": protocol.source,
        "images": f"{num_images:,}, {protocol.made}",
        "captions": None if protocol.captions is None or prompts is None else
                    f"{len(prompts):,} in their order, the list's sha256 {json_sha256(list(prompts))}",
        "reference": f"{protocol.real}; here {held}",
        "resize": extractor.resize,
        "figures": protocol.figures,
        "free": FREE,
    }
    return Claim(protocol, tuple(dict.fromkeys(departures)), facts)


def _refuse(protocol: Protocol, num_images: int, departures: Sequence[str]) -> None:
    if departures and num_images == protocol.num_images:
        raise UserError(f"this is not the protocol {protocol.name}: {'; '.join(dict.fromkeys(departures))}. To try it "
                        "out, give another number of images (--num-images, evaluation.num_images); the report then "
                        "does not have its name")


def _size_of(protocol: Protocol, made: Sequence[int], real: tuple[int, int] | None) -> list[str]:
    """What is not as the protocol says of the size of the images that are made; ``real``: (height, width) of the
    reference's, where they have one."""
    shown_size, side = f"{made[-1]} x {made[-2]}", SQUARES.get(protocol.features, 0)
    if real is not None and tuple(made[-2:]) != real:
        return [f"the images are {shown_size}, and the reference's {real[1]} x {real[0]}"]
    return [f"images of {shown_size} are enlarged to {side} x {side}"] if min(made[-2:]) < side else []


def _captions(
    protocol: Protocol, prompts: Sequence[str] | None, name: str, model: Teacher | Student
) -> list[str]:
    """What is not as the protocol says of the captions."""
    if model.prompts is None:
        raise UserError(f"the protocol {protocol.name} measures images of captions, and {name} takes no prompts")
    if prompts is None:
        raise UserError(f"the protocol {protocol.name} needs {protocol.captions:,} captions of COCO 2014's validation "
                        f"set, {CAPTIONS}: give the file with --prompts (evaluation.prompts)")
    if len(prompts) != protocol.captions:
        return [f"the captions are {len(prompts):,}, not {protocol.captions:,}"]
    return []


def _labels(
    protocol: Protocol, prompts: Sequence[str] | None, name: str, model: Teacher | Student
) -> list[str]:
    """What is not as the protocol says of the labels."""
    if prompts is not None or model.prompts is not None:
        raise UserError(f"the protocol {protocol.name} measures images of ImageNet's class labels, and {name} takes "
                        "prompts" if model.prompts is not None else
                        f"the protocol {protocol.name} takes no prompts; leave them out")
    if model.num_classes not in (None, CLASSES):
        return [f"{name} has {model.num_classes} classes, not {CLASSES:,}"]
    if model.classes is not None and model.classes.own is not None:
        return [f"{name} makes {len(model.classes.own)} of {CLASSES:,} classes"]
    return []


def _check_given(protocol: Protocol, reference: str | os.PathLike[str] | Reference | None) -> None:
    """Refuse a reference that is missing, without a look into it."""
    if isinstance(reference, Reference):
        return
    named = None if reference is None else os.fspath(reference)
    if named is None or named in (TEACHER, *IMAGE_SETS):
        given = "" if named is None else f", not {named!r}"
        raise UserError(f"the protocol {protocol.name} is measured against {protocol.real}: give {protocol.bring} "
                        f"with --reference (evaluation.reference){given}")
    path = local_path(named)
    if protocol.captions is None and not path.is_file():
        raise _wrong(protocol, named, "is a folder" if path.is_dir() else "does not exist")
    if not path.exists():
        raise _wrong(protocol, named, "does not exist")


def _reference(
    protocol: Protocol, reference: str | os.PathLike[str] | Reference | None, extractor: FeatureExtractor
) -> tuple[str, tuple[int, int] | None, list[str]]:
    """What was given, in words; (height, width) of its images, where they have one; and what of it is not as the
    protocol says."""
    size, departures = None, []
    if isinstance(reference, Reference):
        count = _opened(protocol, reference, extractor)
    else:
        assert reference is not None  # it was refused
        named = os.fspath(reference)
        if protocol.captions is None:
            count, *size = _adm_file(protocol, named)
        else:
            count = _folder(protocol, named, extractor)
    if count is not None and count != protocol.real_images:
        departures.append(f"the reference holds {count:,} images, not {protocol.real_images:,}")
    name = reference.name if isinstance(reference, Reference) else str(reference)
    return f"{name}, {count:,} images", None if not size else (size[0], size[1]), departures


def _wrong(protocol: Protocol, reference: object, what: str) -> UserError:
    return UserError(f"the protocol {protocol.name} needs {protocol.bring} as its reference, and {reference} {what}")


def _opened(protocol: Protocol, reference: Reference, extractor: FeatureExtractor) -> int:
    """The number of images of statistics that are loaded."""
    if protocol.captions is None:
        if reference.count is not None or reference.spatial_mean is None or reference.features is None:
            raise _wrong(protocol, reference.name, "is none of ADM's")
        return len(reference.features)
    if reference.feature_hash != extractor.hash or reference.count is None:
        raise _wrong(protocol, reference.name, f"is not known to be of the features {protocol.features!r}")
    return reference.count


def _folder(protocol: Protocol, reference: str, extractor: FeatureExtractor) -> int:
    """The number of images in a folder of pictures, or of a file that Reference.save has made of one."""
    path = local_path(reference)
    if path.is_dir():
        return len(FolderImages(path))
    held = _arrays(protocol, path, ("count", "feature_hash"))
    if len(held) < 2:
        raise _wrong(protocol, reference, "is something else; of files only statistics are read that evaluate_fid.py "
                                          "--save-reference has written")
    if str(held["feature_hash"]) != extractor.hash:
        raise _wrong(protocol, reference, f"is of other features than {protocol.features!r}")
    return int(held["count"])


def _adm_file(protocol: Protocol, reference: str) -> tuple[int, int, int]:
    """Number, height and width of the images in a file of ADM's."""
    path = local_path(reference)
    held = _arrays(protocol, path, ADM_ARRAYS[:-1])
    images = ArrayImages.found(path)
    missing = [name for name in ADM_ARRAYS[:-1] if name not in held]
    if missing or images is None:
        raise _wrong(protocol, reference, f"has no {' and no '.join(map(repr, missing))}" if missing else
                     "has no images as 'arr_0', uint8 (N, H, W, 3)")
    return images.shape[0], images.shape[1], images.shape[2]


def _arrays(protocol: Protocol, path: os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of an .npz file's arrays that have these names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except UNREADABLE as error:
        raise _wrong(protocol, path, f"is damaged or no .npz file: {error}") from error
