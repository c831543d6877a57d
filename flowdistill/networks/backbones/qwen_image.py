"""``QwenImageTransformer2DModel``: Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.networks.backbones.base import (
    PACKED,
    Backbone,
    BackboneFamily,
    PipelineFacts,
    longest_prompt,
    packed,
    register_family,
    set_shifted,
    tensors,
    unpacked,
)
from flowdistill.objectives.guidance import kept_norm
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.utils.errors import UserError

DEFAULT_SIZE = 128  # of the pipeline, in latents


@register_family
class QwenImageFamily(BackboneFamily):
    backbone_class = "QwenImageTransformer2DModel"
    pipelines = {"QwenImagePipeline": PipelineFacts("true_cfg_scale=1", even_times=True, rounded_times=True,
                                                    lora_names="diffusers")}
    masked = True
    ragged = True

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        given = tensors(condition, x, self.backbone_class)
        tokens = network(
            packed(x),
            timestep=timestep / 1000,
            encoder_hidden_states=given["prompt_embeds"],
            encoder_hidden_states_mask=given["attention_mask"],
            img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpacked(tokens, x.shape)

    def shape(self, network: Backbone) -> tuple[int, int, int]:
        return network.config.in_channels // 4, DEFAULT_SIZE, DEFAULT_SIZE

    def divisor(self, network: Backbone) -> tuple[int, str]:
        return PACKED

    def labels(self, network: Backbone, null_label: int | None) -> ClassLabels | None:
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if network.config.get(key):
                raise UserError(f"the QwenImageTransformer2DModel has {key}; supported is Qwen-Image without it")
        return super().labels(network, null_label)

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.time_text_embed.timestep_embedder]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.img_in, network.proj_out

    def output_channels(self, network: Backbone) -> int:
        return network.out_channels

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, mask = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask  # None: nothing is padding
        return {"prompt_embeds": embeds, "attention_mask": mask}

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        length = longest_prompt(pipeline)
        return {"prompt_embeds": (length, network.config.joint_attention_dim), "attention_mask": (length,)}

    @staticmethod
    def guide(conditional: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """Guidance brought back to the conditional velocity's norm, token by token."""
        return QwenImageFamily.keep_norm(null + scale * (conditional - null), conditional, "last_dim")

    @staticmethod
    def keep_norm(guided: Tensor, conditional: Tensor, kind: str) -> Tensor:
        return unpacked(kept_norm(packed(guided), packed(conditional), kind), guided.shape)

    def set_timesteps(self, scheduler: Scheduler, steps: int, shape: Sequence[int]) -> None:
        set_shifted(scheduler, steps, shape[1] // 2 * (shape[2] // 2))
