"""``SD3Transformer2DModel``: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.networks.backbones.base import (
    Backbone,
    BackboneFamily,
    BaseVersion,
    PipelineFacts,
    longest_prompt,
    register_family,
    set_shifted,
    tensors,
)
from flowdistill.paths.scheduler_protocol import Scheduler


@register_family
class StableDiffusion3Family(BackboneFamily):
    backbone_class = "SD3Transformer2DModel"
    pipelines = {"StableDiffusion3Pipeline": PipelineFacts(lora_names="diffusers")}

    def base_version(self, network: Backbone, prediction: str) -> BaseVersion | None:
        sizes = {(24, False): "m", (24, True): "5-medium", (38, False): "5-large"}
        size = sizes.get((network.config.num_layers, bool(network.config.dual_attention_layers)))
        whole = network.config.attention_head_dim == 64 and network.config.num_attention_heads in (24, 38)
        return None if size is None or not whole else BaseVersion(f"stable-diffusion-3-{size}", "sd3")

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        return network(x, timestep=timestep, encoder_hidden_states=given["prompt_embeds"],
                       pooled_projections=given["pooled_embeds"], return_dict=False)[0]

    def sample_size(self, network: Backbone, pipeline: str, shape: Sequence[int]) -> int | list[int] | None:
        # With the largest size the position embeddings are weights, and do not depend on this one.
        kept = network.config.pos_embed_max_size is not None
        return shape[-1] if kept and shape[-1] == shape[-2] else None

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.time_text_embed.timestep_embedder]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.pos_embed.proj, network.proj_out

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {"prompt_embeds": (clip_tokens + longest_prompt(pipeline), config.joint_attention_dim),
                "pooled_embeds": (config.pooled_projection_dim,)}

    def set_timesteps(self, scheduler: Scheduler, steps: int, shape: Sequence[int]) -> None:
        set_shifted(scheduler, steps, shape[1] // 2 * (shape[2] // 2), max_shift=1.16, sigmas=False)
