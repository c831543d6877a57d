"""Low-rank adapters (LoRA, by peft): students and critics on the teacher's own weights, which are in memory once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flowdistill.config import option
from flowdistill.utils.errors import UserError
from flowdistill.utils.quantized import dequantize

KINDS = ("full", "lora")
ADAPTER = "default"
"""peft's name of the one adapter."""


@dataclass
class LoraSettings:
    """Settings of the adapters W + (alpha / rank) B A: on which layers, of what rank. B starts at zero."""

    rank: int = option(16, "rank of the adapters", at_least=1)
    alpha: float | None = option(None, "scale of what they add, times 1 / rank; null: rank, so times 1", above=0)
    target_modules: list[str] | None = option(None, "ends of the names of the layers that get one, such as [to_q, "
                                                    "to_v]; null: all linear and convolution layers")


@dataclass
class StudentKind:
    """What trains, a copy of the teacher or adapters; methods' settings inherit it."""

    student: str = option("full", "copy of the teacher, or low-rank adapters on it", choices=KINDS)
    lora: LoraSettings = option(LoraSettings, "the adapters, where asked for")

    def validate_at(self, prefix: str, given: Mapping[str, str]) -> None:
        """Warn of settings of adapters where nothing has any."""
        parts = [name for name in ("student", "critic") if hasattr(self, name)]
        trained = any(getattr(self, name) == "lora" for name in parts)
        ask = " or ".join(f"{prefix}{name}" for name in parts)
        if not trained and self.lora != LoraSettings():
            warnings.warn(f"{prefix}lora has no effect, because {ask.replace(' or ', ' and ')} "
                          f"{'is' if len(parts) == 1 else 'are'} full; for adapters set {ask} to lora", stacklevel=2)
        if getattr(self, "critic_lora_rank", None) is not None and getattr(self, "critic", None) != "lora":
            warnings.warn(f"{prefix}critic_lora_rank has no effect, because {prefix}critic is full; for adapters set "
                          "it to lora", stacklevel=2)

    @property
    def student_lora(self) -> LoraSettings | None:
        """The student's adapters; None for a full copy of the teacher."""
        return self.lora if self.student == "lora" else None


@dataclass
class CriticKind(StudentKind):
    """The same of a method with a critic, whose adapters may have a rank of their own."""

    critic: str = option("full", "copy of the teacher, or low-rank adapters on it", choices=KINDS)
    critic_lora_rank: int | None = option(None, "rank of the critic's; null: lora.rank", at_least=1)

    @property
    def critic_lora(self) -> LoraSettings | None:
        """The critic's adapters; None for a full copy of the teacher."""
        if self.critic != "lora":
            return None
        return replace(self.lora, rank=self.critic_lora_rank or self.lora.rank)


def layers_named(backbone: nn.Module, ends: Sequence[str] | None) -> list[str]:
    """Names of the layers that can get an adapter, linear ones and convolutions not in groups, and end with one of
    ``ends``; None: all."""
    names = [name for name, module in backbone.named_modules()
             if isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1]
    return names if ends is None else [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in ends))]


def add_lora(backbone: nn.Module, settings: LoraSettings, gaussian: bool = False) -> nn.Module:
    """Freeze ``backbone`` and put float32 adapters on its linear and convolution layers, in place.

    Convolutions in groups get none. The output does not change by a bit. ``gaussian``: A starts as diffusers' training
    scripts have it, not as peft does.

    Raises:
        UserError: no layer has one of the names in ``settings.target_modules``.
    """
    names = layers_named(backbone, settings.target_modules)
    if not names:
        last = ", ".join(sorted({name.rpartition(".")[2] for name in layers_named(backbone, None)}))
        raise UserError(f"method.lora.target_modules is {settings.target_modules}, and the {type(backbone).__name__} "
                        f"has no linear or convolution layer whose name ends so; there are {last}")
    backbone.requires_grad_(False)
    alpha: Any = settings.rank if settings.alpha is None else settings.alpha
    start: bool | Literal["gaussian"] = "gaussian" if gaussian else True
    wanted = LoraConfig(r=settings.rank, lora_alpha=alpha, init_lora_weights=start, target_modules=names)
    # A plan's backbone has no numbers, and its adapters need none: for Flux they would be half a gigabyte of draws.
    inject_adapter_in_model(wanted, backbone, ADAPTER, low_cpu_mem_usage=any(p.is_meta for p in backbone.parameters()))
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return backbone.eval()


def lora_layers(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, peft's layer) of the layers with an adapter."""
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dictionary in two: what trained beside the backbone's weights, and these weights."""
    base = {name: value for name, value in tensors.items()
            if name.startswith("velocity.backbone.") and f".{ADAPTER}." not in name}
    return {name: value for name, value in tensors.items() if name not in base}, base


@torch.no_grad()
def merged(backbone: nn.Module) -> nn.Module:
    """A copy on the CPU without adapters: of their weights, W + (alpha / rank) B A in float32, and of nothing else's.

    A backbone without adapters is just copied.
    """
    alone = copy.deepcopy(backbone).cpu()
    dequantize(alone)
    layers = [layer for _, layer in lora_layers(alone)]
    if layers:
        alone = alone.float()
        for layer in layers:
            layer.merge()
        recurse_remove_peft_layers(alone)
        del alone.peft_config
    return alone


@torch.no_grad()
def lora_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """``<layer>.lora_A.weight`` and ``lora_B.weight``, on the CPU, with the factor alpha / rank inside B."""
    tensors = {}
    for name, layer in lora_layers(backbone):
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.cpu().clone()
        tensors[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight.cpu() * layer.scaling[ADAPTER]
    return tensors
