"""A student on disk: safetensors weights and JSON that says everything needed to load them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flowdistill.conditioning.prompts import PromptConditions, PromptList
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.networks.backbones import FAMILIES, BackboneFamily, family_of
from flowdistill.networks.lora import LoraSettings, split
from flowdistill.networks.velocity import TARGET_TIMES, ExtendedVelocity, VelocityNetwork
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.students.flow_map import FlowMap
from flowdistill.students.generator import Generator
from flowdistill.students.student import Student, StudentInfo
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.loading import SIDECAR, load_scheduler
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_folder

FORMAT = 2
"""The newest known; 2 has adapters, which need the file BASE."""
KINDS: dict[str, type[Student]] = {student.kind: student for student in (FlowMap, Generator)}
PERSONAL = "personal"  # a LoRA and a word on top of another pipeline, see flowdistill.methods.echodistill.student
WEIGHTS = "model.safetensors"
BASE = "base.safetensors"


def find_student(path: str | os.PathLike[str]) -> Path | None:
    """The student folder that ``path`` is (a student) or holds (a run); None when there is none."""
    for folder in (Path(path) / "student", Path(path)):
        file = folder / SIDECAR
        if file.is_file():
            try:
                if "kind" in json.loads(file.read_text(encoding="utf-8")):
                    return folder
            except (json.JSONDecodeError, UnicodeDecodeError):
                return folder  # a damaged description is for load_student to report, not to overlook
    return None


def is_student_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a student folder or a run folder with a student in it."""
    return find_student(path) is not None


def save_student(student: Student, folder: str | os.PathLike[str]) -> None:
    """Write ``student`` to ``folder``; an older student there is replaced only once the new one is complete."""
    network = student.network
    if not isinstance(network, ExtendedVelocity):
        raise UserError(f"a student around a {type(network).__name__} cannot be saved; only students of a diffusers "
                        "backbone can")
    path, info, target = network.velocity.path, student.info, Path(folder)
    description: dict[str, Any] = {
        "format": 1 if network.velocity.lora is None else FORMAT,
        "kind": student.kind,
        "method": info.method,
        "base_model": info.base_model,
        "backbone": network.velocity.family.backbone_class,
        "path": path.kind,
        "prediction": path.prediction,
        "t_min": path.t_min,
        "t_max": path.t_max,
        "t_start": student.t_start,
        "shape": list(student.shape),
        "scalars": list(network.embeddings),
        "target_time": network.target_time,
        "lora": None if network.velocity.lora is None else asdict(network.velocity.lora),
        "guidance_range": None if info.guidance_range is None else list(info.guidance_range),
        "guidance_scale": info.guidance_scale,
        "num_classes": student.num_classes,
        "null_label": None if student.classes is None else student.classes.null_label,
        "labels": None if student.classes is None or student.classes.own is None else list(student.classes.own),
        "text": None if student.prompts is None else _describe_prompts(student.prompts),
        "settings": info.settings,
    }
    with atomic_folder(target) as partial:
        network.velocity.backbone.save_config(partial / "backbone")
        student.scheduler.save_pretrained(partial / "scheduler")
        if isinstance(student.codec, VaeCodec):
            student.codec.vae.save_pretrained(partial / "vae")
        if student.prompts is not None:
            student.prompts.text.save(partial / "text")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        if network.velocity.lora is not None:  # what trained by itself, and the teacher's weights in their own type
            weights, base = split(weights)
            save_file(base, partial / BASE, metadata={"format": "pt"})
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / SIDECAR).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _describe_prompts(prompts: PromptConditions) -> dict[str, Any]:
    return {
        "dtype": str(prompts.text.dtype).removeprefix("torch."),
        "image_size": list(prompts.image_size),
        "negative": prompts.negative,
        "prompts": prompts.prompts,
        "weights": prompts.weights,
    }


def _load_prompts(folder: Path, family: BackboneFamily, text: dict[str, Any]) -> PromptConditions:
    encoders = TextEncoders(folder / "text", getattr(torch, text["dtype"]))
    prompts = PromptConditions(encoders, family, tuple(text["image_size"]), text["negative"])
    if text["prompts"] is not None:
        prompts.use(PromptList(text["prompts"], text["weights"]))
    return prompts


def _load_vae(folder: Path) -> VaeCodec:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    return VaeCodec(getattr(diffusers, name).from_pretrained(folder))


def load_student(
    path: str | os.PathLike[str], device: str | torch.device | None = None, resident: int | None = None
) -> Student:
    """The student in a run folder, a student folder or a hub repository; several students with a manifest are one.

    Args:
        device: where to put it; the CPU by default.
        resident: of several students, how many are on the device at a time; None: all. It means nothing for one.

    Raises:
        UserError: nothing there, a student that is incomplete or damaged, or one made by a newer format.
    """
    source = os.fspath(path)
    folder = find_student(source)
    if folder is None and not Path(source).exists() and source.count("/") == 1 and not source.startswith("."):
        folder = _download(source)
    if folder is None:
        if not Path(source).exists():
            raise UserError(f"{source} does not exist; give a run folder or a student folder")
        hint = "its training has not finished yet" if (Path(source) / "config.yaml").is_file() else (
            "it has no flowdistill.json that describes one")
        raise UserError(f"{source} holds no student: {hint}")
    student = _load(folder, resident)
    return student if device is None else student.to(device)


def _download(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return find_student(snapshot_download(repository))
    except Exception as error:  # the hub client raises many unrelated types, and every one means the same to a user
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repository} is no folder here and could not be fetched from the hub: {reason}") from error


def _load(folder: Path, resident: int | None) -> Student:
    try:
        description = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        kind, version = description["kind"], description["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{folder / SIDECAR} is damaged: {error!r}") from error
    if kind == "routed":
        from flowdistill.methods.msd.student import load_routed

        return load_routed(folder, description, resident)
    if kind == PERSONAL and version <= FORMAT:
        from flowdistill.methods.echodistill.student import load_concept_student

        return load_concept_student(folder, description)
    if kind not in KINDS or version > FORMAT:
        raise UserError(f"{folder} holds a '{kind}' student of format {version}; this version loads {', '.join(KINDS)} "
                        f"students up to format {FORMAT}")
    if description["backbone"] not in FAMILIES:
        raise UserError(f"{folder} has the backbone {description['backbone']}, which is not supported")
    backbone_class = getattr(diffusers, description["backbone"])
    try:
        config = backbone_class.load_config(folder / "backbone")
        weights = load_file(folder / WEIGHTS)
        if description.get("lora") is not None:
            weights |= load_file(folder / BASE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the student in {folder} is incomplete or damaged: {' '.join(str(error).split())}") from error
    backbone = backbone_class.from_config(config)
    scheduler = load_scheduler(folder / "scheduler")
    native = path_from_scheduler(scheduler)
    if description["t_max"] < native.t_max:
        native = native.with_t_max(description["t_max"])
    family = family_of(backbone)
    wiring = description.get("target_time", "separate")
    if wiring not in TARGET_TIMES:
        raise UserError(f"{folder / SIDECAR} has target_time '{wiring}'; this version knows {', '.join(TARGET_TIMES)}")
    lora = None if description.get("lora") is None else LoraSettings(**description["lora"])
    velocity = VelocityNetwork(backbone, native, family, lora=lora)
    network = ExtendedVelocity(velocity, tuple(description["scalars"]), wiring)
    for name, parameter in network.named_parameters():  # in the types on the disk: a frozen base may be bfloat16
        if name in weights:
            parameter.data = parameter.data.to(weights[name].dtype)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder / WEIGHTS} do not fit {folder / 'backbone'}: "
                        f"{' '.join(str(error).split())[:300]}") from error
    codec = _load_vae(folder / "vae") if (folder / "vae").is_dir() else PixelCodec()
    guidance = description["guidance_range"]
    info = StudentInfo(
        method=description["method"],
        base_model=description["base_model"],
        guidance_range=None if guidance is None else (guidance[0], guidance[1]),
        guidance_scale=description["guidance_scale"],
        settings=description["settings"],
    )
    classes = family.labels(backbone, description["null_label"])
    if classes is not None and description.get("labels") is not None:
        classes = classes.restricted(description["labels"])
    text = description.get("text")
    prompts = None if text is None else _load_prompts(folder, family, text)
    t_start = description.get("t_start", native.t_max)  # older flow maps do not say it
    student = KINDS[kind](network, tuple(description["shape"]), t_start, codec, classes, info, scheduler, prompts)
    return student.requires_grad_(False).eval()
