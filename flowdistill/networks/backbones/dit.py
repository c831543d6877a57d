"""``DiTTransformer2DModel``: class-conditional latent transformers, with or without learned sigma."""

from __future__ import annotations

import math

from torch import Tensor, nn

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.networks.backbones.base import (
    Backbone,
    BackboneFamily,
    Sizes,
    register_family,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import JsonObject


@register_family
class DiTFamily(BackboneFamily):
    backbone_class = "DiTTransformer2DModel"
    student_pipeline = "DiTPipeline"

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        if condition is None:
            raise UserError("DiTTransformer2DModel needs class labels")
        out = network(x, timestep=timestep, class_labels=condition.tensors["class_labels"], return_dict=False)[0]
        return out[:, : x.shape[1]]  # learned-sigma networks return twice the channels; the rest is a variance

    def labels(self, network: Backbone, null_label: int | None) -> ClassLabels | None:
        classes = network.config.num_embeds_ada_norm
        if null_label is not None and null_label != classes:
            raise UserError(f"teacher.null_label is {null_label}; a DiTTransformer2DModel with {classes} classes has "
                            f"its null label at {classes}")
        return ClassLabels(classes, classes)

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        # Every block owns its embedder; the first block's also feeds the output layer.
        return [block.norm1.emb.timestep_embedder for block in network.transformer_blocks]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.pos_embed.proj, network.proj_out_2

    def middle(self, network: Backbone) -> nn.Module:
        return network.transformer_blocks[len(network.transformer_blocks) // 2]

    def middle_channels(self, network: Backbone) -> int:
        return network.config.num_attention_heads * network.config.attention_head_dim

    def sizes(self, config: JsonObject) -> Sizes:
        """Fewer heads of the same size, then fewer blocks.

        Positions are sines and cosines in two directions, so 4 divides the width.
        """
        heads, size = config["num_attention_heads"], config["attention_head_dim"]
        unit = 4 // math.gcd(4, size)
        return Sizes(heads // unit, config["num_layers"],
                     lambda width, layers: {"num_attention_heads": width * unit, "num_layers": layers})
