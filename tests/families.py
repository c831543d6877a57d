"""Tiny random text-to-image pipelines of real diffusers classes, made in memory; nothing is downloaded."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPTS = ["a red cat", "two birds", "the sea at night"]
NEGATIVE = "ugly"
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@dataclass
class Family:
    """A pipeline and how its own call is compared with flowdistill.

    Attributes:
        make: the pipeline.
        scheduler: the deterministic one its call is compared with; None: the pipeline's own.
        guidance: of guided samples, in flowdistill's sense.
        call: further arguments of the pipeline's call.
        scale_argument: name and value of the pipeline's argument for a guidance scale in flowdistill's sense.
        pack, unpack: latents (B, C, H, W) to and from what the pipeline's call takes and returns.
        negative: whether the pipeline's call takes a negative prompt.
    """

    make: Callable[[], Any]
    scheduler: Callable[[Any], Any] | None = None
    guidance: float = 3.0
    call: dict[str, Any] = field(default_factory=dict)
    scale_argument: Callable[[float], dict[str, Any]] = lambda scale: {"guidance_scale": scale}
    pack: Callable[[Tensor], Tensor] = lambda latents: latents
    unpack: Callable[[Tensor], Tensor] = lambda latents: latents
    negative: bool = True


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no zero-initialised layer hides a condition."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5, generator=generator)
            elif not name.endswith("weight"):
                parameter.normal_(std=0.1, generator=generator)
    return module.eval()


def clip_tokenizer() -> CLIPTokenizer:
    tokens = list(string.ascii_lowercase) + [f"{letter}</w>" for letter in string.ascii_lowercase]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def clip_encoder(seed: int, projected: bool = False, **config: Any) -> nn.Module:
    settings = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, **config,
    )
    return lively((CLIPTextModelWithProjection if projected else CLIPTextModel)(settings), seed)


def vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    return lively(AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    ))


def condition_unet(cross: int = 16, **config: Any) -> UNet2DConditionModel:
    return lively(UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4, cross_attention_dim=cross, attention_head_dim=4, **config,
    ))


def stable_diffusion(scheduler: Any = None, **unet: Any) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_encoder(1), tokenizer=clip_tokenizer(), unet=condition_unet(**unet),
        scheduler=scheduler or DDIMScheduler(**VP, clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )


def sdxl(scheduler: Any = None, zeros: bool = True) -> diffusers.StableDiffusionXLPipeline:
    unet = condition_unet(
        cross=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4, use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13), text_encoder=clip_encoder(1), text_encoder_2=clip_encoder(2, projected=True),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=unet, force_zeros_for_empty_prompt=zeros,
        scheduler=scheduler or EulerDiscreteScheduler(**VP, timestep_spacing="leading", steps_offset=1),
    )


def trailing_euler(pipeline: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")


FAMILIES: dict[str, Family] = {
    "sd": Family(stable_diffusion, trailing_euler),
    "sd-v": Family(lambda: stable_diffusion(DDIMScheduler(**VP, clip_sample=False, prediction_type="v_prediction",
                                                          steps_offset=1)), trailing_euler),
    "sd-turbo": Family(lambda: stable_diffusion(EulerDiscreteScheduler(**VP, timestep_spacing="trailing"))),
    "lcm": Family(lambda: stable_diffusion(time_cond_proj_dim=8), trailing_euler, guidance=7.5, negative=False),
    "sdxl": Family(sdxl, trailing_euler),
}


def pipeline_latents(
    pipeline: Any, family: Family, noise: Tensor, steps: int, scale: float, negative: str | None = None
) -> Tensor:
    """Latents of the pipeline's own call from unit noise (B, C, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    if family.scheduler is not None:
        pipeline.scheduler = family.scheduler(pipeline)
    prompts = PROMPTS[: len(noise)]
    given = {} if negative is None else {"negative_prompt": [negative] * len(noise)}
    out = pipeline(prompt=prompts, latents=family.pack(noise.clone()), num_inference_steps=steps, output_type="latent",
                   **given, **family.scale_argument(scale), **family.call)
    return family.unpack(out.images)
