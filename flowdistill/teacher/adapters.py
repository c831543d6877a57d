"""One small adapter a backbone family: how to call it and where its time embedding is made. Nothing per schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from flowdistill.conditions import ClassLabels, Condition
from flowdistill.errors import UserError


class Adapter(Protocol):
    """What flowdistill must know of a backbone family."""

    family: str

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        """Raw prediction (B, C, H, W) for scaled native input x (B, C, H, W) at native timesteps (B,)."""

    def shape(self, network: nn.Module) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""

    def labels(self, network: nn.Module, null_label: int | None) -> ClassLabels | None:
        """The class labels the network takes; None when it is unconditional."""

    def time_embeddings(self, network: nn.Module) -> list[nn.Module]:
        """The modules whose output is the time embedding; each ends in ``linear_2``, where constants fold in."""

    def embedding_size(self, network: nn.Module) -> int:
        """Width of that output."""

    def projections(self, network: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The first and the last (convolution or linear) layer, where an input and an output scale fold in."""

    def middle(self, network: nn.Module) -> nn.Module:
        """The module whose output (B, C, H, W) or (B, N, C) is the network's most abstract picture of its input."""

    def middle_channels(self, network: nn.Module) -> int:
        """C of that output."""

    def output_channels(self, network: nn.Module) -> int:
        """Channels the network returns; twice those of a sample when it also predicts a variance."""

    def learned_variance_channels(self, network: nn.Module) -> int:
        """Channels of :meth:`output_channels` that are a learned variance, dropped by :meth:`call`."""


class UNet2DAdapter:
    """``UNet2DModel``: pixel or latent UNets, unconditional or with class labels."""

    family = "UNet2DModel"

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        labels = None if condition is None else condition.tensors["class_labels"]
        out = network(x, timestep, class_labels=labels, return_dict=False)[0]
        return out[:, : x.shape[1]]

    def shape(self, network: nn.Module) -> tuple[int, int, int]:
        size = network.config.sample_size
        if size is None:
            raise UserError("the UNet2DModel's config has no sample_size, so the image size is unknown; set it in "
                            "unet/config.json")
        height, width = (size, size) if isinstance(size, int) else size
        return network.config.in_channels, height, width

    def labels(self, network: nn.Module, null_label: int | None) -> ClassLabels | None:
        config = network.config
        if config.time_embedding_type != "positional":
            raise UserError(f"the UNet2DModel has time_embedding_type '{config.time_embedding_type}'; supported is "
                            "'positional', which takes continuous timesteps")
        if config.class_embed_type is not None:
            raise UserError(f"the UNet2DModel has class_embed_type '{config.class_embed_type}'; supported are class "
                            "labels through num_class_embeds, or none")
        if config.num_class_embeds is None:
            if null_label is not None:
                raise UserError(f"teacher.null_label is {null_label}, but the UNet2DModel takes no class labels")
            return None
        if null_label is None:
            return ClassLabels(config.num_class_embeds, None)
        if null_label != config.num_class_embeds - 1:
            raise UserError(f"teacher.null_label is {null_label}; for this network with {config.num_class_embeds} "
                            f"class embeddings it can only be the last one, {config.num_class_embeds - 1}")
        return ClassLabels(config.num_class_embeds - 1, null_label)

    def time_embeddings(self, network: nn.Module) -> list[nn.Module]:
        return [network.time_embedding]

    def embedding_size(self, network: nn.Module) -> int:
        return network.time_embedding.linear_2.out_features

    def projections(self, network: nn.Module) -> tuple[nn.Module, nn.Module]:
        return network.conv_in, network.conv_out

    def middle(self, network: nn.Module) -> nn.Module:
        if network.mid_block is None:
            raise UserError("the UNet2DModel has no middle block, whose features the adversarial term reads; set "
                            "method.adversarial_weight to 0")
        return network.mid_block

    def middle_channels(self, network: nn.Module) -> int:
        return network.config.block_out_channels[-1]

    def output_channels(self, network: nn.Module) -> int:
        return network.config.out_channels

    def learned_variance_channels(self, network: nn.Module) -> int:
        return network.config.out_channels - network.config.in_channels


class DiTAdapter:
    """``DiTTransformer2DModel``: class-conditional latent transformers, with or without learned sigma."""

    family = "DiTTransformer2DModel"

    def call(self, network: nn.Module, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        if condition is None:
            raise UserError("DiTTransformer2DModel needs class labels")
        out = network(x, timestep=timestep, class_labels=condition.tensors["class_labels"], return_dict=False)[0]
        return out[:, : x.shape[1]]  # learned-sigma networks return twice the channels; the rest is a variance

    def shape(self, network: nn.Module) -> tuple[int, int, int]:
        return network.config.in_channels, network.config.sample_size, network.config.sample_size

    def labels(self, network: nn.Module, null_label: int | None) -> ClassLabels | None:
        classes = network.config.num_embeds_ada_norm
        if null_label is not None and null_label != classes:
            raise UserError(f"teacher.null_label is {null_label}; a DiTTransformer2DModel with {classes} classes has "
                            f"its null label at {classes}")
        return ClassLabels(classes, classes)

    def time_embeddings(self, network: nn.Module) -> list[nn.Module]:
        # Every block owns its embedder; the first block's also feeds the output layer.
        return [block.norm1.emb.timestep_embedder for block in network.transformer_blocks]

    def embedding_size(self, network: nn.Module) -> int:
        return network.transformer_blocks[0].norm1.emb.timestep_embedder.linear_2.out_features

    def projections(self, network: nn.Module) -> tuple[nn.Module, nn.Module]:
        return network.pos_embed.proj, network.proj_out_2

    def middle(self, network: nn.Module) -> nn.Module:
        return network.transformer_blocks[len(network.transformer_blocks) // 2]

    def middle_channels(self, network: nn.Module) -> int:
        return network.config.num_attention_heads * network.config.attention_head_dim

    def output_channels(self, network: nn.Module) -> int:
        return network.config.out_channels or network.config.in_channels

    def learned_variance_channels(self, network: nn.Module) -> int:
        return self.output_channels(network) - network.config.in_channels


ADAPTERS: dict[str, Adapter] = {adapter.family: adapter for adapter in (UNet2DAdapter(), DiTAdapter())}


def adapter_for(network: nn.Module) -> Adapter:
    """The adapter of a backbone's class.

    Raises:
        UserError: no adapter knows the class, or its output does not fit its input.
    """
    name = type(network).__name__
    if name not in ADAPTERS:
        raise UserError(f"the backbone {name} is not supported; supported are {_join(ADAPTERS)}")
    adapter = ADAPTERS[name]
    channels, extra = adapter.shape(network)[0], adapter.learned_variance_channels(network)
    if extra not in (0, channels):
        raise UserError(f"the backbone {name} takes {channels} channels and returns "
                        f"{adapter.output_channels(network)}; a teacher returns {channels}, "
                        f"or {2 * channels} with a learned variance")
    return adapter


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
