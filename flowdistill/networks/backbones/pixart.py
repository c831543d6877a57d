"""``PixArtTransformer2DModel``: PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.networks.backbones.base import (
    Backbone,
    BackboneFamily,
    PipelineFacts,
    longest_prompt,
    register_family,
    tensors,
)


@register_family
class PixArtFamily(BackboneFamily):
    backbone_class = "PixArtTransformer2DModel"
    pipelines = dict.fromkeys(("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
                              PipelineFacts(scaled_noise=True, seeded_steps=True))
    masked = True

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            size = given["image_size"]
            added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        out = network(x, encoder_hidden_states=given["prompt_embeds"], encoder_attention_mask=given["attention_mask"],
                      timestep=timestep, added_cond_kwargs=added, return_dict=False)[0]
        return out[:, : x.shape[1]]

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.adaln_single.emb.timestep_embedder]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.pos_embed.proj, network.proj_out

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        length = longest_prompt(pipeline)
        return {"prompt_embeds": (length, network.config.caption_channels), "attention_mask": (length,),
                "image_size": (2,)}

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipeline.text_encoder.device,
            clean_caption=is_bs4_available() and is_ftfy_available(),  # as the pipeline's call, but without its warning
        )
        size = torch.tensor([image_size], dtype=embeds.dtype).repeat(len(prompts), 1)
        return {"prompt_embeds": embeds, "attention_mask": mask, "image_size": size}
