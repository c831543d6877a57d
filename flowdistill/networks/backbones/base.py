"""What flowdistill must know of a backbone family; a family is one small subclass."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.objectives.guidance import kept_norm
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.utils.errors import UserError
from flowdistill.utils.registry import Registry
from flowdistill.utils.text import JsonObject

PACKED = (2, "cuts its samples into patches of 2 x 2")
"""See :meth:`BackboneFamily.divisor`; of networks whose configuration does not say it, or whose pipeline does it."""
Backbone = Any
"""A diffusers model, whose config and layers depend on its class; ``nn.Module`` would say Tensor or Module of each."""


class Sizes(NamedTuple):
    """Networks of one family, from small to large.

    Attributes:
        widths: number of widths, which are counted from 1.
        layers: the most layers.
        changes: (width, layers) -> settings that differ from the backbone's configuration.
    """

    widths: int
    layers: int
    changes: Callable[[int, int], JsonObject]


@dataclass(frozen=True)
class PipelineFacts:
    """What is peculiar to a text-to-image pipeline's call.

    Attributes:
        no_guidance: the argument that switches its own guidance off, such as ``guidance_scale=1``; empty where the call
            needs none.
        scaled_noise: whether it multiplies the noise that it is given by its scheduler's ``init_noise_sigma``, and the
            network's input by what the scheduler says.
        exported_as: a pipeline class of the same parts that students become instead; empty for this one.
        even_times: whether it gives its scheduler evenly spaced times of its own, 1 to 1 / steps.
        seeded_steps: whether its ``generator`` is also that of the noise which its scheduler adds between the steps.
        rounded_times: whether it rounds the timestep to the type of the latents.
        lora_names: the names under which ComfyUI knows the layers of its network in a LoRA file: "kohya" for those of
            kohya's scripts, "diffusers" for diffusers' own; empty where it knows neither.
    """

    no_guidance: str = "guidance_scale=1"
    scaled_noise: bool = False
    exported_as: str = ""
    even_times: bool = False
    seeded_steps: bool = False
    rounded_times: bool = False
    lora_names: str = ""


class BaseVersion(NamedTuple):
    """Which public model a network has the shape of, in the words of the headers of LoRA files.

    Attributes:
        architecture: ``modelspec.architecture`` of Stability AI's model metadata standard, without "/lora".
        kohya: ``ss_base_model_version`` of kohya's scripts.
    """

    architecture: str
    kohya: str


class BackboneFamily(ABC):
    """How to call a backbone, where its time embedding is made, and how it is shrunk. Nothing per schedule.

    Attributes:
        backbone_class: class name of the backbone in diffusers.
        pipelines: the text-to-image pipelines whose prompts :meth:`encode` encodes, by class name; empty for families
            without prompts.
        student_pipeline: class name of the stock pipeline that a student without prompts becomes.
        masked: whether its attention gets a mask over the prompt's tokens.
        ragged: whether :meth:`encode` makes rows as long as the longest of the prompts that it is given needs.
        told, guided: for a table, what the network is told and how it is guided; empty: :meth:`in_words` says it.
    """

    backbone_class: str
    pipelines: Mapping[str, PipelineFacts] = {}
    student_pipeline: str = ""
    masked: bool = False
    ragged: bool = False
    told: str = ""
    guided: str = ""

    def in_words(self) -> tuple[str, str]:
        """What the network is told, and how it is guided."""
        own = type(self)
        told = "prompts" if self.pipelines else "nothing"
        if not self.pipelines and own.labels is not BackboneFamily.labels:
            told = "class labels"
        guided = {"prompts": "classifier-free", "class labels": "classifier-free, with a null label"}.get(told, "none")
        if own.guide is not BackboneFamily.guide:
            guided += ", the norm kept"
        return self.told or told, self.guided or guided

    @abstractmethod
    def call(self, network: Backbone, x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        """Raw prediction (B, C, H, W) for scaled native input x (B, C, H, W) at native timesteps (B,)."""

    def shape(self, network: Backbone) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        size = network.config.sample_size
        if size is None:
            raise UserError(f"the {self.backbone_class}'s config has no sample_size, so the size is unknown; set it "
                            "in its config.json")
        height, width = (size, size) if isinstance(size, int) else size
        return network.config.in_channels, height, width

    def divisor(self, network: Backbone) -> tuple[int, str]:
        """What the sides of a sample must be multiples of, and why, in words."""
        size = network.config.get("patch_size")
        return (size, f"cuts its samples into patches of {size} x {size}") if isinstance(size, int) else (1, "")

    def check_size(self, network: Backbone, shape: Sequence[int]) -> None:
        """Refuse samples (C, H, W) of a size at which the network would fail.

        Raises:
            UserError: a side is no multiple of :meth:`divisor`, or there are more patches than position embeddings.
        """
        (height, width), (divisor, reason) = shape[-2:], self.divisor(network)
        if height % divisor or width % divisor:
            raise UserError(f"the {self.backbone_class} {reason}, so the sides of its samples must be multiples of "
                            f"{divisor}, and they are {height} x {width}")
        most = network.config.get("pos_embed_max_size")
        if most is not None and max(height, width) // divisor > most:
            raise UserError(f"the {self.backbone_class} has position embeddings for samples of up to "
                            f"{most * divisor} x {most * divisor}, and these are {height} x {width}")

    def sample_size(self, network: Backbone, pipeline: str, shape: Sequence[int]) -> int | list[int] | None:
        """The ``sample_size`` in a network's configuration by which a pipeline's call draws samples (C, H, W) of this
        shape when nobody tells it a size; None where there is none, or where it would change more than that.

        Args:
            pipeline: name of the pipeline's class.
        """
        return None

    def base_version(self, network: Backbone, prediction: str) -> BaseVersion | None:
        """The public model that a network has the shape of; None for another shape.

        Args:
            prediction: what the network predicts, as its path names it.
        """
        return None

    def labels(self, network: Backbone, null_label: int | None) -> ClassLabels | None:
        """The class labels the network takes; None when it takes none.

        Raises:
            UserError: a null label for such a network, or a variant of the network that is not supported.
        """
        if null_label is not None:
            raise UserError(f"teacher.null_label is {null_label}, but a {self.backbone_class} takes no class labels")
        return None

    @abstractmethod
    def time_embeddings(self, network: Backbone) -> list[nn.Module]:
        """The modules whose output is the time embedding; constants fold into each one's last linear layer."""

    def constant_embeddings(self, network: Backbone) -> list[nn.Module]:
        """The embeddings that are constant in a one-step student: those of time, and of guidance where it has one."""
        return self.time_embeddings(network)

    def embedding_size(self, network: Backbone) -> int:
        """Width of a time embedding."""
        return last_linear(self.time_embeddings(network)[0]).out_features

    @abstractmethod
    def projections(self, network: Backbone) -> tuple[nn.Module, nn.Module]:
        """The first and the last (convolution or linear) layer, where an input and an output scale fold in."""

    def middle(self, network: Backbone) -> nn.Module:
        """The module whose output (B, C, H, W) or (B, N, C) is the network's most abstract picture of its input: the
        middle block of a UNet.

        Raises:
            UserError: a network without one, whose family does not name another.
        """
        block = getattr(network, "mid_block", None)
        if block is None:
            raise UserError(f"the {self.backbone_class} has no middle block, and the adversarial term reads its "
                            "features; set method.adversarial_weight to 0")
        return block

    def middle_channels(self, network: Backbone) -> int:
        """C of that output."""
        return network.config.block_out_channels[-1]

    def output_channels(self, network: Backbone) -> int:
        """Channels the network returns; twice those of a sample when it also predicts a variance."""
        return network.config.out_channels or network.config.in_channels

    def learned_variance_channels(self, network: Backbone) -> int:
        """Channels of :meth:`output_channels` that are a learned variance, dropped by :meth:`call`."""
        return self.output_channels(network) - self.shape(network)[0]

    @property
    def backbone_type(self) -> type[Backbone]:
        """The backbone's class; one that is not in diffusers overrides this."""
        return getattr(diffusers, self.backbone_class)

    def sizes(self, config: JsonObject) -> Sizes:
        """The smaller networks of the family that a backbone with this configuration can shrink to.

        Raises:
            UserError: the family, or this variant of it, has no rule.
        """
        raise UserError(f"flowdistill has no rule to make a smaller {self.backbone_class}; give the student's settings "
                        "in method.student_shape")

    # --- text to image

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of a :class:`Condition` for ``prompts``, by the pipeline's own ``encode_prompt``.

        Args:
            pipeline: one of :attr:`pipelines`, with its text encoders and tokenizers and nothing else.
            image_size: (height, width) in pixels, for networks that are told.
        """
        raise NotImplementedError

    def encode_negative(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """The same for the other side of guidance; some pipelines treat it in another way."""
        return self.encode(pipeline, prompts, image_size)

    def encode_null(self, pipeline: Pipeline, negative: str | None, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """One row: the negative prompt of guidance, or what the pipeline takes where none is given (None)."""
        return self.encode_negative(pipeline, [negative or ""], image_size)

    def prompt_shapes(self, network: Backbone, pipeline: type, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one row of what :meth:`encode` returns, without a text encoder; the longest where they differ.

        Args:
            pipeline: the class in :attr:`pipelines`.
            clip_tokens: length of a CLIP text encoder's sequence, where the pipeline has one.
        """
        raise NotImplementedError

    def known_shapes(self, network: Backbone, pipeline: str, clip_tokens: int) -> dict[str, tuple[int, ...]] | None:
        """:meth:`prompt_shapes` by the name of the pipeline's class; None for a family that cannot tell."""
        kind = getattr(diffusers, pipeline, None)
        try:
            return None if kind is None else self.prompt_shapes(network, kind, clip_tokens)
        except NotImplementedError:
            return None

    def takes_guidance(self, network: Backbone) -> bool:
        """Whether the guidance scale is an input of the network (in ``condition.tensors["guidance"]``)."""
        return False

    @staticmethod
    def guide(conditional: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """Classifier-free guidance of velocities (B, C, H, W) at ``scale`` (B, 1, 1, 1), as the pipeline does it."""
        return null + scale * (conditional - null)

    @staticmethod
    def keep_norm(guided: Tensor, conditional: Tensor, kind: str) -> Tensor:
        """:func:`flowdistill.objectives.guidance.kept_norm` of predictions (B, C, H, W), in the shape in which the
        network returns them."""
        return kept_norm(guided, conditional, kind)

    def set_timesteps(self, scheduler: Scheduler, steps: int, shape: Sequence[int]) -> None:
        """Prepare a flow-matching scheduler as the family's pipeline does for latents of ``shape`` (C, H, W)."""
        scheduler.set_timesteps(steps)


FAMILIES: Registry[BackboneFamily] = Registry(
    "backbone", package="flowdistill.networks.backbones", group="flowdistill.backbones"
)
"""Class name of a backbone -> its family. A file in this folder, or another package's module, registers its own."""

F = TypeVar("F", bound=type[BackboneFamily])


def register_family(cls: F) -> F:
    """Class decorator: make a family known under the class name of its backbone."""
    FAMILIES.register(cls.backbone_class)(cls())
    return cls


def convolutional_sizes(
    config: JsonObject, unit: int, heads: Callable[[list[int]], JsonObject]
) -> Sizes:
    """Sizes of a UNet: widths in the ratios they have, each a multiple of ``unit``, and fewer layers a block.

    Args:
        heads: widths of the blocks -> what follows from them for attention.
    """
    channels = list(config["block_out_channels"])

    def changes(width: int, layers: int) -> JsonObject:
        widths = [max(1, round(width * channel / max(channels))) * unit for channel in channels]
        return {"block_out_channels": widths, "layers_per_block": layers} | heads(widths)

    return Sizes(max(channels) // unit, config["layers_per_block"], changes)


def last_linear(embedding: nn.Module) -> nn.Linear:
    """The layer that an embedding ends in."""
    return [module for module in embedding.modules() if isinstance(module, nn.Linear)][-1]


def set_shifted(
    scheduler: Scheduler, steps: int, length: int, max_shift: float = 1.15, sigmas: bool = True
) -> None:
    """``set_timesteps`` with a shift that grows with the number of image tokens, where the scheduler asks for one.

    Args:
        length: image tokens.
        max_shift: the pipeline's default at 4,096 tokens.
        sigmas: whether the pipeline gives the scheduler evenly spaced times of its own, 1 to 1 / steps.
    """
    config = scheduler.config
    settings: dict[str, object] = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist()} if sigmas else {}
    if config.get("use_dynamic_shifting"):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
        settings["mu"] = base + (top - base) * (length - low) / (high - low)
    scheduler.set_timesteps(steps, **settings)


def packed(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens of 2 x 2 (B, H W / 4, 4 C)."""
    rows, channels, height, width = x.shape
    tokens = x.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(rows, height // 2 * (width // 2), 4 * channels)


def unpacked(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`packed` for latents of ``shape`` (..., H, W)."""
    height, width = shape[-2:]
    x = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(tokens), -1, height, width)


def longest_prompt(pipeline: type[Pipeline]) -> int:
    """Tokens of a prompt that a pipeline's ``encode_prompt`` keeps."""
    return int(inspect.signature(pipeline.encode_prompt).parameters["max_sequence_length"].default)


def tensors(condition: Condition | None, x: Tensor, family: str) -> dict[str, Tensor]:
    """A condition's tensors, those of floating point in x's type."""
    if condition is None:
        raise UserError(f"{family} needs prompts")
    return {name: value.to(x.dtype) if value.is_floating_point() else value
            for name, value in condition.tensors.items()}


def guidance_of(condition: Condition | None, x: Tensor) -> Tensor:
    """The guidance scale that is an input (B,), float32; 1 where none was given."""
    given = None if condition is None else condition.tensors.get("guidance")
    return torch.ones(len(x), device=x.device) if given is None else given.float()
