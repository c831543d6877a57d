"""A teacher without its weights: networks on the meta device, made from a pipeline's configurations alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers
from torch import nn

from flowdistill.conditioning.components import check_variant, chosen_variant, weight_files
from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.pipeline_lora import check_takes_lora, find_lora, read_lora
from flowdistill.conditioning.prompt_bank import MemoryBank
from flowdistill.conditioning.prompt_lists import PromptList
from flowdistill.conditioning.prompts import BankSettings, PromptConditions
from flowdistill.conditioning.text_encoders import CLIP_TOKENS, INDEX
from flowdistill.config import TeacherConfig
from flowdistill.data.captions import has_captions, read_prompts_or_captions
from flowdistill.networks.backbones import FAMILIES, BackboneFamily
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.paths.schedulers import make_scheduler
from flowdistill.teachers.autoencoder import bare_codec, check_fits, check_has_autoencoder, find_autoencoder
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.loading import (
    DTYPES,
    TEACHER,
    Parts,
    assemble,
    bank_settings,
    check_source,
    models_of,
    read_record,
)
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.logging import quiet_libraries
from flowdistill.utils.quantized import parameter_count, quantize
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import JsonObject, read_json_object

META = torch.device("meta")


class Architecture(NamedTuple):
    """What a pipeline is made of.

    Attributes:
        origin: where this was read, in words.
        pipeline: class name of the pipeline.
        components: configuration of each component by its name, with its ``_class_name``.
        null_label: of ``flowdistill.json`` beside it.
        encoders: the names of its text encoders.
    """

    origin: str
    pipeline: str
    components: dict[str, JsonObject]
    null_label: int | None = None
    encoders: tuple[str, ...] = ("text_encoder",)


COMPONENTS = {"unet": "config.json", "transformer": "config.json", "vae": "config.json", "vqvae": "config.json",
              "scheduler": "scheduler_config.json", "text_encoder": "config.json", "text_encoder_2": "config.json",
              "text_encoder_3": "config.json"}


def read_architecture(source: str, variant: str | None = None) -> Architecture:
    """The configurations of a pipeline folder, of a hub id whose files are in the hub's cache, or of one of those that
    come with flowdistill. Nothing is downloaded and no weight is read.

    Args:
        variant: of the weight files that a run would read.

    Raises:
        UserError: none of the three is there, a file is damaged, or the folder has its weights in other variants only.
    """
    check_source(source, TEACHER)
    folder = find_path(source)
    if folder.exists():
        models = [name for name in models_of(folder) if weight_files(folder / name)]
        for name in models:
            chosen_variant(folder / name, variant)
        if models:  # else the configurations alone are there
            check_variant(folder, models, variant)
        return _of_folder(folder, f"the configurations in {folder}")
    cached = _in_cache(source)
    if cached is not None:
        return _of_folder(cached, f"the cached configurations of {source}")
    shipped = shipped_architectures()
    if source in shipped:
        found = shipped[source]
        return Architecture(f"flowdistill's own description of {source}", found["pipeline"], found["components"])
    raise UserError(f"teacher source {source} is no pipeline folder here, its configurations are not in the hub's "
                    f"cache, and flowdistill has no description of it; it has those of {', '.join(sorted(shipped))}")


def takes_prompts(source: str, variant: str | None = None) -> bool | None:
    """Whether a pipeline makes images of prompts, by its configurations; None where they are not here, or do not tell.

    Args:
        source, variant: as for :func:`read_architecture`.
    """
    try:
        parts = read_architecture(source, variant).components
    except UserError:  # whoever loads it will say what is wrong
        return None
    name = next((parts[name].get("_class_name") for name in ("transformer", "unet") if name in parts), None)
    return bool(FAMILIES.get(name).pipelines) if isinstance(name, str) and name in FAMILIES else None


def shipped_architectures() -> dict[str, JsonObject]:
    """Source -> pipeline class and the components' configurations."""
    found: dict[str, JsonObject] = {}
    for file in resources.files("flowdistill.plan").joinpath("architectures").iterdir():
        if file.name.endswith(".json"):
            with resources.as_file(file) as path:
                content = read_json_object(path)
            found |= dict.fromkeys(content["sources"], content)
    return found


def _in_cache(source: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if source.count("/") != 1:
        return None
    try:
        index = try_to_load_from_cache(source, INDEX)
    except ValueError:  # what cannot be a hub id
        return None
    return Path(index).parent if isinstance(index, str) else None


def _of_folder(folder: Path, origin: str) -> Architecture:
    index = read_json_object(folder / INDEX)
    components = {}
    for name, file in COMPONENTS.items():
        value = index.get(name)
        if isinstance(value, list) and value[0] is not None:
            if not (folder / name / file).is_file():
                if name.startswith("text_encoder_"):  # of interest only where it stays loaded
                    continue
                raise UserError(f"{folder / name} has no {file}, so the memory of its {name} is unknown")
            components[name] = {"_class_name": value[1]} | read_json_object(folder / name / file)
    recorded = read_record(folder)
    encoders = tuple(name for name, value in index.items()
                     if name.startswith("text_encoder") and isinstance(value, list) and value[0] is not None)
    return Architecture(origin, str(index.get("_class_name")), components, recorded.get("null_label"), encoders)


def meta_teacher(config: TeacherConfig, architecture: Architecture, listed: bool = True) -> Teacher:
    """The teacher that a run with these settings has, on the meta device; its prompts are tensors of the right shape.

    Args:
        listed: whether to read the file of prompts, where it is here.

    Raises:
        UserError: what :func:`flowdistill.load_teacher` refuses, as far as configurations show it.
    """
    dtype, parts = DTYPES[config.dtype], architecture.components
    name = next((name for name in ("transformer", "unet") if name in parts), None)
    if name is None or "scheduler" not in parts:
        raise UserError(f"{architecture.origin} name no network and scheduler that flowdistill could train with")
    if "vqvae" in parts:
        raise UserError(f"{architecture.origin} name a vqvae; supported are pixel models and KL autoencoders (vae)")
    codec: PixelCodec | VaeCodec = PixelCodec()
    if "vae" in parts:
        codec = VaeCodec(_on_meta(parts["vae"], dtype))
    if config.vae is not None:
        check_has_autoencoder(config, {name: (part.get("_class_name"),) for name, part in parts.items()})
        assert isinstance(codec, VaeCodec)
        if (other := find_autoencoder(config.vae, config.variant, download=False)) is not None:
            check_fits(bare_codec(other.folder, other.kind), codec, config)
            codec = VaeCodec(_on_meta(read_json_object(other.folder / "config.json"), dtype))
    backbone = _on_meta(parts[name], dtype)
    if config.lora is not None:  # changes weights and no shape, so only whether it fits is of interest
        check_takes_lora(architecture.pipeline, config.source)
        if (file := find_lora(config.lora, download=False)) is not None:
            read_lora(file, config.lora_scale, getattr(diffusers, architecture.pipeline), name, backbone)
    clip = parts.get("text_encoder", {}).get("max_position_embeddings", CLIP_TOKENS)
    texts = partial(_texts, architecture.pipeline, backbone, clip, config)
    settings = replace(
        config,
        null_label=architecture.null_label if config.null_label is None else config.null_label,
        attention="math" if "math" in config.attention else "sdpa",  # other kernels keep what torch's fused ones keep
        prompts=None,
    )
    made = Parts(backbone, codec, _scheduler(parts["scheduler"]), texts, lambda: _on_meta(parts[name], dtype))
    teacher = assemble(made, settings, config.source, META).to(META)
    if teacher.prompts is not None and listed:
        teacher.prompts.use(_listed(config))
    return teacher


def _on_meta(config: JsonObject, dtype: torch.dtype) -> nn.Module:
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise UserError(f"a component is a {config.get('_class_name')}, which diffusers does not have")
    with quiet_libraries():
        with META:
            module = kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    module.to(META)  # some buffers come from numpy
    # As from_pretrained does: what is in the file gets the type, what is computed (position embeddings) keeps its own.
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    stored = module.state_dict().keys()
    for name, buffer in list(module.named_buffers()):
        if name in stored and buffer.is_floating_point():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, buffer.to(dtype))
    return module.eval()


def _scheduler(config: JsonObject) -> Scheduler:
    with quiet_libraries():
        return make_scheduler(config, "the pipeline's scheduler_config.json")


def _listed(config: TeacherConfig) -> PromptList:
    """The file's prompts; one that stands for any where there is no such file."""
    if has_prompts(config):
        assert config.prompts is not None
        return read_prompts_or_captions(config.prompts, config.prompt_column)
    return PromptList([""], [1.0])


def has_prompts(config: TeacherConfig) -> bool:
    """Whether the prompts are here."""
    return config.prompts is not None and (has_captions(config.prompts) or find_path(config.prompts).is_file())


def _texts(
    pipeline: str, backbone: nn.Module, clip: int, config: TeacherConfig, family: BackboneFamily,
    pixels: tuple[int, int],
) -> ShapedPrompts:
    if pipeline not in family.pipelines:
        raise UserError(f"the pipeline {pipeline} is not supported; supported with a {family.backbone_class} are "
                        f"{', '.join(family.pipelines)}")
    shapes = family.prompt_shapes(backbone, getattr(diffusers, pipeline), clip)
    encoders = NoEncoders(pipeline, DTYPES[config.text_encoder_dtype or config.dtype], clip)
    return ShapedPrompts(shapes, encoders, family, pixels, config.negative_prompt, bank_settings(config))


def text_encoder_size(
    architecture: Architecture, dtype: torch.dtype, scheme: str | None = None
) -> tuple[int, int] | None:
    """Parameters of the pipeline's text encoders, and their bytes in this type, or quantised; None where their whole
    configurations are not known."""
    count = total = 0
    for name in architecture.encoders:
        config = architecture.components.get(name, {})
        kind = getattr(transformers, str(config.get("_class_name")), None)
        if kind is None or "model_type" not in config:
            return None
        with quiet_libraries(), META:
            module = kind(kind.config_class.from_dict(config))
        module.to(dtype)
        if scheme is not None:
            quantize(module, scheme, "teacher.text_encoder_quantize")
        count += parameter_count(module)
        total += sum(p.nbytes for p in module.parameters())
    return count, total


class NoEncoders(NamedTuple):
    """What is known of text encoders that are not here: the class of their pipeline, their type, the tokens that they
    read where they are CLIP's, and that their weights are not of interest."""

    pipeline_class: str
    dtype: torch.dtype
    clip_tokens: int
    scheme: str | None = None


class ShapedPrompts(PromptConditions):
    """Prompts as zeros of the shapes that their encodings have."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], encoders: NoEncoders, family: BackboneFamily,
        image_size: tuple[int, int], negative: str | None, settings: BankSettings,
    ) -> None:
        super().__init__(encoders, family, image_size, negative, settings)  # type: ignore[arg-type]
        self.tensors = shapes

    @property
    def _bank(self) -> MemoryBank:
        return MemoryBank(self._encoded(self.prompts))

    def _encoded(self, prompts: Sequence[str] | None, negative: bool = False) -> Condition:
        rows = 1 if prompts is None else len(prompts)
        row = {name: torch.ones(shape, dtype=torch.int64 if name == "attention_mask" else torch.float32)[None]
               for name, shape in self.tensors.items()}
        return Condition(row).expand(rows)  # one row behind all of them: a list may be long
