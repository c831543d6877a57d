"""The prompts and images of a run, encoded before it, without its network: by configurations, text encoders and the
autoencoder alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from torch import nn

from flowdistill.conditioning.components import load_model
from flowdistill.conditioning.pipeline_lora import find_lora, read_lora
from flowdistill.conditioning.prompts import PromptConditions, in_bytes
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.config import RunConfig, TeacherConfig, load_config
from flowdistill.data.captions import read_prompts_or_captions
from flowdistill.plan.images import Images, images_of
from flowdistill.plan.meta_teacher import Architecture, meta_teacher, read_architecture
from flowdistill.teachers import Teacher
from flowdistill.teachers.autoencoder import checked_autoencoder
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.loading import DTYPES, bank_settings, models_of, pipeline_folder
from flowdistill.teachers.real_data import RealData, latents_mode
from flowdistill.training.run import make_accelerator, prepare_prompts
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import cache_folder


def cache_inputs(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[str]:
    """Encode the prompts and the images of a configuration, as its run would; what is there already stays.

    Under ``accelerate launch`` the processes share the work.

    Returns:
        What is where, in words: a line for the prompts, and one for each set of images.

    Raises:
        UserError: neither prompts nor images, nothing to keep of them, and what the run itself would refuse.
    """
    config = load_config(path, overrides)
    images = images_of(config.method)
    if config.teacher.prompts is None and not images:
        raise UserError(f"there is nothing to encode: teacher.prompts is null in {path}, and the method names no "
                        "images; set it to a file with one prompt a line")
    accelerator = make_accelerator(config.train, config.output_dir)
    folder = pipeline_folder(config.teacher.source, config.teacher.variant)
    architecture = read_architecture(str(folder), config.teacher.variant)
    shaped = meta_teacher(config.teacher, architecture, listed=False)
    lines: list[str] = []
    prompts: PromptConditions | None = None
    if shaped.prompts is not None:
        prompts = prompts_alone(config.teacher, shaped, folder, architecture)
        prompts.device = accelerator.device
    elif config.teacher.prompts is not None:
        raise UserError(f"there is nothing to encode: the teacher {config.teacher.source} takes no prompts")
    if config.teacher.prompts is not None:
        assert prompts is not None
        prompts.use(read_prompts_or_captions(config.teacher.prompts, config.teacher.prompt_column))
        if prompts.mode != "live":
            prepare_prompts(accelerator, prompts)
        elif not images:
            raise UserError("there is nothing to encode beforehand: teacher.prompt_cache is live, which encodes when "
                            "rows are drawn; set it to disk")
        lines.append(_where(prompts))
    if images:
        teacher = _without_network(shaped, folder, config, accelerator, prompts)
        lines += [_kept(each, teacher) for each in images]
    return lines


def prompts_alone(
    config: TeacherConfig, teacher: Teacher, folder: Path, architecture: Architecture
) -> PromptConditions:
    """The prompts' side of the teacher that these settings load, without the rest of it.

    Args:
        teacher: of these settings, on the meta device.
        folder: of the pipeline, which ``architecture`` describes.

    Raises:
        UserError: what :func:`flowdistill.load_teacher` refuses, as far as configurations and text encoders show it.
    """
    shaped, lora = teacher.prompts, None
    assert shaped is not None
    if config.lora is not None:
        backbone = teacher.network.backbone
        name = next(name for name in ("transformer", "unet") if name in architecture.components)
        kind = getattr(diffusers, architecture.pipeline)
        file = find_lora(config.lora)
        assert file is not None  # what is not here was fetched
        lora = read_lora(file, config.lora_scale, kind, name, backbone).of_texts()
    encoders = TextEncoders(folder, DTYPES[config.text_encoder_dtype or config.dtype], config.variant, lora,
                            config.text_encoder_quantize)
    return PromptConditions(encoders, shaped.family, shaped.image_size, shaped.negative, bank_settings(config),
                            shaped.shapes)


def _without_network(
    shaped: Teacher, folder: Path, config: RunConfig, accelerator: Accelerator, prompts: PromptConditions | None
) -> Teacher:
    """A teacher that knows its shapes and conditions and has its autoencoder, and nothing behind its network."""
    settings = config.teacher
    codec: PixelCodec | VaeCodec = PixelCodec()
    if isinstance(shaped.codec, VaeCodec):
        if settings.vae is None:
            vae = load_model(folder / "vae", models_of(folder)["vae"], DTYPES[settings.dtype], settings.variant)
        else:
            vae = checked_autoencoder(settings, folder).load(DTYPES[settings.dtype], settings.variant)
        codec = VaeCodec(vae)
    classes = shaped.classes
    if classes is not None and settings.labels is not None:
        classes = classes.restricted(settings.labels)
    teacher = Teacher(nn.Identity(), shaped.path, shaped.shape, codec, classes, settings.source, None, prompts)
    return teacher.to(accelerator.device)


@torch.no_grad()
def _kept(images: Images, teacher: Teacher) -> str:
    """Read the images once, and encode what a run would keep of them; says where it is, in words."""
    options, latent = images.options, isinstance(teacher.codec, VaeCodec)
    latents_mode(options, teacher, 0)
    # In memory they come from the same files; pictures as they are have none.
    kept = "disk" if latent and options.cache_latents != "none" else "none"
    data = RealData(teacher, images.name, options=replace(options, cache_latents=kept))
    count = f"{len(data):,} picture{'' if len(data) == 1 else 's'} of {images.name}"
    captions = "" if data.captions is None else f"; their captions: {_where(data.captions)}"
    if data.bank is None:
        why = "data_options.cache_latents is none" if latent else "the teacher has no autoencoder"
        return f"{count}: each was read once, and no latents are kept ({why}){captions}"
    size = sum(file.stat().st_size for file in data.bank.files)
    return f"{count}: {in_bytes(size)} of latents in {data.bank.folder}{captions}"


def _where(prompts: PromptConditions) -> str:
    """Where the encoded prompts of a list are, in words."""
    if prompts.mode == "live":
        return prompts.describe_bank()
    if prompts.mode == "memory":
        return f"{prompts.describe_bank()}: in {cache_folder('prompts')}"
    size = sum(file.stat().st_size for file in prompts.disk_bank().files)
    return f"{prompts.describe_bank()}: {in_bytes(size)} in {prompts.folder}"
