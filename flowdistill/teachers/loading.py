"""From a pipeline folder, a hub id or a live pipeline to a :class:`Teacher`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError, safe_open
from torch import nn

from flowdistill.conditioning.prompts import PromptConditions, PromptList, read_prompts
from flowdistill.conditioning.text_encoders import INDEX, TextEncoders, is_text
from flowdistill.networks.attention import choose_attention
from flowdistill.networks.backbones import BackboneFamily, family_of
from flowdistill.networks.lora import merged
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.paths.native_path import NativePath, path_from_scheduler
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.offload import PARTS
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.logging import quiet_libraries

SIDECAR = "flowdistill.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(
    source: str | os.PathLike[str] | DiffusionPipeline,
    null_label: int | None = None,
    t_max: float | None = None,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    negative_prompt: str | None = None,
    image_size: int | None = None,
    attention: str = "auto",
    offload: str = "none",
    labels: Sequence[int] | None = None,
    start: str | os.PathLike[str] | None = None,
) -> Teacher:
    """Any supported diffusers pipeline as a frozen teacher on the linear path.

    Args:
        source: a pipeline folder, a hub id, or a live pipeline.
        null_label: the class label that means "no class". Known by itself for DiT; for a ``UNet2DModel`` it is read
            from ``flowdistill.json`` in the pipeline folder when that file is there.
        t_max: start later than the network's own last time (linear time).
        dtype: weights of the frozen network; coefficients are computed in float64 whatever it is.
        device: where to put it; the CPU by default.
        prompts: of a text-to-image teacher: the prompts to train on and to show, a list or a file
            (:func:`flowdistill.conditioning.prompts.read_prompts`). They are encoded here, before the network moves to
            ``device``.
        negative_prompt: the other side of guidance; None for the pipeline's default, mostly the empty prompt.
        image_size: width and height of a text-to-image teacher's images in pixels; None for the pipeline's default.
        attention: kernels of the network and of what is copied from it: sdpa, xformers, math, or ``"auto"``: xformers
            where it is installed and runs on ``device``, else sdpa (see :mod:`flowdistill.networks.attention`).
        offload: parts that are on ``device`` only while they work: "codec", the autoencoder; "all", the network too.
        labels: the class labels to draw and to show; None for all.
        start: a student (run or folder) without extra conditions, whose network students start as, maybe smaller than
            the teacher's own.

    Raises:
        UserError: no pipeline there, a damaged weight file, an unsupported backbone, scheduler or prediction type, or
            settings that this pipeline has no use for.
    """
    weights = _dtype(dtype)
    pipeline: Any
    if isinstance(source, DiffusionPipeline):
        pipeline, scheduler = source, None
        name = pipeline.config.get("_name_or_path") or type(source).__name__
        recorded: dict[str, Any] = {}
        folder: Path | None = None
    else:
        name = os.fspath(source)
        folder = _folder_of(name)
        pipeline, scheduler, recorded = _load_pipeline(name, folder, weights)

    def texts(family: BackboneFamily, pixels: tuple[int, int]) -> PromptConditions:
        return _prompts(pipeline, folder, family, pixels, negative_prompt, weights)

    null_label = recorded.get("null_label") if null_label is None else null_label
    parts = Parts(_backbone(pipeline), _codec(pipeline), scheduler or pipeline.scheduler, texts)
    teacher = assemble(parts, name, null_label, t_max, weights, device, prompts, negative_prompt, image_size, attention)
    if labels is not None:
        if teacher.classes is None:
            raise UserError(f"teacher.labels is {list(labels)}, but {name} takes no class labels; set it to null")
        teacher.classes = teacher.classes.restricted(labels)
    if offload not in PARTS:
        raise UserError(f"teacher.offload is '{offload}'; allowed are {', '.join(PARTS)}")
    teacher.offload = offload
    if start is not None:
        teacher.start = _start(start, teacher)
    return teacher if device is None else teacher.to(device)


class Parts(NamedTuple):
    """What a teacher is made of; ``texts(family, (height, width))`` makes the prompts' side where there is one."""

    backbone: nn.Module
    codec: PixelCodec | VaeCodec
    scheduler: Any
    texts: Callable[[BackboneFamily, tuple[int, int]], PromptConditions]


def assemble(
    parts: Parts,
    name: str,
    null_label: int | None,
    t_max: float | None,
    dtype: torch.dtype,
    device: str | torch.device | None,
    prompts: str | os.PathLike[str] | Sequence[str] | None,
    negative_prompt: str | None,
    image_size: int | None,
    attention: str,
) -> Teacher:
    """The teacher of a pipeline's parts, which stay where they are; see :func:`load_teacher`."""
    backbone, codec, scheduler, make_texts = parts
    family = family_of(backbone)
    path = path_from_scheduler(scheduler)
    if t_max is not None:
        path = path.with_t_max(t_max)
    _check_agreement(backbone, family, scheduler, path, codec)
    backbone = backbone if backbone.dtype == dtype else backbone.to(dtype)
    kernel = choose_attention(attention, backbone, family.masked, torch.device(device or "cpu"))
    network = VelocityNetwork(backbone, path, family, attention=kernel)
    classes = family.labels(backbone, null_label)
    shape, texts = family.shape(backbone), None
    if family.pipelines:
        shape = _resized(shape, codec, image_size)
        pixels = shape[1] * codec.factor, shape[2] * codec.factor
        texts = make_texts(family, pixels)
        if path.kind == "flow":
            path = path.with_grid(lambda steps: _own_times(family, scheduler, steps, shape))
    elif prompts is not None or negative_prompt is not None or image_size is not None:
        raise UserError("teacher.prompts, teacher.negative_prompt and teacher.image_size are for text-to-image "
                        f"pipelines, and {name} is none")
    if texts is not None and prompts is not None:
        texts.device = torch.device(device or "cpu")
        texts.use(read_prompts(prompts) if isinstance(prompts, (str, os.PathLike)) else _equal(prompts))
        texts.prepare()
    return Teacher(network, path, shape, codec, classes, name, scheduler, texts)


def _start(source: str | os.PathLike[str], teacher: Teacher) -> VelocityNetwork:
    from flowdistill.students import load_student

    student, family = load_student(source), teacher.network.family
    network = student.network
    velocity = getattr(network, "velocity", None)
    if velocity is None or len(network.embeddings) or network.target_time != "separate":
        raise UserError(f"teacher.start {source} is a {student.kind} with conditions of its own, which is no network "
                        "of one time; give a generator, such as tsm and score distillation make")
    if velocity.family is not family or student.shape != teacher.shape or student.num_classes != teacher.num_classes:
        raise UserError(f"teacher.start {source} is a {velocity.family.backbone_class} for samples of {student.shape} and "
                        f"{student.num_classes} classes; the teacher is a {family.backbone_class} for {teacher.shape} and "
                        f"{teacher.num_classes}")
    return velocity if velocity.lora is None else VelocityNetwork(merged(velocity.backbone), velocity.path, family)


def _equal(prompts: Sequence[str]) -> PromptList:
    return PromptList(list(prompts), [1 / len(prompts)] * len(prompts))


def _resized(
    shape: tuple[int, int, int], codec: PixelCodec | VaeCodec, image_size: int | None
) -> tuple[int, int, int]:
    if image_size is None:
        return shape
    if image_size % (2 * codec.factor):
        raise UserError(f"teacher.image_size is {image_size}; for this pipeline it must be a multiple of "
                        f"{2 * codec.factor}")
    return shape[0], image_size // codec.factor, image_size // codec.factor


def _prompts(
    pipeline: DiffusionPipeline,
    folder: Path | None,
    family: BackboneFamily,
    image_size: tuple[int, int],
    negative: str | None,
    dtype: torch.dtype,
) -> PromptConditions:
    kind = type(pipeline).__name__
    if kind not in family.pipelines:
        raise UserError(f"the pipeline {kind} is not supported; supported with a {family.backbone_class} are "
                        f"{', '.join(family.pipelines)}")
    text = TextEncoders(folder or pipeline, dtype)
    if not text.components:
        raise UserError(f"the pipeline {kind} has no text encoder, so no prompt can be encoded")
    return PromptConditions(text, family, image_size, negative)


def _own_times(family: BackboneFamily, scheduler: Any, steps: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The times (steps,) at which the family's pipeline asks its network."""
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=float(scheduler.config.get("flow_shift") or 1.0))
    scheduler = type(scheduler).from_config(scheduler.config)
    family.set_timesteps(scheduler, steps, shape)
    return scheduler.sigmas[:steps].double().cpu()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"teacher.dtype is '{dtype}'; allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype]


LOADING_ERRORS = (OSError, ValueError, AttributeError, RuntimeError, ImportError, TypeError)


def _folder_of(source: str) -> Path:
    """The folder that ``source`` is, or into which the hub's files of it go."""
    folder = Path(source)
    if folder.exists():
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
        return folder
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise UserError(f"teacher source {source} does not exist; give a pipeline folder or a hub id (owner/name)")
    try:
        return Path(DiffusionPipeline.download(source))
    except LOADING_ERRORS as error:
        # Offline the error is about the cache; why the hub did not answer is what it came from.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"teacher source {source} is no folder here and could not be fetched from the hub: {reason}"
                        ) from error


def _load_pipeline(
    source: str, folder: Path, dtype: torch.dtype
) -> tuple[DiffusionPipeline, Any, dict[str, Any]]:
    index = _read_json(folder / INDEX)
    check_weights(folder)
    # Read the scheduler as written: some pipelines (DDIMPipeline) rebuild theirs as another class when loaded.
    scheduler = load_scheduler(folder / "scheduler")
    recorded = _read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}
    # What encodes texts is loaded when there is a text; what looks at finished images is not needed at all.
    absent = {name: None for name, value in index.items()
              if isinstance(value, list) and (is_text(name) or name in UNUSED)}
    try:
        with quiet_libraries():
            # With its scheduler, whose class diffusers looks for in the wrong place where it is a deprecated one.
            pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, scheduler=scheduler, **absent)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"teacher source {source} could not be loaded as a diffusers pipeline: {reason}") from error
    return pipeline, scheduler, recorded


def load_scheduler(folder: Path) -> Any:
    """The scheduler saved in ``folder``, of exactly the class its config names."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no scheduler_config.json, so the teacher's schedule is unknown")
    name = _read_json(file).get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UserError(f"{file} names the scheduler '{name}', which diffusers does not have")
    return cls.from_pretrained(folder)


def check_weights(folder: Path) -> None:
    """Raise a :class:`UserError` naming the first damaged ``.safetensors`` file below ``folder``."""
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weight file {file} is damaged or truncated ({error}); copy it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error


def _backbone(pipeline: Any) -> nn.Module:
    for name in ("transformer", "unet"):
        module = pipeline.components.get(name)
        if module is not None:
            return module
    have = ", ".join(sorted(pipeline.components)) or "nothing"
    raise UserError(f"the pipeline {type(pipeline).__name__} has neither a unet nor a transformer (it has {have})")


def _codec(pipeline: Any) -> PixelCodec | VaeCodec:
    if pipeline.components.get("vqvae") is not None:
        raise UserError(f"{type(pipeline).__name__} has a vqvae; supported are pixel models and KL autoencoders (vae)")
    vae = pipeline.components.get("vae")
    return PixelCodec() if vae is None else VaeCodec(vae)


def _check_agreement(
    backbone: Any, family: BackboneFamily, scheduler: Any, path: NativePath, codec: PixelCodec | VaeCodec
) -> None:
    """Contradictions that the configs alone show; the rest is :meth:`Teacher.disagreement`'s business."""
    channels = family.shape(backbone)[0]
    learned = str(scheduler.config.get("variance_type") or "").startswith("learned")
    if learned and not family.learned_variance_channels(backbone):
        raise UserError(f"the scheduler has variance_type '{scheduler.config.variance_type}', but the network "
                        f"returns no variance channels ({channels} in, {channels} out); scheduler and network disagree")
    if isinstance(codec, VaeCodec) and codec.channels != channels:
        raise UserError(f"the network takes {channels} latent channels, but the pipeline's autoencoder has "
                        f"{codec.channels}; they do not belong together")
    if backbone.config.get("time_embedding_type") == "fourier" and path.kind != "ve":
        raise UserError("the UNet2DModel has time_embedding_type 'fourier', of the logarithm of sigma, but "
                        f"{path.scheduler_name} gives its network another time; supported with it is KarrasVeScheduler")
    steps, trained = scheduler.config.get("num_train_timesteps"), backbone.config.get("num_train_timesteps")
    if path.kind == "vp" and steps and trained and steps != trained:
        raise UserError(f"the scheduler has {steps} training timesteps, but the network was made for {trained}; "
                        "scheduler and network disagree")
