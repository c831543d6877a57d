"""A text-to-image student as a stock pipeline of its teacher's class."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from flowdistill.export.folding import fold_scales
from flowdistill.networks.backbones.base import PipelineFacts
from flowdistill.students.student import Student
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.errors import UserError


def stock_pipeline(student: Student) -> tuple[str, PipelineFacts]:
    """Class name of the pipeline that a text-to-image student becomes, and what is peculiar to its call."""
    assert student.prompts is not None
    pipelines, name = student.network.velocity.family.pipelines, student.prompts.text.pipeline_class
    name = pipelines[name].exported_as or name
    return name, pipelines[name]


def prompt_pipeline(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> tuple[Any, str]:
    """The pipeline, and the call that makes an image, for latents = k_noise n + k_output backbone(k_input n).

    Raises:
        UserError: the pipeline's class has no scheduler whose one step is this map.
    """
    assert student.prompts is not None
    text = student.prompts.text
    name, facts = stock_pipeline(student)
    scheduler = _scheduler(name, facts, student, backbone, k_input, k_noise, k_output)
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
    size = student.prompts.image_size
    guidance = f", {facts.no_guidance}" if facts.no_guidance else ""
    call = f'pipe("a prompt", num_inference_steps=1{guidance}, height={size[0]}, width={size[1]})'
    return pipeline, call


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
