"""LoRA files for other programs than diffusers: ComfyUI's names of layers, a header that says whose they are, and the
sampler's settings that take a student's steps.

ComfyUI reads each layer's ``lora_A`` and ``lora_B`` (or ``lora_down``, ``lora_up`` and ``alpha``) behind names that it
makes of its own model. For transformers these are diffusers' names, so that one file is for both. Of a UNet's attention
it has no names in diffusers' present form, but kohya's, which diffusers reads too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from flowdistill.conditioning.pipeline_lora import FILE
from flowdistill.networks.backbones.base import BaseVersion, PipelineFacts
from flowdistill.paths.native_path import NativePath
from flowdistill.students.steps import Steps
from flowdistill.teachers.autoencoder import BaseVae
from flowdistill.utils.files import portable_path

COMFYUI_FILE = "comfyui_lora.safetensors"
"""A second file, beside diffusers', where the names differ."""
LARGEST_SIGMA = 1e4
"""Of a first step that another program's sampler can start at; a schedule whose last signal is zero has none."""
WHOLE = 5e-4
"""Of a timestep, in float32."""
# Under kohya's rule this would be add_embedding_linear_1, which ComfyUI knows and diffusers does not read; both know
# the name that Stability AI's own code gives the layer.
NATIVE = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}


def kohya_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``<layer>.lora_A.weight`` and ``lora_B.weight`` of a UNet under kohya's names, each layer with its ``alpha``.

    Alpha is the layer's rank: what multiplies B A is in B.
    """
    named = convert_state_dict_to_kohya({f"unet.{key}": value.contiguous() for key, value in tensors.items()})
    for ours, native in NATIVE.items():
        named = {key.replace(f"lora_unet_{ours}.", f"lora_unet_{native}."): value for key, value in named.items()}
    return named


def header(
    tensors: Mapping[str, Tensor], version: BaseVersion | None, pipeline: str, names: str, **said: str | None
) -> dict[str, str]:
    """The header of a LoRA file: kohya's ``ss_`` keys, and those of Stability AI's model metadata standard 1.0.0.

    There is no date in it, so that the same student always becomes the same bytes.

    Args:
        tensors: with peft's names.
        version: of a public model of this shape; None where there is none.
        pipeline: class name of the pipeline, which stands for the architecture where there is no such model.
        names: "kohya" or "diffusers".
        said: more keys of the standard, such as ``title``; None: left out.
    """
    ranks = [value.shape[0] for key, value in tensors.items() if key.endswith("lora_A.weight")]
    rank = max(set(ranks), key=ranks.count)  # a layer with the folded times has more
    architecture, kohya = version or (pipeline, None)
    values: dict[str, str | None] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),  # that is a factor of 1: what there was is in the weights
        "ss_base_model_version": kohya,
        "ss_v2": None if kohya is None or not kohya.startswith("sd_") else str(kohya.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if names == "kohya"
        else "diffusers",
    } | {f"modelspec.{key}": value for key, value in said.items()}
    return {key: value for key, value in values.items() if value is not None}


def write_lora(
    folder: Path, kind: Any, tensors: Mapping[str, Tensor], facts: PipelineFacts, version: BaseVersion | None,
    **said: str | None,
) -> str | None:
    """Write the file that diffusers loads, and a second one where ComfyUI knows other names only.

    Args:
        kind: the pipeline's class.
        tensors: with peft's names, without the network's prefix, the factor alpha / rank inside B.
        facts: of the pipeline.
        version, said: see :func:`header`.

    Returns:
        The name of the file that ComfyUI loads; None where it knows no names for these layers.
    """
    part = "unet" if "unet_lora_layers" in inspect.signature(kind.save_lora_weights).parameters else "transformer"
    about = {"format": "pt"} | header(tensors, version, kind.__name__, "diffusers", **said)
    given: Any = {f"{part}_lora_layers": {key: value.contiguous() for key, value in tensors.items()}}
    kind.save_lora_weights(
        folder, **given, save_function=lambda weights, file: save_file(weights, file, metadata=about))
    if facts.lora_names != "kohya":
        return FILE if facts.lora_names == "diffusers" else None
    about = {"format": "pt"} | header(tensors, version, kind.__name__, "kohya", **said)
    save_file(kohya_tensors(tensors), folder / COMFYUI_FILE, metadata=about)
    return COMFYUI_FILE


# --- the sampler


class Sampling(NamedTuple):
    """Settings of ComfyUI's samplers.

    Attributes:
        sampler: its name.
        scheduler: the name of one that makes these steps of the base model's own schedule; None where none does.
        sigmas: the steps in k-diffusion's noise levels, with the final 0.
        start: what the program's first state is, divided by the student's.
    """

    sampler: str
    scheduler: str | None
    sigmas: tuple[float, ...]
    start: float


def sampling(path: NativePath, steps: Steps, native: list[float], table: int | None) -> Sampling | None:
    """The settings that take a student's steps; None where its first noise level is infinite.

    Noise levels are t / (1 - t) on diffusion's paths, whose states the program scales to x_0 + sigma n, and t itself on
    flow matching's. It begins diffusion's first level at (sigma^2 + 1)^1/2 n, where that is the model's largest.

    Args:
        native: the steps' timesteps.
        table: number of the timesteps of the teacher's schedule, for diffusion.
    """
    flow = path.kind == "flow"
    levels = [t if flow else t / (1 - t) if t < 1 else math.inf for t in steps.times]
    if not levels[0] < LARGEST_SIGMA:
        return None
    several = len(steps) > 1
    sampler = "lcm" if several and steps.stepping == "stochastic" else "euler"
    start, even = steps.times[0] / steps.start_scale, levels == [1.0]
    if not flow and table is not None:
        evenly = [table - 1 - int(k * table / len(steps)) for k in range(len(steps))]
        even = all(abs(here - there) < WHOLE for here, there in zip(native, evenly, strict=True))
        if abs(native[0] - evenly[0]) < WHOLE:
            start *= (1 + levels[0] ** -2) ** 0.5
    return Sampling(sampler, "simple" if even else None, (*levels, 0.0), start)


def with_vae(vae: BaseVae | None) -> str:
    """Words behind a base model's name for an autoencoder in the place of its own; empty without one."""
    return "" if vae is None else (f", with the autoencoder `{portable_path(vae.source)}` in the place of its own (its "
                                   "weights in `models/vae`, node `VAELoader`),")


def about_comfyui(file: str | None, found: Sampling | None, base: str, more: str = "") -> str:
    """The card's section for ComfyUI.

    Args:
        file: the LoRA file; None where ComfyUI knows no names for its layers.
        base: the base model, in words.
        more: a sentence on further settings.
    """
    if file is None:
        return ("\n## ComfyUI\n\nComfyUI has no names for this network's layers in diffusers' LoRA files, so there is "
                "no file for it here.\n")
    text = (f"\n## ComfyUI\n\nCopy `{file}` to ComfyUI's `models/loras`. Load {base} and behind it this file (node "
            "`LoraLoaderModelOnly`) at strength 1.0.")
    if found is None:
        return text + (" Its first step has no signal at all, a noise level that ComfyUI's sampler nodes have only for "
                       "models with `zsnr`; no settings for them are known here.\n")
    count = len(found.sigmas) - 1
    levels = ", ".join(f"{level:.6g}" for level in found.sigmas)
    rows = [("sampler", f"`{found.sampler}`"), ("steps", str(count)), ("cfg", "1.0"), ("denoise", "1.0")]
    if found.scheduler is not None:
        rows.insert(1, ("scheduler", f"`{found.scheduler}`"))
    rows.append(("noise levels (sigmas)", f"`{levels}`"))
    text += "\n\n| setting | value |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
    if found.scheduler is None:
        text += ("\nNone of its schedulers makes these noise levels: give them to the node `ManualSigmas`, and that to "
                 "`SamplerCustomAdvanced`.\n")
    if abs(found.start - 1) > 1e-4:
        text += (f"\nComfyUI's first state is {found.start:.4f} times the student's, so images differ a little from "
                 "diffusers'.\n")
    return text + (f"\n{more}\n" if more else "")

