"""``UNet2DConditionModel``: Stable Diffusion 1.x, 2.x and Turbo, latent consistency models, and SDXL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.text_pipeline import Pipeline, TwoEncoderPipeline
from flowdistill.networks.backbones.base import (
    Backbone,
    BackboneFamily,
    BaseVersion,
    PipelineFacts,
    Sizes,
    convolutional_sizes,
    guidance_of,
    register_family,
    tensors,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import JsonObject


@register_family
class StableDiffusionFamily(BackboneFamily):
    backbone_class = "UNet2DConditionModel"
    pipelines = {
        # It noises what a first step has made; Stable Diffusion's own does not.
        "LatentConsistencyModelPipeline": PipelineFacts(scaled_noise=True, exported_as="StableDiffusionPipeline"),
        "StableDiffusionPipeline": PipelineFacts(scaled_noise=True, seeded_steps=True, lora_names="kohya"),
        "StableDiffusionXLPipeline": PipelineFacts(scaled_noise=True, seeded_steps=True, lora_names="kohya"),
    }
    guided = "classifier-free; of latent consistency models an input of the network"

    def base_version(self, network: Backbone, prediction: str) -> BaseVersion | None:
        config = network.config
        if list(config.block_out_channels)[:3] != [320, 640, 1280]:
            return None
        if config.addition_embed_type is not None:
            return BaseVersion("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
        v = prediction == "v_prediction"
        if config.cross_attention_dim == 1024:
            return BaseVersion(f"stable-diffusion-v2-{'768-v' if v else '512'}", "sd_v2_v" if v else "sd_v2")
        return BaseVersion("stable-diffusion-v1", "sd_v1")

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        width, guidance = network.config.time_cond_proj_dim, None
        if width is not None:
            scale = guidance_of(condition, x) - 1
            guidance = get_timestep_embedding(scale, width, downscale_freq_shift=1, scale=1000).to(x.dtype)
        added = None
        if network.config.addition_embed_type == "text_time":
            added = {"text_embeds": given["pooled_embeds"], "time_ids": given["time_ids"]}
        return network(x, timestep, encoder_hidden_states=given["prompt_embeds"], timestep_cond=guidance,
                       added_cond_kwargs=added, return_dict=False)[0]

    def labels(self, network: Backbone, null_label: int | None) -> ClassLabels | None:
        config = network.config
        if config.addition_embed_type not in (None, "text_time"):
            raise UserError(f"the UNet2DConditionModel has addition_embed_type '{config.addition_embed_type}'; "
                            "supported are none (Stable Diffusion) and 'text_time' (SDXL)")
        for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if config.get(key) is not None:
                raise UserError(f"the UNet2DConditionModel has {key} {config.get(key)!r}; supported are networks that "
                                "take a prompt only")
        return super().labels(network, null_label)

    def sample_size(self, network: Backbone, pipeline: str, shape: Sequence[int]) -> int | list[int] | None:
        height, width = shape[-2:]
        if height == width:
            return height
        return [height, width] if pipeline == "StableDiffusionPipeline" else None  # SDXL's multiplies it by a number

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.time_embedding]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.conv_in, network.conv_out

    def takes_guidance(self, network: Backbone) -> bool:
        return network.config.time_cond_proj_dim is not None

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        common = {"device": pipeline.text_encoder_2.device if _is_xl(pipeline) else pipeline.text_encoder.device,
                  "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if not _is_xl(pipeline):
            return {"prompt_embeds": pipeline.encode_prompt(prompts, **common)[0]}
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, **common)
        # Original size, crop and target size: the picture's own, not cropped.
        ids = torch.tensor([*image_size, 0, 0, *image_size], dtype=embeds.dtype).repeat(len(prompts), 1)
        return {"prompt_embeds": embeds, "pooled_embeds": pooled, "time_ids": ids}

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        config = network.config
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (clip_tokens, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            ids = 6 * config.addition_time_embed_dim
            shapes |= {"pooled_embeds": (config.projection_class_embeddings_input_dim - ids,), "time_ids": (6,)}
        return shapes

    def encode_null(self, pipeline: Pipeline, negative: str | None, image_size: tuple[int, int]) -> dict[str, Tensor]:
        row = super().encode_null(pipeline, negative, image_size)
        if negative is None and _is_xl(pipeline) and pipeline.config["force_zeros_for_empty_prompt"]:
            row |= {name: torch.zeros_like(row[name]) for name in ("prompt_embeds", "pooled_embeds")}
        return row

    def sizes(self, config: JsonObject) -> Sizes:
        """There ``attention_head_dim`` is the number of heads (diffusers), one or one a block."""
        if config["num_attention_heads"] is not None or isinstance(config["layers_per_block"], (list, tuple)):
            raise UserError("the teacher's UNet2DConditionModel has num_attention_heads or a number of layers for each "
                            "block; give the student's settings in method.student_shape")
        channels, heads = config["block_out_channels"], config["attention_head_dim"]
        groups = config["norm_num_groups"] or 1
        if isinstance(heads, int):  # the same heads, thinner
            return convolutional_sizes(config, math.lcm(groups, heads), lambda widths: {})
        size = math.lcm(*{width // count for width, count in zip(channels, heads, strict=True)})
        # Fewer heads, as wide as they were.
        return convolutional_sizes(config, math.lcm(groups, size),
                                   lambda widths: {"attention_head_dim": [width // size for width in widths]})


def _is_xl(pipeline: Pipeline) -> TypeGuard[TwoEncoderPipeline]:
    return type(pipeline).__name__ == "StableDiffusionXLPipeline"
