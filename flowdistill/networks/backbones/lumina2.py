"""``Lumina2Transformer2DModel``: Lumina Image 2.0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.networks.backbones.base import (
    Backbone,
    BackboneFamily,
    PipelineFacts,
    longest_prompt,
    register_family,
    set_shifted,
    tensors,
)
from flowdistill.objectives.guidance import kept_norm
from flowdistill.paths.scheduler_protocol import Scheduler


@register_family
class Lumina2Family(BackboneFamily):
    backbone_class = "Lumina2Transformer2DModel"
    pipelines = {"Lumina2Pipeline": PipelineFacts(even_times=True)}
    masked = True

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        # The network's time and velocity point the other way.
        return -network(x, timestep=1 - timestep / 1000, encoder_hidden_states=given["prompt_embeds"],
                        encoder_attention_mask=given["attention_mask"], return_dict=False)[0]

    def sample_size(self, network: Backbone, pipeline: str, shape: Sequence[int]) -> int | list[int] | None:
        return shape[-1] if shape[-1] == shape[-2] else None

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.time_caption_embed.timestep_embedder]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.x_embedder, network.norm_out.linear_2

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=pipeline.text_encoder.device
        )
        return {"prompt_embeds": embeds, "attention_mask": mask}

    def encode_negative(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        # Without the system prompt.
        _, _, embeds, mask = pipeline.encode_prompt(
            prompts, negative_prompt=prompts, device=pipeline.text_encoder.device
        )
        return {"prompt_embeds": embeds, "attention_mask": mask}

    @staticmethod
    def guide(conditional: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """Guidance brought back to the conditional velocity's norm, row of pixels by row of pixels."""
        return kept_norm(null + scale * (conditional - null), conditional, "last_dim")

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        length = longest_prompt(pipeline)
        return {"prompt_embeds": (length, network.config.cap_feat_dim), "attention_mask": (length,)}

    def set_timesteps(self, scheduler: Scheduler, steps: int, shape: Sequence[int]) -> None:
        # The pipeline takes the number of channels for the number of tokens; its shift is then constant.
        set_shifted(scheduler, steps, shape[0])
