"""A text-to-image student as a stock pipeline of its teacher's class."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from flowdistill.conditioning.prompts import PromptConditions
from flowdistill.export.folding import fold_scales
from flowdistill.networks.backbones import BackboneFamily
from flowdistill.networks.backbones.base import PipelineFacts
from flowdistill.students.student import Student
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.errors import UserError


def stock_pipeline(prompts: PromptConditions, family: BackboneFamily) -> tuple[str, PipelineFacts]:
    """Class name of the pipeline that a text-to-image student becomes, and what is peculiar to its call."""
    name = prompts.text.pipeline_class
    name = family.pipelines[name].exported_as or name
    return name, family.pipelines[name]


def prompt_pipeline(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> tuple[Any, str]:
    """The pipeline, and the call that makes an image, for latents = k_noise n + k_output backbone(k_input n).

    Raises:
        UserError: the pipeline's class has no scheduler whose one step is this map.
    """
    assert student.prompts is not None
    name, facts = stock_pipeline(student.prompts, student.network.velocity.family)
    scheduler = _scheduler(name, facts, student, backbone, k_input, k_noise, k_output)
    call = prompt_call(student, "num_inference_steps=1", facts.no_guidance)
    return assembled_pipeline(student, backbone, scheduler), call


def prompt_call(student: Student, steps: str, guidance: str) -> str:
    """The call of a text-to-image student's pipeline, from the arguments that say its steps and its guidance."""
    arguments = [steps, guidance, size_arguments(student)]
    return f'pipe("a prompt", {", ".join(filter(None, arguments))})'


def size_arguments(student: Student) -> str:
    """The arguments of the call of a text-to-image student's pipeline that fix the size of its images."""
    assert student.prompts is not None
    height, width = student.prompts.image_size
    name, _ = stock_pipeline(student.prompts, student.network.velocity.family)
    accepted = inspect.signature(getattr(diffusers, name).__call__).parameters
    # It draws the nearest size of a list of its own, and stretches that.
    exact = ", use_resolution_binning=False" if "use_resolution_binning" in accepted else ""
    return f"height={height}, width={width}{exact}"


def assembled_pipeline(student: Student, backbone: Any, scheduler: Any) -> Any:
    """A text-to-image student's pipeline of its teacher's text encoders, its autoencoder, and these two."""
    assert student.prompts is not None
    text = student.prompts.text
    name, _ = stock_pipeline(student.prompts, student.network.velocity.family)
    kind = getattr(diffusers, name)
    parts: dict[str, Any] = {"scheduler": scheduler, "vae": student.codec.vae}
    accepted = inspect.signature(kind.__init__).parameters
    parts["unet" if "unet" in accepted else "transformer"] = backbone
    with text.opened(torch.device("cpu")) as source:
        for key, parameter in accepted.items():
            if key in text.components:
                parts[key] = getattr(source, key)
            elif key not in parts and key in source.config and not isinstance(source.config[key], (list, tuple)):
                parts[key] = source.config[key]  # settings such as force_zeros_for_empty_prompt
            elif key not in parts and key != "self" and parameter.default is inspect.Parameter.empty:
                parts[key] = None
        if "requires_safety_checker" in accepted:
            parts["requires_safety_checker"] = False
        pipeline = kind(**parts)
    # Later, because some pipelines change it as they are made.
    size = student.network.velocity.family.sample_size(backbone, name, student.shape)
    if size is not None:
        backbone.register_to_config(sample_size=size)
    return pipeline


def _scheduler(
    name: str, facts: PipelineFacts, student: Student, backbone: nn.Module,
    k_input: float, k_noise: float, k_output: float,
) -> Any:
    """The scheduler whose one step is the map, once the remaining scales are folded into ``backbone``."""
    assert isinstance(student.codec, VaeCodec)
    if facts.scaled_noise:
        if k_noise > 1e-6:
            # Its step from the one sigma s to 0: s n - s backbone(s n / sqrt(s^2 + 1)). With Karras' spacing the first
            # sigma is exactly the given one.
            fold_scales(student, backbone, k_input * (k_noise**2 + 1) ** 0.5 / k_noise, -k_output / k_noise)
            return EulerDiscreteScheduler(
                use_karras_sigmas=True, sigma_max=k_noise, sigma_min=k_noise / 2, timestep_spacing="trailing",
                steps_offset=1,
            )
        fold_scales(student, backbone, k_input, k_output)
        return DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    if abs(k_noise - 1) > 1e-9:
        raise UserError(f"a {name} starts at the noise itself, so only students of a flow-matching teacher from t = 1 "
                        f"can be exported to it; this one starts at t = {student.t_start:.4f} and its map has the "
                        f"noise times {k_noise:.4f}")
    fold_scales(student, backbone, k_input, -k_output)
    return FlowMatchEulerDiscreteScheduler()
