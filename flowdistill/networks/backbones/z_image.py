"""``ZImageTransformer2DModel``: Z-Image.

The pipeline's ``guidance_scale`` counts from 0: this g is its value plus 1.
"""

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
    PipelineFacts,
    longest_prompt,
    register_family,
    set_shifted,
    tensors,
)
from flowdistill.paths.scheduler_protocol import Scheduler

DEFAULT_SIZE = 128  # of the pipeline, in latents


@register_family
class ZImageFamily(BackboneFamily):
    backbone_class = "ZImageTransformer2DModel"
    pipelines = {"ZImagePipeline": PipelineFacts("guidance_scale=0", even_times=True, lora_names="diffusers")}
    masked = True
    ragged = True

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        lengths = given["attention_mask"].sum(dim=1).tolist()
        texts = [row[:length] for row, length in zip(given["prompt_embeds"], lengths, strict=True)]
        # The network's time and velocity point the other way.
        out = network(list(x[:, :, None]), 1 - timestep / 1000, texts, return_dict=False)[0]
        return -torch.stack(out)[:, :, 0]

    def shape(self, network: Backbone) -> tuple[int, int, int]:
        return network.in_channels, DEFAULT_SIZE, DEFAULT_SIZE

    def divisor(self, network: Backbone) -> tuple[int, str]:
        return PACKED

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.t_embedder]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.all_x_embedder["2-1"], network.all_final_layer["2-1"].linear

    def output_channels(self, network: Backbone) -> int:
        return network.out_channels

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        texts, _ = pipeline.encode_prompt(
            list(prompts), device=pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        parts = [
            Condition({"prompt_embeds": text[None], "attention_mask": torch.ones(1, len(text), dtype=torch.int64)})
            for text in texts
        ]
        return Condition.cat(parts).tensors  # padded to the longest

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        length = longest_prompt(pipeline)
        return {"prompt_embeds": (length, network.config.cap_feat_dim), "attention_mask": (length,)}

    def set_timesteps(self, scheduler: Scheduler, steps: int, shape: Sequence[int]) -> None:
        set_shifted(scheduler, steps, shape[1] // 2 * (shape[2] // 2))
