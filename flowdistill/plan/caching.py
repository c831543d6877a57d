"""The prompts of a run, encoded before it, without its network: by configurations and text encoders alone."""

from __future__ import annotations

import os
from collections.abc import Sequence

import diffusers

from flowdistill.conditioning.pipeline_lora import find_lora, read_lora
from flowdistill.conditioning.prompts import PromptConditions, in_bytes
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.config import TeacherConfig, load_config
from flowdistill.data.captions import read_prompts_or_captions
from flowdistill.plan.meta_teacher import meta_teacher, read_architecture
from flowdistill.teachers.loading import DTYPES, bank_settings, pipeline_folder
from flowdistill.training.run import make_accelerator, prepare_prompts
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import cache_folder


def cache_prompts(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> str:
    """Encode the list of prompts of a configuration, as its run would; what is there already stays.

    Under ``accelerate launch`` the processes share the work.

    Returns:
        What is where, in words.

    Raises:
        UserError: no prompts, nothing to keep of them, and what the run itself would refuse.
    """
    config = load_config(path, overrides)
    if config.teacher.prompts is None:
        raise UserError(f"there is nothing to encode: teacher.prompts is null in {path}; set it to a file with one "
                        "prompt a line")
    accelerator = make_accelerator(config.train, config.output_dir)
    prompts = prompts_alone(config.teacher)
    prompts.device = accelerator.device
    prompts.use(read_prompts_or_captions(config.teacher.prompts, config.teacher.prompt_column))
    if prompts.mode == "live":
        raise UserError("there is nothing to encode beforehand: teacher.prompt_cache is live, which encodes when rows "
                        "are drawn; set it to disk")
    prepare_prompts(accelerator, prompts)
    if prompts.mode == "memory":
        return f"{prompts.describe_bank()}: in {cache_folder('prompts')}"
    size = sum(file.stat().st_size for file in prompts.disk_bank().files)
    return f"{prompts.describe_bank()}: {in_bytes(size)} in {prompts.folder}"


def prompts_alone(config: TeacherConfig) -> PromptConditions:
    """The prompts' side of the teacher that these settings load, without the rest of it.

    Raises:
        UserError: what :func:`flowdistill.load_teacher` refuses, as far as configurations and text encoders show it.
    """
    folder = pipeline_folder(config.source, config.variant)
    architecture = read_architecture(str(folder), config.variant)
    teacher = meta_teacher(config, architecture, listed=False)
    shaped = teacher.prompts
    if shaped is None:
        raise UserError(f"there is nothing to encode: the teacher {config.source} takes no prompts")
    lora = None
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
