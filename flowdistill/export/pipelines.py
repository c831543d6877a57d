"""A one-step student as a stock diffusers pipeline: every constant folds into a weight, nothing custom remains.

The student's one call is affine in noise and in the network's output,

    latents = k_noise * n + k_output * network(k_input * n, constant time, constant embeddings),

so the time embedding becomes its own constant (in the bias of its last layer), ``k_input`` and ``k_output`` go into
the first and the last layer, and a stock scheduler's single step supplies ``k_noise``.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiTPipeline,
    FlowMapEulerDiscreteScheduler,
)
from torch import nn

from flowdistill.export.folding import fold_scales
from flowdistill.export.lora import save_lora
from flowdistill.export.prompt_pipelines import prompt_pipeline
from flowdistill.networks.backbones import last_linear
from flowdistill.networks.lora import merged
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.students.student import Student
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import portable_path


@functools.singledispatch
def export(student: Student, folder: str | os.PathLike[str], guidance_scale: float | None = None) -> Path:
    """Write ``student`` as a pipeline folder that ``DiffusionPipeline.from_pretrained`` loads without flowdistill.

    ``UNet2DModel`` becomes a ``ConsistencyModelPipeline``, ``DiTTransformer2DModel`` a ``DiTPipeline`` (call it with
    ``guidance_scale=1``), a text-to-image student a pipeline of its teacher's class; all sample with
    ``num_inference_steps=1``. The folder's README.md says how to call it. Adapters are merged into the weights; where
    the teacher's pipeline takes LoRA files, the folder has one too (:mod:`flowdistill.export.lora`).
    ``export.register`` adds what another kind of student becomes.

    Args:
        student: on a diffusers backbone.
        folder: where to write; must not exist or be empty.
        guidance_scale: the scale to freeze into the weights; None for the student's default.

    Raises:
        UserError: the folder is not empty, or this student cannot be folded (the message says why).
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; give a new folder for the exported pipeline")
    if not isinstance(student.network, ExtendedVelocity):
        raise UserError("only students on a diffusers backbone can be exported")
    if student.network.velocity.path.kind == "ve":
        raise UserError("students of KarrasVe teachers cannot be exported: their network takes pixels in [0, 1], and "
                        "no stock pipeline moves the input of its single step there")
    backbone = _with_constant_time(student, guidance_scale)
    c = student.network.velocity.path.coefficients(torch.tensor([student.t_start], dtype=torch.float64))
    t, state, output = student.t_start, c.state.item(), c.output.item()
    k_input, k_noise, k_output = t * c.input_scale.item(), t * (1 - t * state), -t * output
    if student.prompts is not None:
        pipeline, call = prompt_pipeline(student, backbone, k_input, k_noise, k_output)
    elif student.network.velocity.family.student_pipeline == "ConsistencyModelPipeline":
        pipeline = _consistency_pipeline(student, backbone, k_input, k_noise, k_output)
        call = "pipe(batch_size=4, num_inference_steps=1)"
        if student.num_classes is not None:
            call = "pipe(batch_size=4, num_inference_steps=1, class_labels=[0, 1, 2, 3])"
    else:
        pipeline = _dit_pipeline(student, backbone, k_input, k_noise, k_output)
        call = "pipe(class_labels=[0, 1, 2, 3], num_inference_steps=1, guidance_scale=1)"
    pipeline.save_pretrained(target)
    card = _card(student, call, guidance_scale) + (save_lora(student, target, guidance_scale) or "")
    (target / "README.md").write_text(card, encoding="utf-8")
    return target


@torch.no_grad()
def _with_constant_time(student: Student, guidance_scale: float | None) -> nn.Module:
    """The backbone with its whole time embedding, extra conditions included, frozen at the student's one time."""
    network = student.network
    scalars = student.scalars(guidance_scale)
    captured: dict[int, torch.Tensor] = {}
    modules = network.velocity.family.constant_embeddings(network.velocity.backbone)
    handles = [
        module.register_forward_hook(lambda m, args, out, i=i: captured.__setitem__(i, out[0].clone()))
        for i, module in enumerate(modules)
    ]
    try:
        device = student.device
        noise = torch.zeros(1, *student.shape, device=device)
        condition = student.examples([0])
        columns = {name: torch.full((1,), float(value), device=device) for name, value in scalars.items()}
        network(noise, torch.full((1,), student.t_start, dtype=torch.float64, device=device), condition, **columns)
    finally:
        for handle in handles:
            handle.remove()
    backbone = merged(network.velocity.backbone)
    for i, module in enumerate(network.velocity.family.constant_embeddings(backbone)):
        module._forward_hooks.clear()  # the hook that adds the extra embedding: it is in the constant now
        layer = last_linear(module)
        layer.weight.zero_()
        layer.bias.copy_(captured[i])
    return backbone


def _consistency_pipeline(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> ConsistencyModelPipeline:
    # One step of this scheduler is c_skip * (sigma n) + c_out * network(sigma n / root). With sigma_data equal to
    # sigma - sigma_min, c_skip is 1/2, so sigma = 2 k_noise supplies any positive k_noise. For k_noise = 0 (sample
    # prediction) a tiny sigma_data makes c_skip vanish.
    if k_noise > 1e-6:
        sigma = 2 * k_noise
        # A power of two: the scheduler takes sqrt(float32(sigma_min)^2 - sigma_min^2), NaN if that rounds below 0.
        sigma_min = 2.0 ** math.floor(math.log2(sigma) - 10)
        data = sigma - sigma_min
    else:
        sigma, sigma_min, data = 1.0, 2.0**-10, 1e-5
    root = (sigma**2 + data**2) ** 0.5
    fold_scales(student, backbone, k_input * root / sigma, k_output * root / ((sigma - sigma_min) * data))
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=2, sigma_min=sigma_min, sigma_max=sigma, sigma_data=data, clip_denoised=False
    )
    return ConsistencyModelPipeline(unet=backbone, scheduler=scheduler)


def _dit_pipeline(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> DiTPipeline:
    if not isinstance(student.codec, VaeCodec):
        raise UserError("a DiTPipeline needs an autoencoder, and this student has none")
    scheduler: Any
    if abs(k_noise - 1) < 1e-9:  # flow matching: n - network
        scheduler = FlowMapEulerDiscreteScheduler()
        fold_scales(student, backbone, k_input, -k_output)
    else:
        # A one-entry DDIM schedule: x_0 = (n - sigma network) / alpha (epsilon) for k_noise > 1, and
        # x_0 = alpha n - sigma network (v_prediction) below.
        alpha = 1 / k_noise if k_noise > 1 else k_noise
        sigma = (1 - alpha**2) ** 0.5
        scheduler = DDIMScheduler(
            num_train_timesteps=1,
            trained_betas=[1 - alpha**2],
            prediction_type="epsilon" if k_noise > 1 else "v_prediction",
            clip_sample=False,
        )
        gain = sigma / alpha if k_noise > 1 else sigma
        fold_scales(student, backbone, k_input, -k_output / gain)
    return DiTPipeline(transformer=backbone, vae=student.codec.vae, scheduler=scheduler)


def _card(student: Student, call: str, guidance_scale: float | None) -> str:
    info = student.info
    scale = info.guidance_scale if guidance_scale is None else guidance_scale
    base = portable_path(info.base_model) or "a diffusers pipeline"
    return (
        "# A one-step generator\n\n"
        f"Distilled with {info.method or 'flowdistill'} from {base}. "
        f"One network call an image; guidance scale {scale} is part of the weights.\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")\nimages = {call}.images\n```\n'
    )
