"""Loading a :class:`Teacher` from a pipeline folder, a hub id or a live pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from flowdistill.conditioning.components import (
    LOADING_ERRORS,
    adapter_file,
    check_variant,
    component_class,
    load_model,
    read_files,
    variants_of,
    weight_files,
)
from flowdistill.conditioning.pipeline_lora import PipelineLora, base_lora, check_takes_lora, find_lora, read_lora
from flowdistill.conditioning.prompt_lists import equal_prompts
from flowdistill.conditioning.prompts import BankSettings, PromptConditions
from flowdistill.conditioning.text_encoders import INDEX, TextEncoders, is_text
from flowdistill.config import TeacherConfig, check_texts
from flowdistill.config.schema import QUANTIZED
from flowdistill.data.captions import has_captions, read_prompts_or_captions
from flowdistill.networks.attention import choose_attention
from flowdistill.networks.backbones import Backbone, BackboneFamily, family_of
from flowdistill.networks.lora import merged
from flowdistill.networks.storage import SIDECAR, locate, read_description, read_network
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.objectives.guidance import NORMS
from flowdistill.paths.native_path import FLOW_SCHEDULERS, SPACINGS, VP_SCHEDULERS, NativePath, path_from_scheduler
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.paths.schedulers import load_scheduler
from flowdistill.teachers.autoencoder import Found, checked_autoencoder, find_autoencoder, own_class
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.offload import PARTS
from flowdistill.teachers.pipeline_call import scheduler_at
from flowdistill.teachers.teacher import Teacher
from flowdistill.teachers.weight_files import NamedFiles, pipeline_files, stored_files
from flowdistill.utils.devices import usable_device
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import check_pointer
from flowdistill.utils.logging import log_once, quiet_libraries
from flowdistill.utils.quantized import check_gradients, check_scheme, quantize
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import JsonObject, read_json_object, without_marks

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
TEACHER = "teacher source"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(
    source: str | os.PathLike[str] | DiffusionPipeline | TeacherConfig,
    device: str | torch.device | None = None,
    prepare: Callable[[PromptConditions], None] = PromptConditions.prepare,
    **settings: Any,
) -> Teacher:
    """Any supported diffusers pipeline as a frozen teacher on the linear path.

    Args:
        source: a pipeline folder, a hub id, a live pipeline, or the ``teacher`` section of a configuration.
        device: where to put it; the CPU by default. Prompts are encoded before the network moves there.
        prepare: encodes the list of prompts, where there is one.
        settings: fields of :class:`flowdistill.config.TeacherConfig` by name, which replace those of a section:
            ``null_label``, ``t_max``, ``dtype`` (also a torch dtype), ``prompts`` (also a list of texts),
            ``negative_prompt``, ``image_size``, ``attention``, ``offload``, ``labels``, ``start`` and so on.

    Raises:
        UserError: no pipeline there, weights that are damaged or missing, an unsupported backbone, scheduler or
            prediction type, or settings that this pipeline has no use for.
        TypeError: a setting that does not exist.
    """
    live = source if isinstance(source, DiffusionPipeline) else None
    if isinstance(source, TeacherConfig):
        config = replace(source, **settings)
    else:
        config = TeacherConfig(source="" if live is not None else os.fspath(source), **settings)  # type: ignore[arg-type]
    check_texts(config if live is None else replace(config, source=type(live).__name__), prefix="teacher.")
    config.validate()
    weights = _dtype(config.dtype)
    words = weights if config.text_encoder_dtype is None else _dtype(config.text_encoder_dtype)
    pipeline: Any
    lora: PipelineLora | None = None
    vae: Found | None = None
    if live is not None:
        if config.lora is not None:
            raise UserError("teacher.lora is for a pipeline folder or a hub id; a live pipeline, whose own weights are "
                            "used, takes it by load_lora_weights, fuse_lora and unload_lora_weights")
        if config.vae is not None:
            raise UserError("teacher.vae is for a pipeline folder or a hub id; a live pipeline takes another "
                            "autoencoder as pipeline.vae")
        for key in ("text_encoder_dtype", "text_encoder_device", "text_encoder_quantize"):
            if getattr(config, key) is not None:
                raise UserError(f"teacher.{key} is for a pipeline folder or a hub id; a live pipeline's text encoders "
                                "stay as and where they are")
        if config.quantize is not None:
            raise UserError("teacher.quantize is for a pipeline folder or a hub id; the weights of a live pipeline, "
                            "which is used after it as well, stay as they are")
        pipeline, scheduler = live, None
        name = pipeline.config.get("_name_or_path") or type(live).__name__
        recorded: JsonObject = {}
        folder: Path | None = None
        file: Path | None = None
    else:
        name = config.source
        folder = pipeline_folder(name, config.variant)
        for key in ("quantize", "text_encoder_quantize"):
            scheme = getattr(config, key)
            if scheme is None:
                continue
            if scheme not in QUANTIZED:
                raise UserError(f"teacher.{key} is '{scheme}'; allowed are {', '.join(QUANTIZED)} and null")
            check_scheme(scheme)
        file = None if config.lora is None else find_lora(config.lora)  # the errors before the work
        if file is not None:
            check_takes_lora(read_json_object(folder / INDEX)["_class_name"], name)
        given = {}
        if config.vae is not None:
            vae = checked_autoencoder(config, folder)
            given["vae"] = vae.load(weights, config.variant)
        pipeline, scheduler, recorded = _load_pipeline(folder, weights, config.variant, **given)
        if file is not None:
            network = _named_backbone(pipeline)
            lora = read_lora(file, config.lora_scale, type(pipeline), *network)
            lora.fuse(*network)

    def texts(family: BackboneFamily, pixels: tuple[int, int]) -> PromptConditions:
        encoders = TextEncoders(folder or pipeline, words, config.variant, None if lora is None else lora.of_texts(),
                                config.text_encoder_quantize)
        return _prompts(pipeline, encoders, family, pixels, config)

    known = config.null_label is not None or "null_label" in recorded
    if config.null_label is None:
        config = replace(config, null_label=recorded.get("null_label"))
    called = recorded.get("call", {})
    if config.image_size is None and {"height", "width"} <= called.keys():  # an export draws what it was trained at
        config = replace(config, image_size=[called["height"], called["width"]])
    def whole() -> Backbone:
        assert folder is not None
        component, loaded = _named_backbone(pipeline)
        again = load_model(folder / component, type(loaded), weights, config.variant)
        if lora is not None:
            lora.fuse(component, again)
        return again

    def own_codec() -> VaeCodec:
        assert folder is not None
        return VaeCodec(load_model(folder / "vae", own_class(folder), weights, config.variant))

    parts = Parts(_backbone(pipeline), _codec(pipeline), scheduler or pipeline.scheduler, texts, whole)
    teacher = assemble(parts, config, name, device, prepare)
    if not known and teacher.classes is not None and teacher.classes.null_label is None:
        _say_assumed(name, teacher.classes.num_classes)
    if config.labels is not None:
        if teacher.classes is None:
            raise UserError(f"teacher.labels is {shown(config.labels)}, but {name} takes no class labels; set it to "
                            "null")
        teacher.classes = teacher.classes.restricted(config.labels)
    if config.offload not in PARTS:
        raise UserError(f"teacher.offload is '{config.offload}'; allowed are {', '.join(PARTS)}")
    teacher.offload = config.offload
    teacher.lora, teacher.quantize = base_lora(config), config.quantize
    if vae is not None:
        teacher.vae, teacher.own_codec = vae.record, own_codec
    if config.start is not None:
        teacher.start = _start(config.start, teacher)
    if folder is not None:
        teacher.files = partial(_files, config, folder, file, vae)
    return teacher if device is None else teacher.to(device)


def teacher_files(config: TeacherConfig) -> NamedFiles:
    """The files that make the teacher of a ``teacher`` section, by the setting that names them; what is on the hub only
    is fetched. Its prompts are not among them (:func:`prompt_files`).

    Raises:
        UserError: something is not there.
    """
    folder = pipeline_folder(config.source, config.variant)
    lora = None if config.lora is None else find_lora(config.lora)
    return _files(config, folder, lora, None if config.vae is None else find_autoencoder(config.vae, config.variant))


def prompt_files(config: TeacherConfig) -> NamedFiles:
    """The file of prompts that a ``teacher`` section names, where there is one; no pictures with captions, which may be
    very many."""
    if config.prompts is None or has_captions(config.prompts):
        return {}
    file = find_path(config.prompts)
    return {"teacher.prompts": {file.name: file}} if file.is_file() else {}


def _files(config: TeacherConfig, folder: Path, lora: Path | None, vae: Found | None) -> NamedFiles:
    found = {"teacher.source": pipeline_files(folder, config.variant, UNUSED if vae is None else (*UNUSED, "vae"))}
    if lora is not None:
        found["teacher.lora"] = {lora.name: lora}
    if vae is not None:
        entry = ("diffusers", vae.record.kind)
        found["teacher.vae"] = {file.name: file for file in read_files(vae.folder, entry, config.variant)}
    if config.start is not None:
        found["teacher.start"] = stored_files(locate(config.start))
    return found


@cache
def _say_assumed(name: str, count: int) -> None:
    log_once(f"{name}: all {count} class labels are taken for classes; where the last one means 'no class', set "
             f"teacher.null_label to {count - 1}")


class LoadedPipeline(Protocol):
    """What a teacher is made from of a diffusers pipeline."""

    scheduler: Scheduler

    @property
    def components(self) -> dict[str, Any]: ...


class Parts(NamedTuple):
    """What a teacher is made of; ``texts(family, (height, width))`` makes the prompts' side where there is one, and
    ``whole()`` a backbone with the weights before ``teacher.quantize``."""

    backbone: Backbone
    codec: PixelCodec | VaeCodec
    scheduler: Scheduler
    texts: Callable[[BackboneFamily, tuple[int, int]], PromptConditions]
    whole: Callable[[], Backbone]


def assemble(
    parts: Parts, config: TeacherConfig, name: str, device: str | torch.device | None,
    prepare: Callable[[PromptConditions], None] = PromptConditions.prepare,
) -> Teacher:
    """The teacher of a pipeline's parts, which stay where they are; see :func:`load_teacher`.

    Args:
        name: of the pipeline, for messages.
    """
    backbone, codec, scheduler, make_texts, whole = parts
    dtype, prompts = _dtype(config.dtype), config.prompts
    family = family_of(backbone)
    path = path_from_scheduler(scheduler)
    path = path.from_working_start() if config.t_max is None else path.with_t_max(config.t_max)
    _check_agreement(backbone, family, scheduler, path, codec)
    backbone = backbone if backbone.dtype == dtype else backbone.to(dtype)
    kernel = choose_attention(config.attention, backbone, family.masked, torch.device(device or "cpu"))
    check_gradients(backbone, dtype)
    if config.quantize is not None:
        quantize(backbone, config.quantize, "teacher.quantize")
    network = VelocityNetwork(backbone, path, family, attention=kernel)
    if config.quantize is not None:
        network.whole = whole
    classes = family.labels(backbone, config.null_label)
    shape, texts = family.shape(backbone), None
    if family.pipelines:
        shape = _resized(shape, codec.factor * family.divisor(backbone)[0], codec.factor, config.image_size)
        pixels = shape[1] * codec.factor, shape[2] * codec.factor
        texts = make_texts(family, pixels)
        texts.shapes = family.known_shapes(backbone, texts.text.pipeline_class, texts.text.clip_tokens)
    elif prompts is not None or config.negative_prompt is not None or config.image_size is not None:
        raise UserError("teacher.prompts, teacher.negative_prompt and teacher.image_size are for text-to-image "
                        f"pipelines, and {name} is none")
    elif (bank_settings(config), config.text_encoder_dtype, config.text_encoder_quantize) != (
        bank_settings(TeacherConfig("")), None, None
    ):
        raise UserError("teacher.prompt_cache, prompt_cache_gb, prompts_at_once, text_encoder_device, "
                        "text_encoder_dtype and text_encoder_quantize are for text-to-image pipelines, and "
                        f"{name} is none")
    family.check_size(backbone, shape)
    if path.kind == "flow" and path.scheduler_name in FLOW_SCHEDULERS and (family.pipelines or _placed(scheduler)):
        path = path.with_grid(lambda steps: _own_times(family, scheduler, steps, shape))
    if texts is not None and prompts is not None:
        texts.device = torch.device(device or "cpu")
        listed = isinstance(prompts, (str, os.PathLike))
        texts.use(read_prompts_or_captions(prompts, config.prompt_column) if listed else equal_prompts(prompts))
        prepare(texts)
    teacher = Teacher(network, path, shape, codec, classes, name, scheduler, texts)
    teacher.guidance_norm = _norm_kept(config.guidance_norm, teacher)
    return teacher


def _norm_kept(kind: str | None, teacher: Teacher) -> str | None:
    """``teacher.guidance_norm``, where the teacher has two sides of guidance to compare."""
    if kind is None:
        return None
    if kind not in NORMS:
        raise UserError(f"teacher.guidance_norm is '{kind}'; allowed are {', '.join(NORMS)} and null")
    if teacher.takes_guidance:
        raise UserError(f"teacher.guidance_norm is {kind}, but guidance is an input of {teacher.source}'s network, "
                        "which makes one prediction and no other to compare it with; set it to null")
    if not teacher.can_guide:
        raise UserError(f"teacher.guidance_norm is {kind}, but {teacher.source} cannot be guided: it has no null label "
                        "and takes no prompts; set it to null")
    return kind


def _start(source: str | os.PathLike[str], teacher: Teacher) -> VelocityNetwork:
    """The velocity network of a stored student that has no conditions of its own."""
    folder = locate(source)
    description = read_description(folder)
    if description.get("scalars") != [] or description.get("target_time", "separate") != "separate":
        raise UserError(f"teacher.start {source} is a {description['kind']} with conditions of its own, which is no "
                        "network of one time; give a generator, such as score distillation makes")
    network, _ = read_network(folder, description)
    velocity, family = network.velocity, teacher.network.family
    shape, classes = tuple(description["shape"]), description["num_classes"]
    if velocity.family is not family or shape != teacher.shape or classes != teacher.num_classes:
        raise UserError(f"teacher.start {source} is a {velocity.family.backbone_class} for samples of {shape} and "
                        f"{classes} classes; the teacher is a {family.backbone_class} for {teacher.shape} and "
                        f"{teacher.num_classes}")
    velocity.requires_grad_(False).eval()
    return velocity if velocity.lora is None else VelocityNetwork(merged(velocity.backbone), velocity.path, family)


def _resized(
    shape: tuple[int, int, int], multiple: int, factor: int, image_size: int | Sequence[int] | None
) -> tuple[int, int, int]:
    """(C, H, W) of samples whose images have another size.

    Args:
        multiple: of which both sides of an image must be one.
        factor: pixels along one side of a sample's element.
    """
    if image_size is None:
        return shape
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % multiple or width % multiple:
        what = "it must be a multiple" if height == width else "height and width must be multiples"
        raise UserError(f"teacher.image_size is {image_size}; for this pipeline {what} of {multiple}")
    return shape[0], height // factor, width // factor


def _prompts(
    pipeline: DiffusionPipeline,
    text: TextEncoders,
    family: BackboneFamily,
    image_size: tuple[int, int],
    config: TeacherConfig,
) -> PromptConditions:
    kind = type(pipeline).__name__
    if kind not in family.pipelines:
        raise UserError(f"the pipeline {kind} is not supported; supported with a {family.backbone_class} are "
                        f"{', '.join(family.pipelines)}")
    if not text.components:
        raise UserError(f"the pipeline {kind} has no text encoder, so no prompt can be encoded")
    return PromptConditions(text, family, image_size, config.negative_prompt, bank_settings(config))


def bank_settings(config: TeacherConfig) -> BankSettings:
    """Where a list of prompts is kept, as the ``teacher`` section says.

    Raises:
        UserError: a device that this machine does not have.
    """
    device = usable_device(config.text_encoder_device, "teacher.text_encoder_device")
    return BankSettings(config.prompt_cache, config.prompt_cache_gb, config.prompts_at_once, device)


def _own_times(family: BackboneFamily, scheduler: Scheduler, steps: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The times (steps,) at which the family's pipeline asks its network, the first of them 1."""
    own = scheduler_at(scheduler, family, steps, shape, FlowMatchEulerDiscreteScheduler)
    return own.sigmas[:steps].double().cpu()


def _placed(scheduler: Scheduler) -> bool:
    """Whether a flow-matching scheduler places its times in another way than evenly, but for a shift."""
    config = scheduler.config
    return any(config.get(key) for key in ("shift_terminal", *SPACINGS)) and not config.get("use_dynamic_shifting")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"teacher.dtype is '{dtype}'; allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def pipeline_folder(source: str, variant: str | None = None, what: str = TEACHER) -> Path:
    """The folder that ``source`` is, or into which the hub's files of it go.

    Args:
        variant: of the weight files; None: those without one, or the only variant that there is.
        what: words for the source, for messages.

    Raises:
        UserError: there is neither a pipeline folder nor such a pipeline on the hub.
    """
    check_source(source, what)
    folder = find_path(source)
    if folder.exists():
        return without_marks(folder)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{what} {source} does not exist; give a pipeline folder or a hub id (owner/name)")
    folder = _fetched(source, variant, what)
    bare = [name for name in models_of(folder) if not weight_files(folder / name)]
    if variant is None and bare:
        # Only files without a variant were asked for, and there are none.
        offered = _offered(source, bare)
        if len(offered) == 1:
            return without_marks(_fetched(source, offered.pop(), what))
    return without_marks(folder)


def check_source(source: str, what: str) -> None:
    """Refuse a single file of weights, and a folder that holds no pipeline.

    Raises:
        UserError: so, with what makes a pipeline folder of it.
    """
    place = find_path(source)
    if place.suffix.lower() in SINGLE_FILES and not place.exists():
        raise UserError(f"{what} {source} does not exist; give a pipeline folder or a hub id (owner/name)")
    if place.is_file():
        raise UserError(f"{what} {source} is a file, not a pipeline folder{_from_file(source)}")
    if not place.exists() or (place / INDEX).is_file():
        return
    adapter = adapter_file(place)
    single = next((file for file in sorted(place.iterdir()) if file.suffix.lower() in SINGLE_FILES[:2]), None)
    hint = ""
    inside = sorted(file.parent.name for file in place.glob(f"*/{INDEX}"))
    if inside:
        several = f"those in it, {listed(inside)}, do" if len(inside) > 1 else f"the one in it, {inside[0]}, does"
        hint = f"; {several}, so give {place / inside[0]}"
    elif (place.parent / INDEX).is_file():
        hint = f"; it is a part of the one in {place.parent}"
    elif adapter is not None:
        named = "name it in teacher.lora, and its base model in teacher.source, or " if what == TEACHER else ""
        hint = (f", but an adapter ({adapter}); {named}fuse first: load its base model, call "
                f"load_lora_weights(\"{source}\"), fuse_lora() and unload_lora_weights(), and save_pretrained(\"a new "
                "folder\")")
    elif single is not None:
        hint = _from_file(str(single))
    raise UserError(f"{source} is not a diffusers pipeline folder: it has no model_index.json{hint}")


def _from_file(file: str) -> str:
    if Path(file).suffix.lower() not in SINGLE_FILES:
        return ""
    return (f"; of a single-file checkpoint diffusers makes one: StableDiffusionPipeline.from_single_file(\"{file}\")"
            ".save_pretrained(\"a new folder\"), with the class of its pipeline")


def _fetched(source: str, variant: str | None, what: str) -> Path:
    try:
        return Path(DiffusionPipeline.download(source, **({} if variant is None else {"variant": variant})))
    except LOADING_ERRORS as error:
        # Offline the error is about the cache; why the hub did not answer is what it came from.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"{what} {source} is no folder here and could not be fetched from the hub: {reason}"
                        ) from error


def _offered(source: str, models: Sequence[str]) -> set[str]:
    """The variants in which the hub has every one of these models; none where it does not answer."""
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(source)
    except LOADING_ERRORS:
        return set()
    each = [variants_of(file[len(name) + 1 :] for file in files if file.startswith(f"{name}/")) for name in models]
    return {variant for variant in set.intersection(*each) if variant is not None}


def models_of(folder: Path, without: Container[str] = UNUSED) -> dict[str, type[nn.Module]]:
    """Name -> class of the models that a pipeline folder holds, ``without`` some."""
    index = read_json_object(folder / INDEX)
    kinds = {name: component_class(entry) for name, entry in index.items() if name not in without}
    return {name: kind for name, kind in kinds.items() if kind is not None and (folder / name).is_dir()}


def load_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None, **given: Any) -> Any:
    """The diffusers pipeline in ``folder``, with every weight from its files.

    Args:
        variant: see :func:`pipeline_folder`.
        given: components that are not loaded, or None for those that are left out.

    Raises:
        UserError: weights that are damaged or missing, or what diffusers refuses.
    """
    models = models_of(folder, without=given)
    for name, entry in read_json_object(folder / INDEX).items():  # tokenizers and the like
        if isinstance(entry, list) and entry[0] is not None and name not in models and name not in given:
            for file in filter(Path.is_file, (folder / name).glob("*")):
                check_pointer(file)
    check_variant(folder, models_of(folder), variant)
    loaded = {name: load_model(folder / name, kind, dtype, variant) for name, kind in models.items()}
    try:
        with quiet_libraries():
            return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **loaded, **given)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} could not be loaded as a diffusers pipeline: {reason}") from error


def _load_pipeline(
    folder: Path, dtype: torch.dtype, variant: str | None, **given: Any
) -> tuple[DiffusionPipeline, Scheduler, JsonObject]:
    index = read_json_object(folder / INDEX)
    # Read the scheduler as written: some pipelines (DDIMPipeline) rebuild theirs as another class when loaded.
    scheduler = load_scheduler(folder / "scheduler")
    recorded = read_record(folder)
    # What encodes texts is loaded when there is a text; what looks at finished images is not needed at all.
    absent = {name: None for name, value in index.items()
              if isinstance(value, list) and (is_text(name) or name in UNUSED)}
    # With its scheduler, whose class diffusers looks for in the wrong place where it is a deprecated one.
    pipeline = load_pipeline(folder, dtype, variant, scheduler=scheduler, **absent, **given)
    return pipeline, _of_pipeline(scheduler, pipeline), recorded


def _of_pipeline(scheduler: Scheduler, pipeline: LoadedPipeline) -> Scheduler:
    """The scheduler as it is written, or the one of the same betas that the pipeline calls in its place: the class
    decides on clipping, and on the pipeline's own samples."""
    own, written = pipeline.scheduler, type(scheduler).__name__
    same = type(own).__name__ in VP_SCHEDULERS and written in VP_SCHEDULERS
    return own if same and not scheduler.config.get("use_flow_sigmas") else scheduler


def read_record(folder: Path) -> JsonObject:
    """What the ``flowdistill.json`` in a folder says; nothing where there is none.

    Of pipelines with class labels: ``num_classes``, ``null_label`` (None: there is none), and ``labels``, those that a
    student was trained for (None: all). Of exports: ``call``, the arguments of the pipeline's call; and of students of
    several calls what makes one of the pipeline again (:func:`flowdistill.students.exported_student`).
    """
    return read_json_object(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}


def _backbone(pipeline: LoadedPipeline) -> Backbone:
    return _named_backbone(pipeline)[1]


def _named_backbone(pipeline: LoadedPipeline) -> tuple[str, Backbone]:
    for name in ("transformer", "unet"):
        module = pipeline.components.get(name)
        if module is not None:
            return name, module
    have = ", ".join(sorted(pipeline.components)) or "nothing"
    raise UserError(f"the pipeline {type(pipeline).__name__} has neither a unet nor a transformer (it has {have})")


def _codec(pipeline: LoadedPipeline) -> PixelCodec | VaeCodec:
    if pipeline.components.get("vqvae") is not None:
        raise UserError(f"{type(pipeline).__name__} has a vqvae; supported are pixel models and KL autoencoders (vae)")
    vae = pipeline.components.get("vae")
    return PixelCodec() if vae is None else VaeCodec(vae)


def _check_agreement(
    backbone: Backbone, family: BackboneFamily, scheduler: Scheduler, path: NativePath, codec: PixelCodec | VaeCodec
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
