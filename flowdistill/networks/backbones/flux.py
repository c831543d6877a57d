"""``FluxTransformer2DModel``: FLUX.1, with guidance as an input (dev) or without (schnell)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.networks.backbones.base import (
    PACKED,
    Backbone,
    BackboneFamily,
    BaseVersion,
    PipelineFacts,
    guidance_of,
    longest_prompt,
    packed,
    register_family,
    set_shifted,
    tensors,
    unpacked,
)
from flowdistill.objectives.guidance import kept_norm
from flowdistill.paths.scheduler_protocol import Scheduler

DEFAULT_SIZE = 128  # of the pipeline, in latents: the network has no size of its own


@register_family
class FluxFamily(BackboneFamily):
    backbone_class = "FluxTransformer2DModel"
    pipelines = {"FluxPipeline": PipelineFacts(no_guidance="", even_times=True, rounded_times=True,
                                               lora_names="diffusers")}
    guided = "an input of the network (dev), or none (schnell)"

    def base_version(self, network: Backbone, prediction: str) -> BaseVersion | None:
        config = network.config
        if (config.num_layers, config.num_single_layers, config.num_attention_heads) != (19, 38, 24):
            return None
        return BaseVersion("flux-1-dev" if config.guidance_embeds else "flux-1-schnell", "flux1")

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        places = torch.zeros(height, width, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(height, device=x.device)[:, None]
        places[..., 2] = torch.arange(width, device=x.device)
        tokens = network(
            packed(x),
            timestep=timestep / 1000,
            guidance=guidance_of(condition, x) if self.takes_guidance(network) else None,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_embeds"],
            txt_ids=torch.zeros(given["prompt_embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=places.reshape(-1, 3),
            return_dict=False,
        )[0]
        return unpacked(tokens, x.shape)

    def shape(self, network: Backbone) -> tuple[int, int, int]:
        return network.config.in_channels // 4, DEFAULT_SIZE, DEFAULT_SIZE

    def divisor(self, network: Backbone) -> tuple[int, str]:
        return PACKED

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.time_text_embed.timestep_embedder]

    def constant_embeddings(self, network: Backbone) -> list[nn.Module]:
        guidance = [network.time_text_embed.guidance_embedder] if self.takes_guidance(network) else []
        return self.time_embeddings(network) + guidance

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.x_embedder, network.proj_out

    def output_channels(self, network: Backbone) -> int:
        return super().output_channels(network) // 4

    def takes_guidance(self, network: Backbone) -> bool:
        return bool(network.config.guidance_embeds)

    @staticmethod
    def keep_norm(guided: Tensor, conditional: Tensor, kind: str) -> Tensor:
        return unpacked(kept_norm(packed(guided), packed(conditional), kind), guided.shape)

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=pipeline.text_encoder.device)
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {"prompt_embeds": (longest_prompt(pipeline), config.joint_attention_dim),
                "pooled_embeds": (config.pooled_projection_dim,)}

    def set_timesteps(self, scheduler: Scheduler, steps: int, shape: Sequence[int]) -> None:
        set_shifted(scheduler, steps, shape[1] // 2 * (shape[2] // 2))
