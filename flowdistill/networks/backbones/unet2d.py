"""``UNet2DModel``: pixel or latent UNets, unconditional or with class labels."""

from __future__ import annotations

import math

from torch import Tensor, nn

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.networks.backbones.base import (
    Backbone,
    BackboneFamily,
    Sizes,
    convolutional_sizes,
    register_family,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import JsonObject


@register_family
class UNet2DFamily(BackboneFamily):
    backbone_class = "UNet2DModel"
    student_pipeline = "ConsistencyModelPipeline"
    told = "class labels, or nothing"
    guided = "classifier-free, where teacher.null_label names one"

    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        labels = None if condition is None else condition.tensors["class_labels"]
        out = network(x, timestep, class_labels=labels, return_dict=False)[0]
        return out[:, : x.shape[1]]

    def divisor(self, network: Backbone) -> tuple[int, str]:
        times = len(network.config.down_block_types) - 1  # every block but the last
        return 2**times, f"halves its samples {times} time{'s' if times > 1 else ''}"

    def labels(self, network: Backbone, null_label: int | None) -> ClassLabels | None:
        config = network.config
        if config.time_embedding_type not in ("fourier", "positional"):
            raise UserError(f"the UNet2DModel has time_embedding_type '{config.time_embedding_type}'; supported are "
                            "'positional' and 'fourier', which take continuous timesteps")
        if config.class_embed_type is not None:
            raise UserError(f"the UNet2DModel has class_embed_type '{config.class_embed_type}'; supported are class "
                            "labels through num_class_embeds, or none")
        if config.num_class_embeds is None:
            return super().labels(network, null_label)
        if null_label is None:
            return ClassLabels(config.num_class_embeds, None)
        if null_label != config.num_class_embeds - 1:
            raise UserError(f"teacher.null_label is {null_label}; for this network with {config.num_class_embeds} "
                            f"class embeddings it can only be the last one, {config.num_class_embeds - 1}")
        return ClassLabels(config.num_class_embeds - 1, null_label)

    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        return [network.time_embedding]

    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        return network.conv_in, network.conv_out

    def sizes(self, config: JsonObject) -> Sizes:
        """Channels that norm groups and the size of a head divide: there the number of heads follows from the width."""
        groups, head = config["norm_num_groups"] or 1, config["attention_head_dim"] or 1
        unit = math.lcm(groups, config.get("attn_norm_num_groups") or 1, head)
        return convolutional_sizes(config, unit, lambda widths: {})
