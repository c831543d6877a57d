"""A student on disk: its network, and JSON that says everything needed to load and to use it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
from torch import nn

from flowdistill.conditioning import ClassLabels
from flowdistill.conditioning.components import load_model
from flowdistill.conditioning.pipeline_lora import BaseLora
from flowdistill.conditioning.prompts import ENCODED_AT_ONCE, BankSettings, PromptConditions, PromptList
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.networks.storage import SIDECAR, find_stored, read_network, write_network
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.students.info import StudentInfo
from flowdistill.teachers.autoencoder import BaseVae
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_folder
from flowdistill.utils.text import read_json_object, without_marks

if TYPE_CHECKING:
    from flowdistill.students.student import Student

find_student = find_stored
CARRIED = 50_000
"""The most prompts of a list that a student carries, the first ones: as many as large measurements take."""


def is_student_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a student folder or a run folder with a student in it."""
    return find_stored(path) is not None


def save_student(student: Student, folder: str | os.PathLike[str]) -> None:
    """Write ``student`` to ``folder``; an older student there is replaced only once the new one is complete.

    Raises:
        UserError: its network is no diffusers backbone.
    """
    network, info, classes = student.network, student.info, student.classes
    if not isinstance(network, ExtendedVelocity):
        raise UserError(f"a student around a {type(network).__name__} cannot be saved; only students of a diffusers "
                        "backbone can")
    with atomic_folder(folder) as partial:
        description = write_network(network, student.scheduler, partial)
        if isinstance(student.codec, VaeCodec):
            student.codec.vae.save_pretrained(partial / "vae")
        if student.prompts is not None:
            student.prompts.text.save(partial / "text")
        description |= {
            "kind": student.kind,
            "method": info.method,
            "base_model": info.base_model,
            "t_start": student.t_start,
            "shape": list(student.shape),
            "guidance_range": None if info.guidance_range is None else list(info.guidance_range),
            "guidance_scale": info.guidance_scale,
            "num_classes": student.num_classes,
            "null_label": None if classes is None else classes.null_label,
            "labels": None if classes is None or classes.own is None else list(classes.own),
            "text": None if student.prompts is None else _describe_prompts(student.prompts),
            "settings": info.settings,
        } | student.own_description()
        if info.base_lora is not None:
            description["base_lora"] = info.base_lora._asdict()
        if info.base_quantize is not None:
            description["base_quantize"] = info.base_quantize
        if info.base_vae is not None:
            description["base_vae"] = info.base_vae._asdict()
        (partial / SIDECAR).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


class StudentParts(NamedTuple):
    """What a :class:`Student` is built of, in the order of its arguments."""

    network: nn.Module
    shape: tuple[int, ...]
    t_start: float
    codec: PixelCodec | VaeCodec
    classes: ClassLabels | None
    info: StudentInfo
    scheduler: Any
    prompts: PromptConditions | None


def read_student(folder: Path, description: dict[str, Any]) -> StudentParts:
    """The parts of the student in a folder.

    Raises:
        UserError: see :func:`flowdistill.networks.storage.read_network`.
    """
    folder = without_marks(folder)
    network, scheduler = read_network(folder, description)
    family, backbone = network.velocity.family, network.velocity.backbone
    guidance, lora, vae = (description.get(key) for key in ("guidance_range", "base_lora", "base_vae"))
    info = StudentInfo(
        method=description["method"],
        base_model=description["base_model"],
        guidance_range=None if guidance is None else (guidance[0], guidance[1]),
        guidance_scale=description["guidance_scale"],
        settings=description["settings"],
        base_lora=None if lora is None else BaseLora(**lora),
        base_quantize=description.get("base_quantize"),
        base_vae=None if vae is None else BaseVae(**vae),
    )
    classes = family.labels(backbone, description["null_label"])
    if classes is not None and description.get("labels") is not None:
        classes = classes.restricted(description["labels"])
    prompts, text = None, description.get("text")
    if text is not None:
        encoders = TextEncoders(folder / "text", getattr(torch, text["dtype"]), scheme=text.get("quantize"))
        shapes = family.known_shapes(backbone, encoders.pipeline_class, encoders.clip_tokens)
        prompts = PromptConditions(encoders, family, tuple(text["image_size"]), text["negative"],
                                   BankSettings(at_once=text.get("at_once", ENCODED_AT_ONCE)), shapes)
        if text["prompts"] is not None:
            prompts.use(PromptList(text["prompts"], text["weights"]))
    codec = _read_vae(folder / "vae") if (folder / "vae").is_dir() else PixelCodec()
    t_start = description.get("t_start", network.velocity.path.t_max)  # older flow maps do not say it
    return StudentParts(network, tuple(description["shape"]), t_start, codec, classes, info, scheduler, prompts)


def _describe_prompts(prompts: PromptConditions) -> dict[str, Any]:
    return {
        "dtype": str(prompts.text.dtype).removeprefix("torch."),
        "image_size": list(prompts.image_size),
        "negative": prompts.negative,
        "prompts": None if prompts.prompts is None else list(prompts.prompts[:CARRIED]),
        "weights": list(prompts.weights[:CARRIED]),
    } | ({} if prompts.settings.at_once == ENCODED_AT_ONCE else {"at_once": prompts.settings.at_once}) | (
        {} if prompts.text.scheme is None else {"quantize": prompts.text.scheme})


def _read_vae(folder: Path) -> VaeCodec:
    name = read_json_object(folder / "config.json")["_class_name"]
    return VaeCodec(load_model(folder, getattr(diffusers, name)))
