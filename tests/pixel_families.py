"""Tiny random pipelines without prompts, and what their own calls start from."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeOutput
from torch import Tensor

from tests.tiny import VP, lively, network, tiny_unet, vae


def ddim() -> diffusers.DDIMPipeline:
    return diffusers.DDIMPipeline(lively(tiny_unet(num_class_embeds=None)), DDIMScheduler(**VP))


def edm(prediction: str = "epsilon", classes: int | None = None) -> diffusers.DDPMPipeline:
    scheduler = EDMEulerScheduler(sigma_min=0.02, sigma_max=20.0, prediction_type=prediction)
    return diffusers.DDPMPipeline(lively(tiny_unet(num_class_embeds=classes)), scheduler)


def karras_ve() -> diffusers.KarrasVePipeline:
    unet = lively(tiny_unet(num_class_embeds=None, channels=3, time_embedding_type="fourier"))
    return diffusers.KarrasVePipeline(unet, diffusers.KarrasVeScheduler(sigma_min=0.2, sigma_max=3.0))


class FirstOrder(diffusers.KarrasVeScheduler):
    """Without churn, and without the correction to second order, which depends on the coordinates."""

    def step_correct(self, model_output: Tensor, sigma: Any, after: Any, x: Tensor, end: Tensor, slope: Tensor) -> Any:
        return KarrasVeOutput(prev_sample=end, derivative=slope)


def first_order(pipeline: Any) -> FirstOrder:
    return FirstOrder.from_config(pipeline.scheduler.config, s_churn=0.0)


def karras_start(teacher: Any) -> float:
    """Its pipeline's noise levels are squares of the scheduler's settings, but its start state is not."""
    return 1 / teacher.scheduler.config.sigma_max


def dit(**scheduler: Any) -> diffusers.DiTPipeline:
    transformer = network(
        diffusers.DiTTransformer2DModel,
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )
    settings = VP | {"clip_sample": False} | scheduler  # as in the published DiT's
    return diffusers.DiTPipeline(transformer, vae(), DDIMScheduler(**settings), id2label={0: "zero"})


def sit() -> diffusers.DiTPipeline:
    """What scripts/convert_sit.py writes."""
    pipeline = dit()
    pipeline.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    return pipeline


def trailing_ddim(pipeline: Any) -> DDIMScheduler:
    """Clipping or not as its own scheduler does."""
    return DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")


def ddim_start(teacher: Any) -> float:
    """DDIM starts at the noise itself, not at sigma_T times it."""
    return 1 / teacher.path.alpha_sigma(torch.tensor(teacher.t_max))[1].item()


def edm_start(teacher: Any) -> float:
    """EDMEulerScheduler starts at sqrt(sigma_max^2 + 1) times the noise, not at sigma_max times it."""
    sigma = teacher.t_max / (1 - teacher.t_max)
    return (sigma**2 + 1) ** 0.5 / sigma


@torch.no_grad()
def scheduler_images(
    pipeline: Any, noise: Tensor, steps: int, scale: float, labels: list[int] | None, null_label: int | None
) -> Tensor:
    """The loop over a stock scheduler: scale the input, ask the network, step; guidance on what the network returns."""
    scheduler = pipeline.scheduler
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    flow = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    # Even steps to 0 are SiT's own; by itself the scheduler's last but one sigma is 0.001.
    scheduler.set_timesteps(**({"sigmas": [1 - i / steps for i in range(steps)]} if flow else
                               {"num_inference_steps": steps}), device=noise.device)
    sample = noise if flow else noise * scheduler.init_noise_sigma
    given = None if labels is None else torch.tensor(labels, device=noise.device)

    def ask(x: Tensor, t: Tensor, classes: Tensor | None) -> Tensor:
        return network(x, t.expand(len(x)), class_labels=classes).sample[:, : x.shape[1]]

    for t in scheduler.timesteps:
        scaled = sample if flow else scheduler.scale_model_input(sample, t)
        output = ask(scaled, t, given)
        if given is not None and scale != 1:
            null = ask(scaled, t, torch.full_like(given, null_label))
            output = null + scale * (output - null)
        sample = scheduler.step(output, t, sample).prev_sample
    if hasattr(pipeline, "vae"):
        sample = pipeline.vae.decode(sample / pipeline.vae.config.scaling_factor).sample
    return (sample / 2 + 0.5).clamp(0, 1)
