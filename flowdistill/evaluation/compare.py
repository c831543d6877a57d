"""Several runs, students, pipelines and folders of images in one table, measured alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from flowdistill.conditioning.prompts import read_prompts
from flowdistill.config.run_folder import CONFIG
from flowdistill.data.image_sets import FolderImages
from flowdistill.data.pictures import read_picture
from flowdistill.evaluation.evaluate import (
    DEFAULTS,
    PromptsInTurn,
    _label_rule,
    _models,
    _open,
    _Subject,
    _teacher_facts,
    _use_prompts,
    announce,
    first_image,
    prompt_conditions,
    student_parameters,
)
from flowdistill.evaluation.evaluator import Evaluator
from flowdistill.evaluation.generation import Sampler, check_num_images
from flowdistill.evaluation.kept_rows import KnownSampler
from flowdistill.evaluation.pictures import Strip, drawn_strip, stored_strip
from flowdistill.evaluation.protocols import NONE, claim, followed
from flowdistill.evaluation.report import Report, Row
from flowdistill.evaluation.teacher_reference import TEACHER
from flowdistill.features.extractor import FeatureExtractor, load_features
from flowdistill.students import Student, is_student_folder
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import local_path
from flowdistill.utils.processes import Processes
from flowdistill.utils.text import JsonObject

SHARED = ("protocol", "num_images", "features", "reference", "more_metrics", "scorers")
"""Settings that make a protocol: figures of different ones cannot be compared."""


@dataclass
class _Compared:
    """One of the things that are compared: a model, or images."""

    name: str
    subject: _Subject | None = None
    images: FolderImages | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    condition: PromptsInTurn | None = None
    models: list[tuple[str, int, Sampler]] = field(default_factory=list)
    live: bool = False

    @property
    def model(self) -> Teacher | Student | None:
        return None if self.subject is None else self.subject.student or self.subject.teacher

    @property
    def own(self) -> list[int] | None:
        classes = None if self.model is None else self.model.classes
        return None if classes is None or classes.own is None else list(classes.own)

    def move(self, device: torch.device | str) -> None:
        """Its models to a device, unless they are the caller's own."""
        if self.subject is not None and not self.live:
            for part in (self.subject.teacher, self.subject.student):
                if part is not None:
                    part.to(device)


def evaluate_several(
    sources: Sequence[Any],
    asked: Mapping[str, Any],
    seed: int,
    device: torch.device,
    teacher_rows: bool,
    strips: list[Strip] | None,
    **how: Any,
) -> Report:
    """A report with the rows of all ``sources``, each named after its source.

    A teacher that several of them have is measured once. Models come to the device one after the other.

    Args:
        sources: what :func:`flowdistill.evaluate` takes one of, or folders of images.
        asked: settings for all; the others are those of each run, where what is shared must agree.
        strips: gets some images of each row.
        how: further arguments of the :class:`Evaluator`.

    Raises:
        UserError: what they are measured with or against differs, or their labels or prompts do; fewer images in a
            folder than are measured; and what ``evaluate`` refuses.
    """
    compared = [_open_one(source, name, teacher_rows) for source, name in zip(sources, _names(sources), strict=True)]
    shared = _shared(compared, asked)
    if shared["reference"] == TEACHER:
        raise UserError("the reference 'teacher' is one model's own; evaluate models one by one against it, or give "
                        "several another reference, such as a folder of one teacher's samples")
    check_num_images(shared["num_images"])
    for one in compared:
        one.settings = {**DEFAULTS, **one.settings, **asked, **shared}
        if one.subject is not None:
            _prepare(one, teacher_rows)
    _check_alike(compared)
    extractor, claimed = _claimed(shared, compared, device, how["weights"])
    announce(claimed, how["progress"])
    if shared["features"] is None and any(one.images is not None for one in compared):
        raise UserError("folders of images cannot be compared without features; name some, with --features")
    for one in compared:
        if one.images is not None:
            one.images = _as_many(one.images, shared["num_images"], seed)
    first = next((one for one in compared if one.model is not None), compared[0])
    evaluator = Evaluator(extractor or shared["features"], shared["reference"], shared["num_images"], seed,
                          first.settings["batch_size"], more_metrics=shared["more_metrics"], scorers=shared["scorers"],
                          own=first.own, device=device, **how)
    for one in compared:
        evaluator.check_asked(None if one.model is None else one.model.num_classes,
                              None if one.condition is None else one.condition.prompts)
    rows, facts = _measured(compared, evaluator, device, strips if Processes.current().is_main else None)
    classes = None if first.model is None else first.model.num_classes
    return evaluator.report(rows, **claimed, models=facts, labels=_label_rule(classes, first.own), device=str(device),
                            noise="float32 unit normal, one CPU generator an image, seeded by (seed, index)")


def _shared(compared: Sequence[_Compared], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the figures and is one for all: as asked, as the protocol has it, else as the runs say."""
    fixed = ("num_images", "features") if asked.get("protocol", NONE) != NONE else ()
    own = {key: _agreed(key, compared, asked) for key in SHARED if key not in fixed}
    return followed({key: asked[key] for key in SHARED if key in asked}, own)


def _claimed(
    shared: Mapping[str, Any], compared: Sequence[_Compared], device: torch.device, weights: Any
) -> tuple[FeatureExtractor | None, JsonObject]:
    """The features of the protocol, and what the report says of it; (None, {}) without one."""
    if shared["protocol"] is None:
        return None, {}
    load = cache(partial(load_features, shared["features"], device, weights))
    given = [one.condition.prompts for one in compared
             if one.condition is not None and one.settings["prompts"] is not None]  # the same for all
    models = [(one.name, one.model) for one in compared if one.model is not None]
    made = claim(shared["protocol"], shared["num_images"], shared["reference"], given[0] if given else None, models,
                 [partial(_first, one) for one in compared], load,
                 {one.name: len(one.images) for one in compared if one.images is not None})
    return load(), made.entries()


def _first(one: _Compared) -> Tensor:
    """The first image of it, (1, C, H, W)."""
    if one.images is not None:
        return read_picture(one.images.paths[0])[None]
    assert one.model is not None
    return first_image(one.model, one.models[0][2])


def _measured(
    compared: Sequence[_Compared], evaluator: Evaluator, device: torch.device, strips: list[Strip] | None
) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what is particular to each of those that are compared."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    known: set[str] = set()
    several = _several_ways(compared)
    for one in compared:
        if one.images is not None:
            rows.append(evaluator.measure_images(one.images, one.name))
            facts[one.name] = {"images": one.images.sampled or f"all {len(one.images)}",
                               "left_out": one.images.left_out, "hash": one.images.hash()}
            if strips is not None:
                strips.append(stored_strip(one.name, one.images))
            continue
        assert one.subject is not None and one.model is not None
        one.move(device)
        student = one.subject.student
        evaluator.owner = None if student is None else student.class_owner
        for kind, calls, sampler in one.models:
            identity = _identity(sampler)
            if identity is not None and identity in known:
                continue
            known |= {identity or ""}
            name = _row_name(one, kind, several)
            row = evaluator.measure(sampler, tuple(one.model.shape), one.model.num_classes, name, calls,
                                    condition=one.condition)
            if kind == "student" and student is not None:
                row.stored_parameters, row.active_parameters = student_parameters(student)
            rows.append(row)
            if strips is not None:
                title = f"{name}, {calls} call{'' if calls == 1 else 's'}"
                strips.append(drawn_strip(title, sampler, one.model, one.condition, evaluator.own, evaluator.seed))
        facts[one.name] = {"guidance_scale": one.settings["guidance_scale"],
                           **_teacher_facts(one.subject.teacher, one.settings)}
        if one.subject.teacher is not None:
            facts[one.name]["solver"] = one.settings["solver"]
        one.move("cpu")
    return rows, facts


def _names(sources: Sequence[Any]) -> list[str]:
    """A name for each: its path or its kind, with a number where two are alike."""
    plain = [str(source) if isinstance(source, (str, os.PathLike)) else
             str(getattr(source, "source", "") or type(source).__name__) for source in sources]
    return [name if plain.count(name) == 1 else f"{name} ({plain[: number + 1].count(name)})"
            for number, name in enumerate(plain)]


def _open_one(source: Any, name: str, teacher_rows: bool) -> _Compared:
    live = not isinstance(source, (str, os.PathLike))
    if not live:
        folder = local_path(source)
        described = any((folder / file).is_file() for file in (CONFIG, "flowdistill.json", "model_index.json"))
        if folder.is_dir() and not described and not is_student_folder(folder):
            return _Compared(name, images=FolderImages(source))
    subject = _open(source, torch.device("cpu"), teacher_rows)
    return _Compared(name, subject, settings=subject.settings or {}, live=live)


def _agreed(key: str, compared: Sequence[_Compared], asked: Mapping[str, Any]) -> Any:
    """A setting that all share: as asked, else as the runs say, which have to agree."""
    if key in asked:
        return asked[key]
    said = [(one.name, one.settings[key]) for one in compared if one.settings.get(key) is not None]
    for name, value in said[1:]:
        if _plain(value) != _plain(said[0][1]):
            raise UserError(f"{said[0][0]} and {name} cannot be compared: {key} is {shown(said[0][1])} in the first "
                            f"and {shown(value)} in the second; say which for all, with --{key.replace('_', '-')}")
    return said[0][1] if said else DEFAULTS[key]


def _plain(value: Any) -> Any:
    """A setting as it is compared: a path in whole, from whatever folder it was written."""
    if isinstance(value, str) and local_path(value).exists():
        return str(local_path(value).resolve())
    return list(value) if isinstance(value, (list, tuple)) else value


def _prepare(one: _Compared, teacher_rows: bool) -> None:
    """Prompts, guidance and samplers of a model."""
    assert one.subject is not None
    student = one.subject.student
    if one.settings["guidance_scale"] is None:
        one.settings["guidance_scale"] = 1.0 if student is None else student.info.guidance_scale
    if one.settings["prompts"] is not None:
        for part in (one.subject.teacher, student):
            if part is not None:
                _use_prompts(part, read_prompts(one.settings["prompts"]))
    without = {} if teacher_rows else {"teacher_steps": (), "pipeline_steps": ()}
    one.models = _models(one.subject, one.settings | without)
    assert one.model is not None  # else there would be nothing to measure
    one.condition = prompt_conditions(one.model)


def _check_alike(compared: Sequence[_Compared]) -> None:
    """Refuse models of different labels or prompts: their images are not of the same things."""
    models = [one for one in compared if one.model is not None]
    for one in models[1:]:
        first = models[0]
        if one.own != first.own:
            raise UserError(f"{first.name} and {one.name} cannot be compared: the first makes {_labels(first.own)} and "
                            f"the second {_labels(one.own)}")
        ours, theirs = (None if each.condition is None else each.condition.prompts for each in (first, one))
        if ours != theirs:
            raise UserError(f"{first.name} and {one.name} cannot be compared: their prompts differ; give both the "
                            "same, with --prompts FILE")
    folder = next((one.name for one in compared if one.images is not None), None)
    if folder is not None and models and models[0].own is not None:
        raise UserError(f"{models[0].name} and {folder} cannot be compared: the first makes {_labels(models[0].own)} "
                        "only, and the labels of a folder's images are not known")


def _labels(own: Sequence[int] | None) -> str:
    return "all labels" if own is None else f"the labels {listed(own)}"


def _identity(sampler: Sampler) -> str | None:
    """What tells whether another row is of the same images."""
    return sampler.identity() if isinstance(sampler, KnownSampler) else None


def _several_ways(compared: Sequence[_Compared]) -> bool:
    """Whether teachers of one source are sampled in different ways, such as with another guidance scale."""
    rows = {(_row_name(one, kind, False), calls, _identity(sampler))
            for one in compared for kind, calls, sampler in one.models if kind != "student"}
    return len(rows) > len({(name, calls) for name, calls, _ in rows})


def _row_name(one: _Compared, kind: str, several_ways: bool) -> str:
    """Of a student its own name; of a teacher where it came from, or whose it is."""
    assert one.subject is not None
    if kind == "student":
        return one.name
    source = getattr(one.subject.teacher, "source", "") or one.name
    if several_ways:
        return one.name if one.subject.student is None and kind == "teacher" else f"{one.name}: {kind}"
    return source if kind == "teacher" else f"{source}: {kind}"


def _as_many(images: FolderImages, count: int, seed: int) -> FolderImages:
    """As many of a folder's images as are measured of everything else."""
    if len(images) < count:
        raise UserError(f"{images.name} holds {len(images)} images, and {count} are measured of each; FID is higher "
                        f"with fewer images, so give --num-images {len(images)} or less for all")
    return images.sample(count, seed) if len(images) > count else images
