"""``SanaTransformer2DModel``: Sana."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.networks.backbones.base import (
    Backbone,
    BackboneFamily,
    PipelineFacts,
    longest_prompt,
    register_family,
    tensors,
)
from flowdistill.utils.errors import UserError


@register_family
class SanaFamily(BackboneFamily):
    backbone_class = "SanaTransformer2DModel"
    pipelines = {"SanaPipeline": PipelineFacts(seeded_steps=True)}
    masked = True

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        out = network(x, encoder_hidden_states=given["prompt_embeds"], encoder_attention_mask=given["attention_mask"],
                      timestep=timestep * network.config.timestep_scale, return_dict=False)[0]
        return out[:, : x.shape[1]]

    def labels(self, network: Backbone, null_label: int | None) -> ClassLabels | None:
        if network.config.guidance_embeds:
            raise UserError("the SanaTransformer2DModel has guidance_embeds (Sana-Sprint); supported is Sana")
        return super().labels(network, null_label)

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.time_embed.emb.timestep_embedder]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.patch_embed.proj, network.proj_out

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        length = longest_prompt(pipeline)
        return {"prompt_embeds": (length, network.config.caption_channels), "attention_mask": (length,)}

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipeline.text_encoder.device,
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": embeds, "attention_mask": mask}

    def encode_negative(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        # Without the instruction that comes before a prompt.
        _, _, embeds, mask = pipeline.encode_prompt(
            prompts, negative_prompt=prompts, device=pipeline.text_encoder.device
        )
        return {"prompt_embeds": embeds, "attention_mask": mask}
