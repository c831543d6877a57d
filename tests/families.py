"""Tiny random text-to-image pipelines of real diffusers classes, made in memory; nothing is downloaded."""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.pixel_families import (
    ddim,
    ddim_start,
    dit,
    edm,
    edm_start,
    first_order,
    karras_start,
    karras_ve,
    scheduler_images,
    sit,
    trailing_ddim,
)
from tests.tiny import VP, built_once, lively, network, vae

PROMPTS = ["a red cat", "two birds", "the sea at night"]
NEGATIVE = "ugly"


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
        image_size: of the teacher, where the network has no size of its own.
        labels: class labels of two samples, for pipelines without prompts; their calls return images only.
        start: the pipeline's start state for unit noise in units of the teacher's, t_max times the noise.
        null_label: of the teacher, where the network has class labels that do not say it.
        loop: no pipeline of diffusers calls such a network: the comparison is with its scheduler, in a plain loop.
    """

    make: Callable[[], Any]
    scheduler: Callable[[Any], Any] | None = None
    guidance: float = 3.0
    call: dict[str, Any] = field(default_factory=dict)
    scale_argument: Callable[[float], dict[str, Any]] = lambda scale: {"guidance_scale": scale}
    pack: Callable[[Tensor], Tensor] = lambda latents: latents
    unpack: Callable[[Tensor], Tensor] = lambda latents: latents
    negative: bool = True
    image_size: int | list[int] | None = None
    labels: list[int] | None = None
    start: Callable[[Any], float] = lambda teacher: 1.0
    null_label: int | None = None
    loop: bool = False

    def sized(self, height: int, width: int, shape: tuple[int, ...]) -> Family:
        """The same at another size in pixels, at which samples have ``shape`` (C, H, W)."""
        def image(tokens: Tensor) -> Tensor:
            return diffusers.FluxPipeline._unpack_latents(tokens, 2 * shape[-2], 2 * shape[-1], 2)

        return replace(self, image_size=[height, width], call=self.call | {"height": height, "width": width},
                       unpack=image if self.pack is tokens else self.unpack)

    @functools.cached_property
    def prompts(self) -> bool:
        return "prompt" in inspect.signature(self.make().__call__).parameters


def clip_tokenizer() -> CLIPTokenizer:
    tokens = list(string.ascii_lowercase) + [f"{letter}</w>" for letter in string.ascii_lowercase]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


@built_once()
def clip_encoder(seed: int, projected: bool = False, **config: Any) -> nn.Module:
    settings = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, **config,
    )
    return lively((CLIPTextModelWithProjection if projected else CLIPTextModel)(settings), seed)


@built_once()
def condition_unet(cross: int = 16, **config: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": cross,
    }
    return lively(UNet2DConditionModel(**settings | config))


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


def t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    scores = [(token, 0.0 if i < 3 else -float(i)) for i, token in enumerate(tokens)]
    tokenizer = T5Tokenizer(vocab=scores, extra_ids=0)
    tokenizer.chat_template = "{% for m in messages %}say {{ m.content }}{% endfor %} now"
    return tokenizer


@built_once()
def t5_encoder(width: int = 32) -> T5EncoderModel:
    return lively(T5EncoderModel(T5Config(
        vocab_size=30, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
    )), 3)


@built_once()
def gemma() -> Gemma2Model:
    return lively(Gemma2Model(Gemma2Config(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )), 4)


def sd3() -> diffusers.StableDiffusion3Pipeline:
    transformer = network(
        diffusers.SD3Transformer2DModel,
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(shift_factor=0.06),
        text_encoder=clip_encoder(1, projected=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(2, projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(), tokenizer_3=t5_tokenizer(),
    )


def flux(guidance: bool = True) -> diffusers.FluxPipeline:
    transformer = network(
        diffusers.FluxTransformer2DModel,
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=4, max_image_seq_len=32,
    )
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae(shift_factor=0.1), text_encoder=clip_encoder(1),
        tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
    )


def pixart(alpha: bool = False) -> diffusers.PixArtSigmaPipeline | diffusers.PixArtAlphaPipeline:
    # The pipeline of PixArt-alpha tells networks with 128 x 128 latents, and no others, their resolution.
    size = {"sample_size": 128, "patch_size": 16} if alpha else {"sample_size": 8, "patch_size": 2}
    transformer = network(
        diffusers.PixArtTransformer2DModel,
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=32, use_additional_conditions=alpha, **size,
    )
    kind = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    return kind(tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=vae(mid_block_add_attention=not alpha),
                transformer=transformer, scheduler=DPMSolverMultistepScheduler(**VP))


def sana() -> diffusers.SanaPipeline:
    transformer = network(
        diffusers.SanaTransformer2DModel,
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, patch_size=1,
    )
    blocks = {"block_types": ("ResBlock",) * 3, "block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1),
              "qkv_multiscales": ((), (), ())}
    autoencoder = network(
        diffusers.AutoencoderDC,
        latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate",
        scaling_factor=0.41, **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
                                blocks.items()},
    )
    return diffusers.SanaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=gemma(), vae=autoencoder, transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    )


def lumina2() -> diffusers.Lumina2Pipeline:
    transformer = network(
        diffusers.Lumina2Transformer2DModel,
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), cap_feat_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
                                                base_image_seq_len=2, max_image_seq_len=8)
    return diffusers.Lumina2Pipeline(transformer=transformer, scheduler=scheduler, vae=vae(shift_factor=0.1),
                                     text_encoder=gemma(), tokenizer=t5_tokenizer())


@built_once()
def qwen_text() -> Qwen2_5_VLForConditionalGeneration:
    text = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 10000.0,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return lively(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)), 5)


def qwen_image() -> diffusers.QwenImagePipeline:
    transformer = network(
        diffusers.QwenImageTransformer2DModel,
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )
    autoencoder = network(
        diffusers.AutoencoderKLQwenImage,
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, 0.2, -0.1, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=4, max_image_seq_len=32,
        shift_terminal=0.02, time_shift_type="exponential",
    )
    return diffusers.QwenImagePipeline(transformer=transformer, scheduler=scheduler, vae=autoencoder,
                                       text_encoder=qwen_text(), tokenizer=t5_tokenizer())


@built_once()
def qwen3() -> Qwen3Model:
    return lively(Qwen3Model(Qwen3Config(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1,
    )), 6)


def z_image() -> diffusers.ZImagePipeline:
    transformer = network(
        diffusers.ZImageTransformer2DModel,
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(shift_factor=0.1),
                                    text_encoder=qwen3(), tokenizer=t5_tokenizer(), transformer=transformer)


class EvenFlowEuler(FlowMatchEulerDiscreteScheduler):
    """Its first order, at the times of the DPM solver that Sana's pipeline has, which are even before the shift."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **settings: Any) -> None:
        even = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(sigmas=even, device=device, **settings)


def flow_euler(pipeline: Any) -> EvenFlowEuler:
    return EvenFlowEuler(shift=3.0)


# Flux and Qwen-Image pack patches of 2 x 2 latents into tokens; diffusers has no public name for it.
def tokens(latents: Tensor) -> Tensor:
    return diffusers.FluxPipeline._pack_latents(latents, *latents.shape)


def image(tokens: Tensor) -> Tensor:
    return diffusers.FluxPipeline._unpack_latents(tokens, 16, 16, 2)


def trailing_euler(pipeline: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")


def edm_euler() -> EDMEulerScheduler:
    return EDMEulerScheduler(sigma_min=0.02, sigma_max=20.0, prediction_type="epsilon")


FAMILIES: dict[str, Family] = {
    "ddim": Family(ddim, trailing_ddim, scale_argument=lambda scale: {}, negative=False, start=ddim_start),
    "dit": Family(dit, trailing_ddim, negative=False, labels=[3, 7], start=ddim_start),
    "sit": Family(sit, negative=False, labels=[3, 7], null_label=1000, loop=True),
    "edm": Family(edm, scale_argument=lambda scale: {}, negative=False, start=edm_start, loop=True),
    "edm-class": Family(lambda: edm("v_prediction", 4), negative=False, labels=[0, 2], start=edm_start, null_label=3,
                        loop=True),
    "karras-ve": Family(karras_ve, first_order, scale_argument=lambda scale: {}, negative=False, start=karras_start),
    "sd": Family(stable_diffusion, trailing_euler),
    "sd-v": Family(lambda: stable_diffusion(DDIMScheduler(**VP, clip_sample=False, prediction_type="v_prediction",
                                                          steps_offset=1)), trailing_euler),
    "sd-turbo": Family(lambda: stable_diffusion(EulerDiscreteScheduler(**VP, timestep_spacing="trailing"))),
    "lcm": Family(lambda: stable_diffusion(time_cond_proj_dim=8), trailing_euler, guidance=7.5, negative=False),
    "sd-ddim": Family(stable_diffusion, trailing_ddim, start=ddim_start),
    "sdxl": Family(sdxl, trailing_euler),
    "sdxl-edm": Family(lambda: sdxl(edm_euler()), start=edm_start),
    "pixart-sigma": Family(pixart, trailing_euler, guidance=1.5, call={"use_resolution_binning": False}),
    "pixart-alpha": Family(lambda: pixart(alpha=True), trailing_euler, call={"use_resolution_binning": False}),
    "sd3": Family(sd3),
    "flux-dev": Family(
        flux, pack=tokens, unpack=image, image_size=16, call={"height": 16, "width": 16}, negative=False,
    ),
    "flux-schnell": Family(
        lambda: flux(guidance=False), pack=tokens, unpack=image, image_size=16, call={"height": 16, "width": 16},
        scale_argument=lambda scale: {"true_cfg_scale": scale, "negative_prompt": [""] * 2},
    ),
    "sana": Family(sana, flow_euler, call={"height": 32, "width": 32, "use_resolution_binning": False}),
    "lumina2": Family(lumina2, call={"height": 64, "width": 64}),
    "qwen-image": Family(
        qwen_image, pack=tokens, unpack=image, image_size=32, call={"height": 32, "width": 32},
        scale_argument=lambda scale: {"true_cfg_scale": scale, "negative_prompt": [""] * 2},
    ),
    "z-image": Family(z_image, image_size=16, call={"height": 16, "width": 16},
                      scale_argument=lambda scale: {"guidance_scale": scale - 1}),
}


# Of which only the samples are compared: what else there is depends on no clipping ("ddim" clips, by default).
CLIPPED: dict[str, Family] = {
    "dit-clip": Family(lambda: dit(clip_sample=True, clip_sample_range=0.6), trailing_ddim, negative=False,
                       labels=[3, 7], start=ddim_start),
    "dit-threshold": Family(lambda: dit(thresholding=True, sample_max_value=1.5), trailing_ddim, negative=False,
                            labels=[3, 7], start=ddim_start),
}


def pipeline_latents(
    pipeline: Any, family: Family, noise: Tensor, steps: int, scale: float, negative: str | None = None,
    output: str = "latent",
) -> Tensor:
    """What the pipeline's own call makes of unit noise (B, C, H, W), which is that of a generator with seed 1: latents,
    or images where it takes no prompts."""
    pipeline.set_progress_bar_config(disable=True)
    if family.loop:
        return scheduler_images(pipeline, noise, steps, scale, family.labels, family.null_label)
    if family.scheduler is not None:
        pipeline.scheduler = family.scheduler(pipeline)
    if not family.prompts:
        rows = {"batch_size": len(noise)} if family.labels is None else {"class_labels": family.labels}
        images = pipeline(**rows, generator=torch.Generator().manual_seed(1), num_inference_steps=steps,
                          output_type="pt", **family.scale_argument(scale)).images
        return images if isinstance(images, Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)  # KarrasVe
    prompts = PROMPTS[: len(noise)]
    given = family.scale_argument(scale) | ({} if negative is None else {"negative_prompt": [negative] * len(noise)})
    out = pipeline(prompt=prompts, latents=family.pack(noise.clone()), num_inference_steps=steps, output_type=output,
                   **given, **family.call)
    return family.unpack(out.images) if output == "latent" else out.images


